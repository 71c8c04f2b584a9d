"""One sandbox that is a pod."""

import asyncio
import base64
import json
import posixpath
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox import shell
from dagger_operator.sandbox.archive import archive
from dagger_operator.sandbox.helper_line import HelperLine
from dagger_operator.sandbox.interface import CommandResult, LimitExceeded, SandboxError, SandboxRequest
from dagger_operator.sandbox.pod_state import PodState

T = TypeVar("T")

_POLL_SECONDS = 30.0
_GRACE_SECONDS = 30.0
"""How long after its deadline a command may take to end, and one try of a request to be answered."""
_FILE_SECONDS = 60.0


class PodSandbox:
    """Implements `Sandbox`; created by `PodSandboxes`. Commands run one after the other, in the order in which they were requested."""

    def __init__(
        self,
        request: SandboxRequest,
        limits: SandboxLimits,
        line: HelperLine,
        lost: asyncio.Future[PodState],
        end: Callable[[], Awaitable[None]],
    ) -> None:
        """`lost` is done when the pod has ended; `end` deletes the pod."""
        self._request, self._limits, self._line, self._lost, self._end = request, limits, line, lost, end
        self._commands = asyncio.Lock()
        self._number = 0
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def prepare(self) -> None:
        """Create the working directory and write the request's files."""
        await self._put(archive({self._path(path): text for path, text in self._request.files.items()}, [self._request.workdir]))

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        """Run a shell command; see `Sandbox`. What it leaves in the background is killed with it."""
        encoded = command.encode("utf-8", "replace")
        if answer := shell.refused(encoded):
            return answer
        body = {
            "command": encoded.decode(),
            "workdir": self._request.workdir,
            "timeout_seconds": timeout,
            "env": {**self._request.env, **(env or {})},
            "output_limit_bytes": self._limits.output_kib << 10,
        }
        async with self._commands:
            self._number += 1
            number = self._number
            try:
                found = await self._while_alive(self._run(number, json.dumps(body).encode("utf-8", "replace"), timeout))
            except asyncio.CancelledError:
                await self._cancel(number)
                raise
        if why := found.get("failed"):
            raise SandboxError("CannotRun", f"sandbox {self._request.name}: {why}")
        head, tail = (base64.b64decode(found[part] or "") for part in ("head", "tail"))
        return shell.ended(
            (head, tail, found["dropped_bytes"]),
            found["exit_code"],
            timed_out=found["timed_out"],
            stopped=found.get("stopped"),
            seconds=found["seconds"],
            timeout=timeout,
            limits=self._limits,
        )

    async def write(self, files: dict[str, str]) -> None:
        """Write text files with the rights of commands; a link in a file's place is replaced, not followed."""
        await self._put(archive({self._path(path): text for path, text in files.items()}))

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file's first bytes."""
        query = f"/files?path={quote(self._path(path), safe='')}&limit={limit}"
        status, data = await self._while_alive(self._line.ask("GET", query, timeout=_FILE_SECONDS))
        if status not in (200, 404):
            raise self._odd("reading a file", status, data)
        return data if status == 200 else None

    async def close(self) -> None:
        """Delete the pod, and with it everything that runs there."""
        if not self._closed.done():
            self._closed.set_result(None)
        await self._line.close()
        await self._end()

    def _path(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._request.workdir, path))

    async def _put(self, packed: bytes) -> None:
        status, said = await self._while_alive(self._line.ask("PUT", "/files", packed, timeout=_FILE_SECONDS))
        if status == 422:
            raise SandboxError("WriteFailed", f"sandbox {self._request.name}: {said.decode(errors='replace')[:500].strip()}")
        if status != 200:
            raise self._odd("writing files", status, said)

    async def _run(self, number: int, body: bytes, timeout: float) -> dict[str, Any]:
        """Start a command and wait for its result; a broken connection is harmless, since a number runs only once."""
        deadline, method = time.monotonic() + timeout + _GRACE_SECONDS, "PUT"
        while (left := deadline - time.monotonic()) > 0:
            wait = min(_POLL_SECONDS, left)
            path = f"/commands/{number}?wait={wait:.1f}"
            status, answer = await self._line.ask(method, path, body if method == "PUT" else b"", timeout=wait + _GRACE_SECONDS)
            if status == 200:
                return dict(json.loads(answer))
            if status != 202:
                raise self._odd(f"command {number}", status, answer)
            method = "GET"
        raise SandboxError(
            "Unresponsive", f"sandbox {self._request.name}: command {number} is not over {_GRACE_SECONDS:g} s after its deadline"
        )

    async def _cancel(self, number: int) -> None:
        """Stop a command, even if this task is cancelled again meanwhile. If that fails, closing the sandbox stops it."""

        async def cancel() -> None:
            with suppress(SandboxError):
                await self._while_alive(self._line.ask("DELETE", f"/commands/{number}", timeout=_GRACE_SECONDS))

        task = asyncio.create_task(cancel())
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(task)

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Await an answer from the helper. Raises `SandboxError` as soon as the pod is known to be gone, or was closed."""
        task = asyncio.ensure_future(work)
        try:
            ends: set[asyncio.Future[Any]] = {task, self._lost, self._closed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._closed.done():
                raise SandboxError("Closed", f"sandbox {self._request.name} is closed")
            if not task.done():
                state = self._lost.result()
                kind = LimitExceeded if state.exceeded else SandboxError
                raise kind(state.reason, f"sandbox {self._request.name}: {state.message}")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def _odd(self, doing: str, status: int, answer: bytes) -> SandboxError:
        return SandboxError(
            "HelperRefused", f"sandbox {self._request.name}: {doing}: HTTP {status}: {answer.decode(errors='replace')[:300]}"
        )
