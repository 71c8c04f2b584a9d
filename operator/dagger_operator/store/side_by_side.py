"""Digests and transfers files a few at a time: a single one saturates neither the network nor the processors."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 4
"""Each may hold four parts of 16 MiB in memory, and the smallest container that moves weights requests 512 MiB."""


async def each(items: Iterable[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Do the work for every item, at most `AT_ONCE` at a time.

    After a failure no further item is started. The exception is raised unchanged once the work in progress has ended: a retry must not
    meet a thread that still writes the same file.
    """
    waiting = deque(items)

    async def one_after_the_other() -> None:
        while waiting:
            try:
                await work(waiting.popleft())
            except Exception:
                waiting.clear()
                raise

    for outcome in await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)), return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
