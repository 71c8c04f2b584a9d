"""Runs one command to completion: with a deadline, output bounded while it is read, nothing inherited and nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.shell import joined

_GRACE_SECONDS = 5.0
"""How long a killed process may take to vanish; that depends on the kernel alone."""


class BoundedOutput:
    """Head and tail of a stream, in constant memory; the middle is counted and dropped on arrival."""

    def __init__(self, limit: int) -> None:
        self._head_size = limit // 2
        self._tail_size = limit - self._head_size
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0
        """Bytes received."""

    def feed(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_size - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._tail_size + 65536:
            del self._tail[: -self._tail_size]

    @property
    def dropped(self) -> int:
        """Bytes dropped from the middle."""
        return max(0, self.total - self._head_size - self._tail_size)

    def parts(self) -> tuple[bytes, bytes]:
        """Return what was kept of the beginning and of the end; together the whole stream if nothing was dropped."""
        return bytes(self._head), bytes(self._tail[-self._tail_size :])

    def text(self) -> str:
        """Return it as text, with a marker in place of what was dropped."""
        return joined(*self.parts(), self.dropped)


Argv = list[str | bytes]


@dataclass(frozen=True)
class Start:
    """What to start, its environment and working directory, and the descriptors that it inherits."""

    argv: Argv
    env: Mapping[str, str]
    cwd: Path
    pass_fds: tuple[int, ...] = ()
    status: int | None = None
    """A pipe on which bubblewrap reports how the command ended."""

    def reached(self) -> bool:
        """Whether the command itself ran to its end; False if bubblewrap failed before or was lost."""
        if self.status is None:
            return True
        with suppress(BlockingIOError):
            return any("exit-code" in json.loads(line) for line in os.read(self.status, 65536).splitlines())
        return False


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    output: BoundedOutput
    returncode: int
    """Exit code, or 128 + the signal that killed it."""
    timed_out: bool
    stopped: str | None
    """The limit that the watch found exceeded, if any."""
    seconds: float


Watch = Callable[[int], Coroutine[None, None, str]]
"""Takes a process id; returns the limit that is exceeded as soon as one is, otherwise never returns."""


async def run(
    start: Start,
    *,
    timeout: float,
    keep: int,
    watch: Watch,
    stdin: int = subprocess.DEVNULL,
) -> Ended:
    """Run a command in its own process group; when this returns or is cancelled, the whole group is dead.

    `keep` is how many bytes of output are kept, `stdin` a file descriptor (a memfd needs no feeding). Raises `SandboxError`
    if the program cannot be started or does not die.
    """
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    try:
        process = _popen(start, stdin)
    except OSError as error:
        raise SandboxError("CannotStart", f"{start.argv[0]!r} cannot be started: {error}") from error
    assert process.stdout is not None
    pipe, output = process.stdout.fileno(), BoundedOutput(keep)
    exited, eof, below = loop.create_future(), loop.create_future(), dict[int, asyncio.Future[None]]()
    os.set_blocking(pipe, False)

    def read() -> None:
        with suppress(BlockingIOError):
            if data := os.read(pipe, 65536):
                output.feed(data)
            else:
                loop.remove_reader(pipe)
                eof.set_result(None)

    pidfd = _notice(process.pid, exited)
    loop.add_reader(pipe, read)
    watching = asyncio.create_task(watch(process.pid))
    try:
        await asyncio.wait({exited, watching}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        stopped = watching.result() if watching.done() and not exited.done() else None
        timed_out = not exited.done() and stopped is None
    finally:
        watching.cancel()
        # bubblewrap's child is the first process of a namespace: the kernel ends all others in it with it, whatever their process group.
        children = [] if start.status is None else _children(process.pid)
        # Even if the leader has ended by itself: what it left in the background must not outlive it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with suppress(OSError):  # it is gone, or no descriptor is left to wait with
                end = loop.create_future()
                below[_notice(child, end)] = end
        try:
            await _undisturbed(_gone(exited, eof, below.values()))
        finally:
            for descriptor in (pidfd, *below):
                loop.remove_reader(descriptor)
                os.close(descriptor)
            loop.remove_reader(pipe)
            process.stdout.close()
            returncode = process.poll()
    if returncode is None:
        raise SandboxError("Unkillable", f"process {process.pid} did not die {_GRACE_SECONDS:g} s after SIGKILL")
    return Ended(output, returncode if returncode >= 0 else 128 - returncode, timed_out, stopped, time.monotonic() - started)


def _notice(pid: int, end: asyncio.Future[None]) -> int:
    """Set `end` when a process ends, until the returned descriptor is closed."""
    loop, pidfd = asyncio.get_running_loop(), os.pidfd_open(pid)

    def ended() -> None:
        loop.remove_reader(pidfd)
        end.set_result(None)

    loop.add_reader(pidfd, ended)
    return pidfd


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []  # it ended meanwhile


async def _gone(exited: asyncio.Future[None], eof: asyncio.Future[None], below: Iterable[asyncio.Future[None]]) -> None:
    """Wait for a killed process and its children to vanish, and for their last output."""
    await asyncio.wait({exited, *below}, timeout=_GRACE_SECONDS)
    if exited.done():
        # A process that escaped the group may hold the pipe open; do not wait for it.
        await asyncio.wait({eof}, timeout=0.2)


async def _undisturbed(work: Coroutine[None, None, None]) -> None:
    """Await `work` to its end even if this task is cancelled meanwhile; the cancellation is then raised."""
    task, disturbed = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            disturbed = error
    if disturbed is not None:
        raise disturbed


def _popen(start: Start, stdin: int) -> subprocess.Popen[bytes]:
    """Start a process, by vfork so that the cost does not grow with the worker's size."""
    return subprocess.Popen(
        start.argv,
        env=start.env,
        cwd=start.cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=start.pass_fds,
        start_new_session=True,
        bufsize=0,
    )
