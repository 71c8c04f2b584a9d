"""One turn under way or done. Any number of requests may read it, at any time: a retry joins it or gets it again."""

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
    """A turn that lives apart from the connection that asked for it: a client that goes away neither loses nor doubles it."""

    def __init__(self, request: ChatRequest, run: "Callable[[Act], Awaitable[Answer]]") -> None:
        self.request = request
        self.trouble: PolicyUnavailable | None = None
        """Why its request to the policy had to be tried again."""
        self._chunks: list[Chunk] = []
        self._news = asyncio.Event()
        self._task: asyncio.Future[Answer] = asyncio.ensure_future(run(self))
        self._task.add_done_callback(self._ended)

    @property
    def done(self) -> bool:
        return self._task.done()

    def _ended(self, task: asyncio.Future[Answer]) -> None:
        # Looked at here because perhaps nobody waits for it any more; the session keeps what failed.
        _ = task.cancelled() or task.exception()
        self._tell()

    def forward(self, chunk: Chunk) -> None:
        """Takes a chunk of the stream as it arrives."""
        self._chunks.append(chunk)
        self._tell()

    def failing(self, why: PolicyUnavailable) -> None:
        """Takes note of a try that failed and is followed by another."""
        self.trouble = why

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def settled(self) -> None:
        """Waits until the turn is done, whatever became of it."""
        await asyncio.wait([self._task])

    async def drop(self) -> None:
        """Cancels the turn and its request to the policy."""
        self._task.cancel()
        await self.settled()

    async def answer(self) -> dict[str, Any]:
        """The answer. Raises what the turn failed with, or `TurnDropped`."""
        await self.settled()
        if self._task.cancelled():
            raise TurnDropped
        return self._task.result().payload

    async def stream(self) -> AsyncIterator[Chunk]:
        """The chunks from the first on, each as soon as it is there; the one that ends the turn only when the turn is recorded."""
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
