"""One container of a pod: its lives, its probes, and its state as in a pod's status."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from dagger_operator.local.environment import CannotStart, PodContext, command_line, container_environment
from dagger_operator.local.probes import Probe
from dagger_operator.local.processes import Process

TERMINATION_BYTES = 4096
"""Kubernetes' limit on a termination message."""
NOT_STARTED = 128
"""Exit code of a container if its program or the folders that it needs could not be prepared."""


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Container:
    """Runs one life at a time when asked; restart policies are up to the caller."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        pod: PodContext,
        base: Mapping[str, str],
        *,
        mark: str,
        logs: Path,
        grace: float,
        changed: Callable[[], None],
    ) -> None:
        self.name: str = spec["name"]
        self._spec, self._pod, self._base, self._mark, self._grace, self._changed = spec, pod, base, mark, grace, changed
        self._log = logs / f"{self.name}.log"
        self._termination = pod.folder / f"termination-{self.name}"
        self._process: Process | None = None
        self.state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self.last_state: dict[str, Any] = {}
        self.lives = 0
        self.ready = False

    def status(self) -> dict[str, Any]:
        """An entry of `status.containerStatuses`."""
        return {
            "name": self.name,
            "ready": self.ready,
            "started": self.ready or "running" in self.state,
            "restartCount": max(0, self.lives - 1),
            "state": self.state,
            "lastState": self.last_state,
        }

    def waits(self, reason: str, message: str = "") -> None:
        """Report why it does not run; how it ended before stays visible in `lastState`."""
        if "terminated" in self.state:
            self.last_state = self.state
        self.state = {"waiting": {"reason": reason, "message": message}}
        self._changed()

    async def live(self) -> int:
        """Run one life and return its exit code. Cancelling it stops the process. Raises `CannotStart`."""
        try:
            environment = {**self._base, **container_environment(self._spec, self._pod)}
            environment["DAGGER_TERMINATION_LOG"] = str(self._termination)
            argv = command_line(self._spec, environment)
        except CannotStart as error:
            self.waits(error.reason, error.message)
            raise
        self.lives += 1
        started_at, written = now(), self._written()
        try:
            self._make_folders()
            self._termination.unlink(missing_ok=True)
            self._process = await Process.start(argv, environment, mark=f"{self._mark}{self.name}/", log=self._log, folder=self._pod.folder)
        except OSError as error:
            message = f"{error.filename or argv[0]}: {error.strerror or error}"
            return self._ended(NOT_STARTED, started_at, message, reason="StartError")
        if "terminated" in self.state:
            self.last_state = self.state
        self.state = {"running": {"startedAt": started_at}}
        self.ready = not any(self._spec.get(kind) for kind in ("startupProbe", "readinessProbe"))
        self._changed()
        probing = asyncio.create_task(self._probe(self._process))
        try:
            code = await self._process.wait()
        except asyncio.CancelledError:
            code = await self._process.stop(self._grace)
            raise
        finally:
            probing.cancel()
            self.ready = False
            await asyncio.gather(probing, return_exceptions=True)
        return self._ended(code, started_at, self._message(code, written))

    def _make_folders(self) -> None:
        """Create the folders for each life: they may have been removed since, and a disk that was full may have room."""
        volumes = (self._pod.volume(mount["name"]) for mount in self._spec.get("volumeMounts", ()))
        for folder in (self._pod.folder, *volumes, self._log.parent):
            folder.mkdir(parents=True, exist_ok=True)

    async def _probe(self, process: Process) -> None:
        startup, readiness, liveness = (
            Probe.of(self._spec.get(f"{kind}Probe"), self._pod.address) for kind in ("startup", "readiness", "liveness")
        )
        async with aiohttp.ClientSession() as client:
            if startup is not None and not await startup.until_success(client):
                await process.stop(self._grace)
                return
            duties = [self._watch_readiness(readiness, client)]
            if liveness is not None:
                duties.append(self._watch_liveness(liveness, client, process))
            await asyncio.gather(*duties)

    async def _watch_readiness(self, probe: Probe | None, client: aiohttp.ClientSession) -> None:
        if probe is None:
            self._say_ready(True)
            return
        while True:
            self._say_ready(await probe.succeeds(client))
            await asyncio.sleep(probe.period)

    async def _watch_liveness(self, probe: Probe, client: aiohttp.ClientSession, process: Process) -> None:
        await probe.until_failure(client)
        await process.stop(self._grace)

    def _say_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self._changed()

    def _written(self) -> int:
        with contextlib.suppress(OSError):
            return self._log.stat().st_size
        return 0

    def _message(self, code: int, written: int) -> str:
        # The message only explains the end: if it cannot be read, the container has ended all the same.
        with contextlib.suppress(OSError):
            return self._termination.read_text(errors="replace")[:TERMINATION_BYTES]
        if code != 0 and self._spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            with contextlib.suppress(OSError), self._log.open("rb") as log:
                log.seek(max(written, self._written() - TERMINATION_BYTES // 2))
                return log.read().decode(errors="replace")
        return ""

    def _ended(self, code: int, started_at: str, message: str, *, reason: str | None = None) -> int:
        end = {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "startedAt": started_at, "finishedAt": now()}
        self.state = {"terminated": {**end, "message": message} if message else end}
        self._changed()
        return code
