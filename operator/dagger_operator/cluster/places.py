"""Limits how many runs are reconciled at the same time: few that work, so that none waits long for its turn at one processor and one API
server, and more that wait for storage, which may be far away."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass

WAITING_FOR_EACH = 3
"""Reconciles that may wait for storage, for each one that may work."""


@dataclass
class Place:
    """The place of one reconcile, from `Places.take` to `leave`."""

    _at_work: asyncio.Semaphore
    _under_way: asyncio.Semaphore
    _gave_way: bool = False

    def give_way(self) -> None:
        """Let another one work from now on. The place is not taken again afterwards: whoever waited for storage has waited enough."""
        if not self._gave_way:
            self._gave_way = True
            self._at_work.release()

    def leave(self) -> None:
        self.give_way()
        self._under_way.release()


class Places:
    def __init__(self, at_work: int) -> None:
        self._at_work = asyncio.Semaphore(at_work)
        self._under_way = asyncio.Semaphore(at_work * (1 + WAITING_FOR_EACH))

    async def take(self) -> Place:
        await self._under_way.acquire()
        await self._at_work.acquire()
        return Place(self._at_work, self._under_way)


_own: ContextVar[Place | None] = ContextVar("place", default=None)


def sit(place: Place) -> None:
    """Give the place to the calling task."""
    _own.set(place)


def give_way() -> None:
    """Give way while a reconcile waits for something slow; elsewhere this does nothing."""
    if (place := _own.get()) is not None:
        place.give_way()
