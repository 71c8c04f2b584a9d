"""Checks that a store honours conditional writes: many writers race for the same objects, and the answers are compared with the content.

Some S3-compatible servers accept `If-None-Match` and `If-Match` and then ignore them, or check them and write later; rollouts and
rounds would then be lost or duplicated silently.
"""

import asyncio
import json
import random
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dagger_operator.store import layout
from dagger_operator.store.objects import Object, Store, StoreUnavailable
from dagger_operator.store.stage import StageFailure

T = TypeVar("T")
_THROTTLED = "429 Too Many Requests"
"""Quoted by the client's error."""
_PAUSE_SECONDS = 2.0
"""Mean wait after a write for which the store was still too busy when the client gave up."""
_PAUSES = 20
"""Consecutive waits of one writer. With one write a second, everyone in a race of eight has its turn long before."""


@dataclass(frozen=True)
class CheckReport:
    """Results of the races."""

    url: str
    races: int
    """Objects that all writers raced to create."""
    doubled: int
    """Races that did not have exactly one winner, or whose object is not the winner's."""
    updates: int
    """Acknowledged compare-and-swap updates of one counter."""
    lost: int
    """Acknowledged updates that are missing from the counter."""
    ignored: int
    """Conditional writes that should have been refused and were not."""
    missing: int
    """Objects that were written but were not listed right afterwards."""
    round_trip_seconds: float
    """Median time of one small read."""

    @property
    def honest(self) -> bool:
        """Whether conditional writes hold and listings are current."""
        return not (self.doubled or self.lost or self.ignored or self.missing)

    def __str__(self) -> str:
        found = [
            (self.ignored, "writes went through although their condition did not hold: the server ignores If-None-Match or If-Match"),
            (self.doubled, f"of {self.races} races to create an object had not exactly one winner"),
            (self.lost, f"of {self.updates} acknowledged updates were overwritten by a rival"),
            (self.missing, "objects were written but not listed right after: listings lag behind"),
        ]
        if self.honest:
            return (
                f"{self.url} honours conditional writes: {self.races} races with one winner each, {self.updates} updates and none lost; "
                f"{self.round_trip_seconds * 1000:.1f} ms for a read"
            )
        wrong = "\n".join(f"- {count} {words}" for count, words in found if count)
        return (
            f"{self.url} does not honour conditional writes, so rollouts would be lost or doubled:\n{wrong}\n"
            "Use a store that does (S3, GCS, Azure Blob Storage, versitygw 1.8.0 or newer, a local folder), or a newer version of this one."
        )


async def check(store: Store, *, rounds: int = 20, writers: int = 8) -> CheckReport:
    """Race `writers` concurrent writers `rounds` times, in a new folder that is empty afterwards."""
    folder = layout.check(uuid.uuid4().hex)
    try:
        ignored = await _refused_in_quiet(store, f"{folder}quiet.json")
        doubled = sum([await _race(store, f"{folder}race-{number}.json", writers) for number in range(rounds)])
        updates, lost = await _count(store, f"{folder}counter.json", rounds, writers)
        listed = len(await store.list(folder))
        return CheckReport(
            url=store.url,
            races=rounds,
            doubled=doubled,
            updates=updates,
            lost=lost,
            ignored=ignored,
            missing=max(0, rounds + 2 - listed),
            round_trip_seconds=await _round_trip(store, f"{folder}counter.json"),
        )
    finally:
        await asyncio.gather(*(store.delete(info.key) for info in await store.list(folder)))


async def require_honest(store: Store) -> CheckReport:
    """Run a quick check at the start of a run. Raises `StageFailure("StorageNotHonest")`, permanent, if conditional writes are lost."""
    report = await check(store, rounds=3, writers=6)
    if not report.honest:
        raise StageFailure("StorageNotHonest", str(report))
    return report


async def _refused_in_quiet(store: Store, key: str) -> int:
    """Return how many writes with a false condition succeed without a rival: a server that knows the headers refuses them all."""
    first = await _patiently(lambda: store.swap(key, b'"first"', None))
    if first is None:
        return 1
    second = await _patiently(lambda: store.swap(key, b'"second"', first))
    return sum(
        [
            second is None,
            await _patiently(lambda: store.create(key, b'"created again"')),
            await _patiently(lambda: store.swap(key, b'"from a stale state"', first)) is not None,
        ]
    )


async def _patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Repeat a write that the store throttles: the client gives up after some seconds, and GCS takes one write per second to an object."""
    for _ in range(_PAUSES):
        try:
            return await write()
        except StoreUnavailable as busy:
            if _THROTTLED not in str(busy):
                raise
        await asyncio.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)  # noqa: S311 - spreads load, guards nothing
    return await write()


async def _race(store: Store, key: str, writers: int) -> bool:
    """Whether a race to create one object went wrong."""

    async def write(writer: int) -> bool:
        return await _patiently(lambda: store.create(key, json.dumps({"writer": writer}).encode()))

    won = await asyncio.gather(*map(write, range(writers)))
    there = await store.get(key)
    winners = [writer for writer, mine in enumerate(won) if mine]
    return there is None or winners != [there.json()["writer"]]


async def _count(store: Store, key: str, rounds: int, writers: int) -> tuple[int, int]:
    """Return the number of acknowledged updates of a counter, and how many of them are missing from it."""
    await _patiently(lambda: store.create(key, b"[]"))

    async def update(names: list[str], there: Object) -> bool:
        return await _patiently(lambda: store.swap(key, json.dumps(names).encode(), there)) is not None

    async def add(writer: int) -> list[str]:
        acknowledged = []
        for number in range(rounds):
            there = await store.get(key)
            if there is None:
                continue
            mine = f"{writer}.{number}"
            if await update([*there.json(), mine], there):
                acknowledged.append(mine)
        return acknowledged

    acknowledged = [mine for names in await asyncio.gather(*map(add, range(writers))) for mine in names]
    there = await store.get(key)
    kept = set(there.json()) if there is not None else set()
    return len(acknowledged), len(set(acknowledged) - kept)


async def _round_trip(store: Store, key: str) -> float:
    times = []
    for _ in range(9):
        started = time.perf_counter()
        await store.get(key)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
