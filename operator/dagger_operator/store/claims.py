"""Which worker runs which rollout: leases in object storage, taken by put-if-absent, kept by compare-and-swap.

No clock of another machine is trusted: a claim has expired when its content stood still for `lease_seconds` of our own monotonic
clock. A claim only saves work. What keeps results single is that a trajectory is created once.
"""

import asyncio
import time
import uuid
from types import TracebackType
from typing import Self

import structlog
from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Object, Store, StoreUnavailable
from dagger_operator.store.records import Failure, Record

log = structlog.get_logger(__name__)


class Claim(Record):
    """The object that stands for a lease."""

    worker: str
    """Name that outlives restarts."""
    holder: str
    """This life of the worker; empty where the claim was given back."""
    beat: int = 0
    """Grows with every renewal, so that a living claim never looks the same twice."""
    tries: int = 0
    """Times that the rollout was started, over all workers."""
    failures: int = 0
    """Tries that infrastructure broke."""
    deaths: int = 0
    """Tries whose worker died or fell silent over them; one that gave its claim back did not."""
    last_failure: Failure | None = None


class LeaseLost(Exception):
    """Another worker took this rollout over, or the store was away for longer than the lease: stop, write nothing more."""


class Claims:
    """One worker's view of one stage's claims."""

    def __init__(self, store: Store, round_number: int, kind: Kind, worker: str, lease_seconds: float) -> None:
        self.store, self.round, self.kind, self.worker, self.lease_seconds = store, round_number, kind, worker, lease_seconds
        self.life = uuid.uuid4().hex
        self._held: set[str] = set()
        self._seen: dict[str, tuple[str, float]] = {}

    async def take(self, rollout_id: str) -> "Lease | None":
        """A lease, or None where the rollout is finished or another worker's claim on it still moves. Ask again later."""
        if rollout_id in self._held:
            return None
        self._held.add(rollout_id)
        lease = None
        try:
            lease = await self._take(rollout_id)
            return lease
        finally:
            if lease is None:
                self._held.discard(rollout_id)

    async def _take(self, rollout_id: str) -> "Lease | None":
        key = layout.claim(self.round, self.kind, rollout_id)
        old = await self.store.get(key)
        claim = _parse(old)
        if old is not None and claim.holder and not self._may_take_over(rollout_id, claim, old):
            return None
        counts = {"tries": claim.tries + 1, "deaths": claim.deaths + bool(claim.holder)}
        mine = claim.model_copy(update={"worker": self.worker, "holder": self.life, "beat": claim.beat + 1, **counts})
        made = await self.store.swap(key, _bytes(mine), old)
        if made is None:
            return None
        # Looked at after the claim is ours: nobody who held it before can still be about to finish unseen.
        if await self.store.exists(layout.trajectory(self.round, self.kind, rollout_id)):
            await self.store.delete(key)
            return None
        self._seen.pop(rollout_id, None)
        return Lease(self, rollout_id, mine, made)

    def _may_take_over(self, rollout_id: str, claim: Claim, now_there: Object) -> bool:
        etag, since = self._seen.get(rollout_id, ("", 0.0))
        if etag == now_there.etag:
            return time.monotonic() - since >= self.lease_seconds
        known = rollout_id in self._seen
        self._seen[rollout_id] = (now_there.etag, time.monotonic())
        # A worker's former life is gone. Only at first sight: two lives at once under one name must not steal in turns.
        return claim.worker == self.worker and not known

    def _let_go(self, rollout_id: str) -> None:
        self._held.discard(rollout_id)

    def _lost_to(self, rollout_id: str, rival: Object | None) -> None:
        self._held.discard(rollout_id)
        if rival is not None:
            self._seen[rollout_id] = (rival.etag, time.monotonic())


class Lease:
    """A rollout that is ours. As a context manager it renews itself, cancels its body and raises `LeaseLost` when it is lost,
    and gives back what is still held at the end."""

    def __init__(self, claims: Claims, rollout_id: str, claim: Claim, there: Object) -> None:
        self.rollout_id = rollout_id
        self.lost = False
        self._claims, self._claim, self._there = claims, claim, there
        self._renewed = time.monotonic()
        self._released = False
        self._stop = asyncio.Event()
        self._heart: asyncio.Task[None] | None = None
        self._body: asyncio.Task[object] | None = None

    @property
    def tries(self) -> int:
        """Times that this rollout was started, this one included, over all workers and restarts."""
        return self._claim.tries

    @property
    def failures(self) -> int:
        """Earlier tries that infrastructure broke."""
        return self._claim.failures

    @property
    def deaths(self) -> int:
        """Earlier tries whose worker died or fell silent."""
        return self._claim.deaths

    async def renew(self) -> None:
        """Moves the claim on; raises `LeaseLost` where it is no longer ours, `StoreUnavailable` where the store is away."""
        await self._replace(self._claim.model_copy(update={"beat": self._claim.beat + 1}))

    async def release(self, failure: Failure | None = None) -> None:
        """Gives the rollout back: at once free for anyone, with `failure` counted; the claim goes where the rollout is finished."""
        if self._released or self.lost:
            return
        await self._stop_heart()
        key = layout.claim(self._claims.round, self._claims.kind, self.rollout_id)
        done = layout.trajectory(self._claims.round, self._claims.kind, self.rollout_id)
        if failure is None and await self._claims.store.exists(done):
            await self._claims.store.delete(key)
        else:
            update = {"holder": "", "beat": self._claim.beat + 1}
            if failure is not None:
                update |= {"failures": self._claim.failures + 1, "last_failure": failure}
            await self._replace(self._claim.model_copy(update=update))
        self._released = True
        self._claims._let_go(self.rollout_id)

    async def __aenter__(self) -> Self:
        self._body = asyncio.current_task()
        self._stop.clear()
        self._heart = asyncio.create_task(self._beat(), name=f"lease {self.rollout_id}")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self._stop_heart()
        except asyncio.CancelledError:
            if not self.lost:
                raise
        if self.lost:
            self._claims._let_go(self.rollout_id)
            # As asyncio.timeout does: our own cancellation becomes LeaseLost, one from outside stays what it is.
            only_ours = self._body is not None and self._body.uncancel() == 0
            if error is None or isinstance(error, asyncio.CancelledError):
                raise LeaseLost(self._explain()) if only_ours else asyncio.CancelledError
            return
        try:
            await self.release()
        except (LeaseLost, StoreUnavailable) as problem:
            # The body's own end matters more; the claim expires by itself.
            log.warning("claim not given back", rollout=self.rollout_id, problem=str(problem))
            self._claims._let_go(self.rollout_id)

    async def _replace(self, claim: Claim) -> None:
        key = layout.claim(self._claims.round, self._claims.kind, self.rollout_id)
        while True:
            started = time.monotonic()
            there = await self._claims.store.swap(key, _bytes(claim), self._there)
            if there is not None:
                self._claim, self._there, self._renewed = claim, there, started
                return
            current = await self._claims.store.get(key)
            if current is None or _parse(current).holder != self._claims.life:
                self.lost = True
                self._claims._lost_to(self.rollout_id, current)
                raise LeaseLost(self._explain())
            # A renewal that we gave up waiting for arrived after all: go on from there.
            self._there = current
            claim = claim.model_copy(update={"beat": _parse(current).beat + 1})

    async def _beat(self) -> None:
        seconds = self._claims.lease_seconds
        while not await self._stopped_within(seconds / 3):
            try:
                await asyncio.wait_for(self.renew(), seconds)
            except LeaseLost:
                break
            except (StoreUnavailable, TimeoutError) as problem:
                log.warning("claim not renewed", rollout=self.rollout_id, problem=str(problem))
                if time.monotonic() - self._renewed > seconds:
                    self.lost = True
                    break
        if self.lost and self._body is not None:
            self._body.cancel()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
            return True
        except TimeoutError:
            return False

    async def _stop_heart(self) -> None:
        """Lets a renewal under way end, so that what it wrote is known."""
        self._stop.set()
        heart, self._heart = self._heart, None
        if heart is not None:
            await asyncio.gather(heart, return_exceptions=True)

    def _explain(self) -> str:
        return f"the claim on rollout {self.rollout_id} is no longer {self._claims.worker}'s: taken over, or not renewed in time"


def _parse(there: Object | None) -> Claim:
    if there is None:
        return Claim(worker="", holder="")
    try:
        return Claim.model_validate_json(there.data)
    except ValidationError:
        # Garbled by hand or by a fault: as good as given back, only its counts are gone.
        return Claim(worker="", holder="")


def _bytes(claim: Claim) -> bytes:
    return claim.model_dump_json().encode()
