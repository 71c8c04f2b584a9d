"""Brings a replica to the version that it should serve: in place if vLLM can, otherwise by restarting it.

    Starting --vLLM is up and verified--> Serving --the pointer moved--> Swapping --reloaded and verified--> Serving
                                                                            |
        Starting <-- vLLM is made to restart on the new weights -- reload failed

A server's label tells which weights it holds. `FRESH`: it has started since a label was last written, so it loaded `current`, which
moves only after the label `RELOADING` was written to a live server. `RELOADING`: unknown. A version: that one, verified.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from dagger_operator.serving.engine import FRESH, RELOADING, Engine, EngineFailure, Health
from dagger_operator.serving.gate import Gate
from dagger_operator.serving.metrics import AgentMetrics
from dagger_operator.serving.shared import Shared
from dagger_operator.store.objects import DamagedObject, StoreUnavailable

log = structlog.get_logger()

BUSY_SECONDS = 300.0
"""How long a vLLM that listens but does not answer is considered busy."""


class State(StrEnum):
    STARTING = "Starting"
    SERVING = "Serving"
    SWAPPING = "Swapping"


@dataclass(frozen=True)
class Weights:
    """A version on disk."""

    version: str
    digest: str
    """Digest of all its contents."""
    tensors: frozenset[str]
    """SHA-256 of its safetensors files; versions that share them hold the same weights."""


class Replica:
    """Converges on the version that should be served, one `step` at a time."""

    def __init__(
        self,
        engine: Engine,
        shared: Shared,
        gate: Gate,
        metrics: AgentMetrics,
        *,
        wanted: Callable[[], Awaitable[str | None]],
        provide: Callable[[str], Awaitable[Weights]],
        drain_seconds: float,
    ) -> None:
        """`wanted` returns the version that should be served (None: no change), `provide` puts it into the shared folder, verified."""
        self._drain_seconds = drain_seconds
        self._engine, self._shared, self._gate, self._metrics = engine, shared, gate, metrics
        self._wanted, self._provide = wanted, provide
        self._restarting = False
        self._heard = time.monotonic()
        """When vLLM was last not silent."""
        self.state = State.STARTING
        self.reason = ""
        """Why it does not serve what it should; empty if it does."""
        self.serves: Weights | None = None
        self.fingerprint = ""
        self.max_model_len = 0

    @property
    def ready(self) -> bool:
        """Whether requests may be sent here: during a swap in place they are told to retry shortly."""
        return self.state is not State.STARTING

    async def server_well(self) -> bool:
        """Whether vLLM runs and need not be replaced. A silent one may be processing many long prompts, and is given time."""
        health, now = await self._engine.health(), time.monotonic()
        if health is not Health.SILENT:
            self._heard = now
        return not self._restarting and (health is Health.UP or (health is Health.SILENT and now - self._heard < BUSY_SECONDS))

    async def step(self) -> None:
        """Check the state and act on it. Any error becomes `reason`, and the next step retries."""
        try:
            await self._step()
        except (EngineFailure, StoreUnavailable, DamagedObject, OSError) as error:  # OSError: a full disk
            self._say(str(error))

    async def _step(self) -> None:
        health = await self._engine.health()
        if health is Health.SILENT:
            self._say("vLLM listens and does not answer")  # perhaps busy: its requests show whether it works
            return
        if health is not Health.UP:
            self._leave(State.STARTING, "vLLM's engine is lost" if health is Health.DEAD else "vLLM does not listen yet")
            self._restarting = self._restarting or health is Health.DEAD
            if health is Health.AWAY:
                self._shared.remove_stale_socket()
            return
        label = await self._engine.label()
        if self._restarting:
            if label != FRESH:
                return  # still the old server
            self._restarting = False
        running = self._shared.current if label == FRESH else None if label == RELOADING else label
        target, away = await self._target(running)
        if running is not None and (self.state is not State.SERVING or label == FRESH):
            self._leave(State.STARTING, "verifying vLLM")
            await self._verify(await self._provide(running))
        if target is not None and target != running:
            await self._swap(target)
        elif target == running and not away:
            self.reason = ""

    async def _target(self, running: str | None) -> tuple[str | None, bool]:
        """Return what should be served, and whether storage is unavailable: the loaded version is served regardless."""
        try:
            return await self._wanted() or running, False
        except StoreUnavailable as error:
            self._say(str(error))
            return running, True

    async def _verify(self, weights: Weights) -> None:
        """Verify what vLLM runs, and admit requests."""
        await self._engine.resume()  # paused by a swap, perhaps of an agent that was killed during it
        await self._engine.check_chat()
        self.fingerprint = await self._engine.fingerprint()
        self.max_model_len = await self._engine.max_model_len()
        await self._engine.set_label(weights.version)
        self.serves, self.state, self.reason = weights, State.SERVING, ""
        self._gate.open(weights.version)
        self._metrics.serves(weights.version)
        log.info("serving", policy=weights.version, weights=self.fingerprint)

    async def _swap(self, target: str) -> None:
        weights = await self._provide(target)  # while the old version still answers
        started = time.monotonic()
        self._leave(State.SWAPPING, f"changing to {target}")
        with contextlib.suppress(TimeoutError):  # a stalled client holds an answer of the old version, and is told so
            await asyncio.wait_for(self._gate.drained(), self._drain_seconds)
        try:
            await self._exchange(weights)
        except EngineFailure as error:
            self._restarting = True
            self._leave(State.STARTING, f"vLLM restarts on {target}, because its weights could not be changed in place: {error}")
            self._metrics.swapped("Restart", time.monotonic() - started)
            log.warning("reload failed", policy=target, error=str(error))
            return
        self._metrics.swapped("InPlace", time.monotonic() - started)
        self._shared.prune({target})

    async def _exchange(self, weights: Weights) -> None:
        before, held = await self._engine.fingerprint(), self.serves
        await self._engine.set_label(RELOADING)
        self._shared.point(weights.version)
        await self._engine.pause()
        await self._engine.reload(self._shared.folder(weights.version))
        await self._engine.reset_prefix_cache()
        # What a killed agent left half changed may be complete already; to be sure costs a restart.
        changes = held is None or held.tensors != weights.tensors
        if changes and self._engine.shows_all_weights and await self._engine.fingerprint() == before:
            raise EngineFailure("vLLM says that it reloaded, and still holds the same weights as before")
        await self._verify(weights)

    def _leave(self, state: State, reason: str) -> None:
        """Stop admitting requests."""
        self._gate.close()
        if self.state is State.SERVING:
            log.info("not serving", policy=self.serves.version if self.serves else None, reason=reason)
        self.state, self.reason = state, reason

    def _say(self, reason: str) -> None:
        if reason != self.reason:
            log.warning("cannot converge", reason=reason)
        self.reason = reason


async def converge(replica: Replica, *, seconds: float) -> None:
    """Step forever."""
    while True:
        await replica.step()
        await asyncio.sleep(seconds)
