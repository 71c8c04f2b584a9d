"""One container's process, and everything it started: started, watched, ended without a trace."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

MARK = "DAGGER_CONTAINER"
"""Environment variable by which every process of a container is known, whoever its parent is by now."""


class Process:
    """A running container. What it leaves behind when its main process ends is killed, as a container runtime does."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self._process, self._mark = process, mark
        self._exited = asyncio.ensure_future(self._wait())

    @classmethod
    async def start(cls, argv: Sequence[str], environment: Mapping[str, str], *, mark: str, log: Path, folder: Path) -> Self:
        """Starts `argv` in a session of its own, output appended to `log`; OSError where it cannot be started."""
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
        return cls(process, mark)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Exit code; 128 + signal where a signal ended it."""
        return await asyncio.shield(self._exited)

    async def stop(self, grace: float) -> int:
        """SIGTERM, then SIGKILL after `grace` seconds."""
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
        await asyncio.to_thread(reap, self._mark)
        return code if code >= 0 else 128 - code


def reap(prefix: str, timeout: float = 5.0) -> int:
    """Kills every process whose mark starts with `prefix`; how many there were."""
    if not prefix:
        raise ValueError("an empty prefix would match every process of the machine")
    marked = [process for process in psutil.process_iter() if _mark(process).startswith(prefix)]
    for process in marked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(marked, timeout=timeout)
    return len(marked)


def _mark(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return ""
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""  # gone, a zombie, or another user's: none of ours
