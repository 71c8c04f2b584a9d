"""One sandbox of local processes."""

import asyncio
import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from dagger_operator.sandbox import filesystem, relay, shell
from dagger_operator.sandbox.archive import archive
from dagger_operator.sandbox.command import Ended, run
from dagger_operator.sandbox.interface import CommandResult, SandboxError, SandboxRequest
from dagger_operator.sandbox.launch import Launcher, stdin_of
from dagger_operator.sandbox.usage import DISK_SECONDS, MOST_FILES, DiskMeter, Paced, ProcessTable, ProcessUse

_TICK_SECONDS = 0.1
"""How often a running command is checked."""
_DISK_SLACK = 16 << 20
"""How much a sandbox that is already full may grow: cleaning up needs a little space."""
_OWN_PROCESSES = 2
"""bubblewrap's own, beside the command's."""
_FILE_SECONDS = 60.0
_NO_FILE = 44


class ProcessSandbox:
    """Implements `Sandbox`; created by `ProcessSandboxes`."""

    def __init__(
        self, request: SandboxRequest, launcher: Launcher, processes: ProcessTable, forget: Callable[["ProcessSandbox"], None]
    ) -> None:
        self._request = request
        self._launcher = launcher
        self._processes = processes
        self._forget = forget
        self._closed = False
        self._running: set[asyncio.Task[Ended]] = set()
        self._disk = DiskMeter(launcher.folder, launcher.limits.disk_mib << 20)
        self._oom_kills = 0

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        """Run a shell command; see `Sandbox`. What it leaves in the background is killed with it."""
        encoded = command.encode("utf-8", "replace")
        if answer := shell.refused(encoded):
            return answer
        ended = await self._run(["bash", "-c", encoded], timeout=timeout, env=env, keep=self._launcher.limits.output_kib << 10)
        return self._result(ended, timeout)

    async def write(self, files: dict[str, str]) -> None:
        """Write text files from inside the sandbox, so that no link planted there leads out of it."""
        packed = archive({self._path(path): text for path, text in files.items()})
        ended = await self._run(
            ["tar", "-x", "-m", "-C", self._root, "--no-same-owner", "-f", "-"], timeout=_FILE_SECONDS, keep=4096, stdin=packed
        )
        if ended.returncode != 0 or ended.timed_out:
            raise SandboxError("WriteFailed", f"writing {', '.join(list(files)[:5])}: {ended.output.text()[:500].strip()}")

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file's first bytes, read from inside the sandbox."""
        script = f'[ -f "$1" ] || exit {_NO_FILE}; exec head -c "$2" -- "$1"'
        inside = posixpath.normpath(posixpath.join(self._root, self._path(path).lstrip("/")))
        # Keep twice the limit for a file that just fits: head and tail are kept in halves.
        ended = await self._run(["bash", "-c", script, "read", inside, str(limit)], timeout=_FILE_SECONDS, keep=2 * limit + 2)
        if ended.timed_out:
            raise SandboxError("ReadTimeout", f"reading {path} took longer than {_FILE_SECONDS:g} s")
        return b"".join(ended.output.parts()) if ended.returncode == 0 else None

    async def close(self) -> None:
        """Stop what runs and remove everything."""
        self._closed = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.to_thread(self._remove)
        self._forget(self)

    def _remove(self) -> None:
        if not self._launcher.isolation.bubblewrap:
            filesystem.end_processes_in(self._launcher.folder)
        filesystem.remove(self._launcher.folder)
        if self._launcher.cgroup:
            self._launcher.cgroup.remove()

    @property
    def _root(self) -> str:
        """The sandbox's `/` as its commands see it: without namespaces, its folder."""
        return "/" if self._launcher.isolation.bubblewrap else str(self._launcher.folder)

    def _path(self, path: str) -> str:
        """Return an absolute path in the sandbox."""
        path = posixpath.normpath(posixpath.join(self._request.workdir, path))
        if self._launcher.isolation.bubblewrap:
            return path
        folders = {self._request.workdir: "/work", "/tmp": "/tmp", filesystem.HOME: "/home"}  # noqa: S108 - as seen from inside
        for inside, outside in folders.items():
            if path == inside or path.startswith(f"{inside}/"):
                return outside + path.removeprefix(inside)
        raise SandboxError("InvalidPath", f"{path}: without namespaces there are only {', '.join(folders)}")

    async def _run(
        self,
        argv: Sequence[str | bytes],
        *,
        timeout: float,
        keep: int,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> Ended:
        """Run `argv` in its own task, which `close` can end."""
        if self._closed:
            raise SandboxError("Closed", f"sandbox {self._request.name} is closed")
        task = asyncio.create_task(self._start(argv, {**self._request.env, **(env or {})}, timeout, keep, stdin))
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            if current.cancelling():
                raise
            raise SandboxError("Closed", f"sandbox {self._request.name} was closed while a command ran") from None
        finally:
            self._running.discard(task)

    async def _start(self, argv: Sequence[str | bytes], env: Mapping[str, str], timeout: float, keep: int, stdin: bytes | None) -> Ended:
        async with AsyncExitStack() as stack:
            inherit: tuple[int, ...] = ()
            if self._request.network_to is not None and self._launcher.isolation.bubblewrap:
                door = await stack.enter_async_context(relay.door(self._request.network_to))
                argv, inherit = door.wrap(argv), (door.fd,)
            start = stack.enter_context(self._launcher.start(argv, env, writable=not self._disk.full, inherit=inherit))
            source = stack.enter_context(stdin_of(stdin))
            watch = partial(self._watch, given=len(stdin or b""))
            ended = await run(start, timeout=timeout, keep=keep, watch=watch, stdin=source)
            out_of_memory = self._out_of_memory()
            if not (start.reached() or ended.timed_out or ended.stopped or out_of_memory):
                raise SandboxError(
                    "Lost", f"sandbox {self._request.name}: {ended.output.text()[-500:].strip() or 'its namespaces ended early'}"
                )
        # A command that found the disk full may just have made room.
        await self._disk.measure(anew=self._disk.full)
        return replace(ended, stopped=ended.stopped or out_of_memory)

    async def _watch(self, pid: int, *, given: int) -> str:
        """Monitor a command that runs longer than a moment; return the limit it exceeds. `given`: bytes of its input, our memfd."""
        limits, ceiling = self._launcher.limits, max(self._launcher.limits.disk_mib << 20, self._disk.used + _DISK_SLACK)
        memory = (limits.memory_mib << 20) + given
        sampled = self._launcher.cgroup is None or not self._launcher.isolation.counts_processes
        processes = Paced(0.0 if sampled else DISK_SECONDS, ProcessUse())
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            use = await processes.look(partial(self._processes.below, pid, memory))
            if sampled and use.memory > memory:
                return f"more than {limits.memory_mib} MiB of memory"
            if sampled and use.processes > limits.processes + _OWN_PROCESSES:
                return f"more than {limits.processes} processes"
            if use.hidden and self._launcher.isolation.bubblewrap:  # otherwise sudo is hidden, too, and those commands are trusted
                return "a process that nobody can look into"
            if use.files > MOST_FILES:
                return f"more than {MOST_FILES} open files"
            if await self._disk.measure() + use.unlinked > ceiling:
                return f"more than {limits.disk_mib} MiB of disk"

    def _out_of_memory(self) -> str | None:
        """Return the exceeded limit if the kernel has killed a process for memory since the last call, or None."""
        if self._launcher.cgroup is None or (kills := self._launcher.cgroup.oom_kills()) == self._oom_kills:
            return None
        self._oom_kills = kills
        return f"more than {self._launcher.limits.memory_mib} MiB of memory"

    def _result(self, ended: Ended, timeout: float) -> CommandResult:
        """Return what the agent sees; a limit that was hit is named at the end of the output."""
        limits = self._launcher.limits
        result = shell.ended(
            (*ended.output.parts(), ended.output.dropped),
            ended.returncode,
            timed_out=ended.timed_out,
            stopped=ended.stopped,
            seconds=ended.seconds,
            timeout=timeout,
            limits=limits,
        )
        if not self._disk.full:
            return result
        full = f"\n[disk full: {limits.disk_mib} MiB are used up; no file can grow until some are removed]\n"
        return replace(result, output=result.output + full)
