"""What kopf's requests reveal about its watches: that each of them is alive, and when a list was read again.

kopf does not expose bookmarks and relists; its requests are observed from outside, by a trace of its HTTP session.
"""

import time
from collections.abc import Callable, Collection
from types import SimpleNamespace

import aiohttp
from yarl import URL


class Streams:
    def __init__(self, listed: Callable[[str, str | None, float], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`listed(plural, namespace, began)` is called when a list, begun at that time, was read to its end while objects were already
        known."""
        self._listed, self._clock = listed, clock
        self._expected: set[tuple[str, str | None]] = set()
        self._since = 0.0
        """When they were first expected."""
        self._opened: dict[tuple[str, str | None], float] = {}
        self._lists: dict[tuple[str, str | None], float] = {}
        self.trace = aiohttp.TraceConfig()
        self.trace.on_request_start.append(self._on_start)
        self.trace.on_request_end.append(self._on_end)

    def expect(self, plurals: Collection[str], namespaces: Collection[str]) -> None:
        """Set the streams that have to be alive from now on."""
        self._since = self._clock()
        self._expected = {(plural, namespace) for plural in plurals for namespace in (*namespaces,) or (None,)}

    @property
    def waiting(self) -> list[str]:
        """Streams that have not been opened yet."""
        return sorted(_name(one) for one in self._expected - self._opened.keys())

    @property
    def open(self) -> bool:
        """Whether all were opened once."""
        return bool(self._expected) and not self.waiting

    @property
    def silence(self) -> float:
        """Seconds since the least recently opened stream gave its last sign of life; for one whose list was not yet read to its end, since
        it was expected. 0 if none is expected."""
        if not self._expected:
            return 0.0
        return self._clock() - min(self._opened.get(one, self._since) for one in self._expected)

    async def _on_start(self, session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestStartParams) -> None:
        stream = self._of(params.url)
        if stream is None or params.method != "GET":
            return
        if "watch" not in params.url.query:
            if "continue" not in params.url.query:
                self._lists[stream] = self._clock()
        elif (began := self._lists.pop(stream, None)) is not None:
            self._listed(*stream, began)

    async def _on_end(self, session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestEndParams) -> None:
        stream = self._of(params.url)
        if stream is not None and "watch" in params.url.query and params.response.status == 200:
            self._opened[stream] = self._clock()

    def _of(self, url: URL) -> tuple[str, str | None] | None:
        """Return the stream that a request belongs to: `/apis/batch/v1/jobs`, `/api/v1/namespaces/lab/pods`."""
        parts = url.path.strip("/").split("/")
        stream = (parts[-1], parts[-2] if len(parts) > 2 and parts[-3] == "namespaces" else None)
        return stream if stream in self._expected else None


def _name(stream: tuple[str, str | None]) -> str:
    plural, namespace = stream
    return f"{plural} in {namespace}" if namespace else plural
