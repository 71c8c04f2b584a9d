"""One turn, in progress or done. Any number of requests may read it at any time: a retry joins it or receives it again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from dagger_operator.policy.client import Answer
from dagger_operator.policy.failures import PolicyUnavailable
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.streaming import Chunk, chunks_of, finishes


class TurnDropped(Exception):
    """The session ended while this turn was under way."""


class Act:
    """A turn that is independent of the connection that asked for it: a client that disconnects neither loses nor duplicates it."""

    def __init__(self, request: ChatRequest, run: "Callable[[Act], Awaitable[Answer]]") -> None:
        self.request = request
        self.trouble: PolicyUnavailable | None = None
        """Why its request to the policy had to be retried."""
        self._chunks: list[Chunk] = []
        self._news = asyncio.Event()
        self._task: asyncio.Future[Answer] = asyncio.ensure_future(run(self))
        self._task.add_done_callback(self._ended)

    @property
    def done(self) -> bool:
        return self._task.done()

    def _ended(self, task: asyncio.Future[Answer]) -> None:
        # Retrieve the exception here because perhaps nobody awaits the task any more; the session keeps the failure.
        _ = task.cancelled() or task.exception()
        self._tell()

    def forward(self, chunk: Chunk) -> None:
        """Add a chunk of the stream as it arrives."""
        self._chunks.append(chunk)
        self._tell()

    def failing(self, why: PolicyUnavailable) -> None:
        """Record a failed try that will be followed by another."""
        self.trouble = why

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def settled(self) -> None:
        """Wait until the turn is done, successfully or not."""
        await asyncio.wait([self._task])

    async def drop(self) -> None:
        """Cancel the turn and its request to the policy."""
        self._task.cancel()
        await self.settled()

    async def answer(self) -> dict[str, Any]:
        """Return the answer. Raises what the turn failed with, or `TurnDropped`."""
        await self.settled()
        if self._task.cancelled():
            raise TurnDropped
        return self._task.result().payload

    async def stream(self) -> AsyncIterator[Chunk]:
        """Yield all chunks from the first, each as soon as it exists; the one that ends the turn only once the turn is recorded."""
        read = 0
        while True:
            while read < len(self._chunks):
                chunk = self._chunks[read]
                read += 1
                if finishes(chunk):
                    await self.answer()
                yield chunk
            if self.done and read == len(self._chunks):
                break
            news = self._news
            if not self.done:
                await news.wait()
        answer = await self.answer()
        if not read:
            for chunk in chunks_of(answer):
                yield chunk
