"""A queue of keys with controller-runtime's semantics: what is requested twice is done once, and no key is processed twice at a time.

A key says that something about an object should be looked at, never what happened. If events arrive while their key is being processed, it
is processed once more afterwards.
"""

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from dagger_operator.cluster.places import Place, Places, sit

K = TypeVar("K", bound=Hashable)

log = structlog.get_logger()


@dataclass(frozen=True)
class Backoff:
    """How long a key waits after consecutive failures."""

    first: float = 0.25
    """Seconds after the first failure; doubled with each further one."""
    longest: float = 60.0
    jitter: float = 0.5
    """Random share of the wait, so that keys that failed together are not retried together."""

    def seconds(self, failures: int, chance: float) -> float:
        whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 32))
        return whole * (1 - self.jitter * chance)


@dataclass
class _Entry:
    due: float | None = None
    """When it is due; None if it was not requested."""
    working: bool = False
    failures: int = 0
    last: float = float("-inf")
    """When it was last given to a worker."""


@dataclass
class WorkQueue(Generic[K]):
    """Not thread-safe; used from one event loop."""

    clock: Callable[[], float]
    """Seconds, monotonic."""
    backoff: Backoff = field(default_factory=Backoff)
    spacing: float = 0.0
    """Minimum seconds between two starts of one key: a burst of events costs one run at its beginning and one at its end."""
    chance: Callable[[], float] = random.random
    on_add: Callable[[], object] = lambda: None
    on_retry: Callable[[], object] = lambda: None
    on_take: Callable[[float], object] = lambda seconds: None
    """Callbacks for metrics; `on_take` gets the seconds from due to started."""
    _entries: dict[K, _Entry] = field(default_factory=dict)
    _heap: list[tuple[float, int, K]] = field(default_factory=list)
    _ticket: int = 0
    _finished: float = float("-inf")
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, key: K, after: float = 0.0) -> None:
        """Request `key` in `after` seconds, or earlier if that was requested already."""
        self.on_add()
        entry = self._entries.setdefault(key, _Entry())
        due = max(self.clock() + after, entry.last + self.spacing)
        if entry.due is None or due < entry.due:
            entry.due = due
            if not entry.working:
                self._push(key, due)

    def take(self) -> K | None:
        """Return a key that is due and not being processed, or None. `done` or `failed` has to follow."""
        now = self.clock()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is None or entry.working:
                continue
            if entry.due is None:
                if entry.last + self.spacing <= now:  # otherwise it was popped for an outdated time
                    del self._entries[key]  # not requested again since it was done
            elif entry.due == due:  # otherwise it was requested at another time too
                entry.due, entry.working, entry.last = None, True, now
                self.on_take(now - due)
                return key
        return None

    def done(self, key: K, *, again_after: float | None = None) -> None:
        """Record that `key` was processed successfully and is due again after so many seconds; None: when it is requested."""
        self._finish(key, failures=0, again_after=again_after)

    def failed(self, key: K) -> float:
        """Record that processing `key` failed: it is retried after the returned seconds, or earlier if it is requested."""
        self.on_retry()
        failures = self._entries[key].failures + 1
        wait = self.backoff.seconds(failures, self.chance())
        self._finish(key, failures=failures, again_after=wait)
        return wait

    def _finish(self, key: K, *, failures: int, again_after: float | None) -> None:
        entry, self._finished = self._entries[key], self.clock()
        entry.failures = failures
        if again_after is not None:
            self.add(key, again_after)
        entry.working = False
        self._push(key, entry.last + self.spacing if entry.due is None else entry.due)

    def _push(self, key: K, due: float) -> None:
        self._ticket += 1
        heapq.heappush(self._heap, (due, self._ticket, key))
        self._changed.set()

    @property
    def depth(self) -> int:
        """Keys that could be processed now."""
        return len(self._waits())

    @property
    def oldest(self) -> float:
        """Seconds for which the longest-waiting key has been due; 0 if none is."""
        return max(self._waits(), default=0.0)

    @property
    def standstill(self) -> float:
        """Seconds for which a key has been due while nothing was finished: a long queue is slow, one that finishes nothing is stuck."""
        return min(self.oldest, self.clock() - self._finished)

    @property
    def longest(self) -> float:
        """Seconds for which the key that has been processed for longest has been so; 0 if none is."""
        return max((self.clock() - entry.last for entry in self._entries.values() if entry.working), default=0.0)

    def _waits(self) -> list[float]:
        now = self.clock()
        return [now - entry.due for entry in self._entries.values() if not entry.working and entry.due is not None and entry.due <= now]

    async def run(self, work: Callable[[K], Awaitable[float | None]], places: Places) -> None:
        """Process keys until cancelled, whenever there is a place. `work` returns the seconds after which the key is due again."""
        async with asyncio.TaskGroup() as group:
            while True:
                place = await places.take()
                group.create_task(self._work(await self._next(), work, place))

    async def _work(self, key: K, work: Callable[[K], Awaitable[float | None]], place: Place) -> None:
        sit(place)
        try:
            again_after = await work(key)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            wait = self.failed(key)
            log.warning("failed, to be tried again", key=key, error=repr(error), seconds=round(wait, 1))
        else:
            self.done(key, again_after=again_after)
        finally:
            place.leave()

    async def _next(self) -> K:
        while True:
            self._changed.clear()
            if (key := self.take()) is not None:
                return key
            wait = None if not self._heap else max(0.0, self._heap[0][0] - self.clock())
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                pass
