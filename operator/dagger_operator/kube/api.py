"""Requests to an API server: JSON in, JSON out, typed errors."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from math import inf
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio.client import Configuration

from dagger_operator.kube.connection import authorization
from dagger_operator.kube.errors import Refused, Unavailable, error_of

Manifest = dict[str, Any]

_TOTAL_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_WATCH_SECONDS = 290
_HEARTBEAT_SECONDS = 30.0
_SILENCE = aiohttp.ClientTimeout(total=None, connect=10, sock_read=320.0)


class Api:
    """All methods raise `ApiError`."""

    def __init__(self, settings: Configuration, http: aiohttp.ClientSession) -> None:
        self._settings, self._http = settings, http

    async def ask(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
        within: float = inf,
    ) -> Manifest:
        """Return the response to a request. It is sent within so many seconds, once there is a connection, or not at all; the response may
        come later."""
        doing, data = f"{verb} {path}", None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "Content-Type": content, **await authorization(self._settings)}
        timeout = aiohttp.ClientTimeout(total=_TOTAL_SECONDS, connect=min(within, _CONNECT_SECONDS))
        with _reaching(doing):
            async with self._http.request(
                verb, self._settings.host + path, params=query, data=data, headers=headers, timeout=timeout
            ) as answer:
                text = await answer.read()
        said = _read(text)
        if answer.status >= 400:
            raise error_of(doing, answer.status, said)
        return said

    async def watch(self, path: str, query: Mapping[str, str], version: str) -> AsyncIterator[tuple[str, Manifest]]:
        """Yield what happens from a resourceVersion on: (`ADDED`, `MODIFIED`, `DELETED` or `BOOKMARK`, object). Ends from time to time.

        An error with code 410 means that this version is too old: list again.
        """
        doing = f"watching {path}"
        query = {**query, "watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCH_SECONDS)}
        headers = {"Accept": "application/json", **await authorization(self._settings)}
        with _reaching(doing):
            async with self._http.get(self._settings.host + path, params=query, headers=headers, timeout=_SILENCE) as answer:
                if answer.status >= 400:
                    raise error_of(doing, answer.status, _read(await answer.read()))
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise error_of(doing, event["object"].get("code", 500), event["object"])
                    yield event["type"], event["object"]

    @asynccontextmanager
    async def websocket(self, path: str, query: list[tuple[str, str]], *protocols: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        doing, headers = f"connecting {path}", await authorization(self._settings)
        with _reaching(doing):
            async with self._http.ws_connect(
                self._settings.host + path, params=query, headers=headers, protocols=protocols, max_msg_size=0, heartbeat=_HEARTBEAT_SECONDS
            ) as socket:
                yield socket


def segment(name: str) -> str:
    """Return a name as one segment of a path, which cannot lead to another object. Raises `Refused` for names that would be resolved
    anyway."""
    if name in (".", ".."):
        raise Refused(f"naming {name!r}", 0, "InvalidName", f"{name!r} names no object: write the object's own name")
    return quote(name, safe="")


@contextmanager
def _reaching(doing: str) -> Iterator[None]:
    try:
        yield
    except aiohttp.WSServerHandshakeError as error:
        raise error_of(doing, error.status, {"message": error.message}) from error
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise Unavailable(doing, 0, "Unreachable", str(error) or type(error).__name__) from error


def _read(text: bytes) -> Manifest:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"message": text.decode(errors="replace")[:1000]}
