"""One container's process and everything it started: start it, watch it, stop it without a trace."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

MARK = "DAGGER_CONTAINER"
"""Environment variable that identifies every process of a container, even if it has been reparented."""


class Process:
    """A running container. What is left when its main process ends is killed, as a container runtime does."""

    def __init__(self, process: asyncio.subprocess.Process, reach: "Reach") -> None:
        self._process, self._reach = process, reach
        self._exited = asyncio.ensure_future(self._wait())

    @classmethod
    async def start(cls, argv: Sequence[str], environment: Mapping[str, str], *, mark: str, log: Path, folder: Path) -> Self:
        """Start `argv` in its own session, output appended to `log`; raises OSError if it cannot be started."""
        # The child must not outlive a supervisor that is killed with -9.
        prefix = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *argv,
                env={**environment, MARK: mark},
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(process, Reach(mark, log))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code; 128 + signal if a signal ended it."""
        return await asyncio.shield(self._exited)

    async def stop(self, grace: float) -> int:
        """Send SIGTERM, then SIGKILL after `grace` seconds; return the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            return await self.wait()

    async def _wait(self) -> int:
        code = await self._process.wait()
        await asyncio.to_thread(reap, self._reach)
        return code if code >= 0 else 128 - code


@dataclass(frozen=True)
class Reach:
    """Distinguishes the processes of a run, a pod or a container from all others, without keeping track of them."""

    mark: str
    """Prefix of their marks."""
    logs: Path
    """Folder or log that their output goes to: a program that renames itself may overwrite its environment, including the mark."""

    def holds(self, process: psutil.Process) -> bool:
        """Whether `process` is one of them."""
        if process.pid == os.getpid():
            return False
        with contextlib.suppress(psutil.Error, OSError):  # gone, a zombie, or another user's: none of ours
            if process.environ().get(MARK, "").startswith(self.mark):
                return True
        return any(self._writes(process.pid, descriptor) for descriptor in (1, 2))

    def _writes(self, pid: int, descriptor: int) -> bool:
        try:
            target = Path(f"/proc/{pid}/fd/{descriptor}").readlink()
        except OSError:
            return False
        return target.is_relative_to(self.logs)


def reap(reach: Reach, *, older_than: float | None = None, timeout: float = 5.0) -> int:
    """Kill every process within reach, or only those older than a Unix time; return how many there were."""
    found = [process for process in psutil.process_iter(["create_time"]) if reach.holds(process)]
    if older_than is not None:
        found = [process for process in found if process.info["create_time"] < older_than]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=timeout)
    return len(found)
