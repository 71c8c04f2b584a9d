"""Controls which requests reach vLLM: none while weights change; each admitted request is counted until it is done."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class GateClosed(Exception):
    """No request is admitted now."""


class Gate:
    """Open for one version at a time: a request admitted while it is open is answered by that version."""

    def __init__(self) -> None:
        self._version: str | None = None
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def version(self) -> str | None:
        """The version that answers now; None while closed."""
        return self._version

    @property
    def inside(self) -> int:
        """Number of requests in progress."""
        return self._inside

    @contextmanager
    def passing(self) -> Iterator[str]:
        """Admit one request; yields the version that answers it. Raises `GateClosed`."""
        if self._version is None:
            raise GateClosed
        self._inside += 1
        self._empty.clear()
        try:
            yield self._version
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def open(self, version: str) -> None:
        self._version = version

    def close(self) -> None:
        self._version = None

    async def drained(self) -> None:
        """Wait until no request is in progress."""
        await self._empty.wait()
