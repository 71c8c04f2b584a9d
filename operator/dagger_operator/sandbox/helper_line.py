"""The connection from the worker to one sandbox's helper: HTTP over the pod network, or the same requests through `exec`.

A request that broke off is repeated, over the other route if the first stays silent. That is safe because every request to the helper is
idempotent: a command has a number, and a number runs once.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from typing import Protocol

import aiohttp
import structlog

from dagger_operator.kube.errors import ApiError
from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.kube import Kube
from dagger_operator.sandbox.pod_manifest import CONTAINER, HELPER, HELPER_PORT

Answer = tuple[int, bytes]
"""Status code and body."""

_CONNECT_SECONDS = 3.0
_SWITCH_SECONDS = 3.0
"""How long one route may fail before the other is tried."""
_PATIENCE_SECONDS = 60.0
"""How long both may fail before the sandbox counts as lost."""
_CLOSED_SECONDS = 600.0
_FRAME = 1 << 20


class Severed(Exception):
    """No answer arrived; whether the request arrived is unknown."""


class Way(Protocol):
    async def ask(self, method: str, path: str, body: bytes, timeout: float) -> Answer: ...

    async def close(self) -> None: ...


class Network:
    """HTTP to the helper."""

    def __init__(self, http: aiohttp.ClientSession, address: str, token: str, port: int = HELPER_PORT) -> None:
        host = f"[{address}]" if ":" in address else address
        self._http, self._base = http, f"http://{host}:{port}"
        self._headers = {"Authorization": f"Bearer {token}"}

    async def ask(self, method: str, path: str, body: bytes, timeout: float) -> Answer:
        limit = aiohttp.ClientTimeout(total=timeout, connect=_CONNECT_SECONDS)
        try:
            async with self._http.request(method, self._base + path, data=BytesIO(body), headers=self._headers, timeout=limit) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Severed(f"{self._base}: {error or type(error).__name__}") from error

    async def close(self) -> None:
        pass


class Exec:
    """`sandboxd call` in the container: each instance serves one request at a time and is reused for the next."""

    def __init__(self, kube: Kube, pod: str, token: str) -> None:
        self._kube, self._pod, self._token = kube, pod, token
        self._open = AsyncExitStack()
        self._idle: list[aiohttp.ClientWebSocketResponse] = []

    async def ask(self, method: str, path: str, body: bytes, timeout: float) -> Answer:
        request = {"method": method, "path": path, "token": self._token, "body": base64.b64encode(body).decode()}
        try:
            async with asyncio.timeout(timeout), self._connection() as socket:
                data = json.dumps(request).encode() + b"\n"
                for start in range(0, len(data), _FRAME):
                    await socket.send_bytes(b"\0" + data[start : start + _FRAME])
                return _answer(await _line(socket))
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Severed(f"exec: {error or type(error).__name__}") from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        socket = (
            self._idle.pop() if self._idle else await self._open.enter_async_context(self._kube.exec(self._pod, CONTAINER, HELPER, "call"))
        )
        try:
            yield socket
        except BaseException:
            await socket.close()  # an answer may still arrive on it
            raise
        self._idle.append(socket)

    async def close(self) -> None:
        await self._open.aclose()


async def _line(socket: aiohttp.ClientWebSocketResponse) -> bytes:
    """Return the next line of the program's output."""
    output, complaint = bytearray(), b""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.BINARY:  # above all ERROR: nobody answers any more
            raise Severed(f"exec: {message.type.name} {str(message.data)[:300]}")
        channel, data = message.data[:1], message.data[1:]
        if channel == b"\x01":
            output += data
            if output.endswith(b"\n"):
                return bytes(output)
        elif data:
            complaint = data
    raise Severed(f"exec ended: {complaint.decode(errors='replace')[:300]}")


def _answer(line: bytes) -> Answer:
    try:
        said = json.loads(line)
        return said["status"], base64.b64decode(said["body"] or "")
    except (ValueError, KeyError, TypeError) as error:
        raise Severed(f"exec: no answer but {line[:300]!r}") from error


class Routes:
    """What a worker's sandboxes learned about their routes, for the next sandboxes."""

    def __init__(self, seconds: float = _CLOSED_SECONDS) -> None:
        """`seconds`: how long the network is not retried; a network plugin that was slow with one pod's policy must not cost the rest."""
        self._seconds, self._closed_until = seconds, 0.0

    @property
    def network_closed(self) -> bool:
        return time.monotonic() < self._closed_until

    def found_closed(self, why: str) -> None:
        if not self.network_closed:
            self._closed_until = time.monotonic() + self._seconds
            structlog.get_logger().warning("the pod network does not let us reach sandboxes: commands go through exec", problem=why)


class HelperLine:
    """Repeats requests until an answer arrives."""

    def __init__(self, name: str, network: Way, through_exec: Way, routes: Routes) -> None:
        self._name, self._ways, self._routes = name, (network, through_exec), routes
        self._reached = False

    async def ask(self, method: str, path: str, body: bytes = b"", *, timeout: float) -> Answer:
        """Send a request. `timeout`: seconds until one try counts as broken off. Raises `SandboxError` after `timeout` plus a minute."""
        way, began, pause = int(self._routes.network_closed), time.monotonic(), 0.02
        silent_since, why = began, ""
        while True:
            try:
                answer = await self._ways[way].ask(method, path, body, timeout)
                if way == 1 and why and not self._reached:
                    self._routes.found_closed(why)
                self._reached = True
                return answer
            except Severed as error:
                why = str(error)
            now = time.monotonic()
            if now - began > _PATIENCE_SECONDS + timeout:
                raise SandboxError("HelperUnreachable", f"sandbox {self._name} does not answer: {why}")
            if now - silent_since > _SWITCH_SECONDS:
                way, silent_since = 1 - way, now
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def close(self) -> None:
        for way in self._ways:
            await way.close()
