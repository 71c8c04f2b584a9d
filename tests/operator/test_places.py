"""How many runs are looked at at the same time."""

import asyncio
import time
from collections import Counter

from dagger_operator.cluster.places import WAITING_FOR_EACH, Places, give_way
from dagger_operator.cluster.queue import WorkQueue

AT_WORK = 2


async def _worked_on(keys: int, seconds_of_storage: float) -> Counter[str]:
    """The most looks that worked, and that were under way, until every key was looked at."""
    queue: WorkQueue[int] = WorkQueue(time.monotonic)
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()
    seen: set[int] = set()
    finished = asyncio.Event()

    def count(what: str, change: int) -> None:
        now[what] += change
        most[what] = max(most[what], now[what])

    async def look(key: int) -> float | None:
        count("under way", 1)
        count("at work", 1)
        await asyncio.sleep(0.001)
        count("at work", -1)
        if seconds_of_storage:
            give_way()
            await asyncio.sleep(seconds_of_storage)
        count("under way", -1)
        seen.add(key)
        if len(seen) == keys:
            finished.set()
        return None

    for key in range(keys):
        queue.add(key)
    running = asyncio.create_task(queue.run(look, Places(AT_WORK)))
    async with asyncio.timeout(30):
        await finished.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return most


async def test_few_work_at_the_same_time() -> None:
    assert await _worked_on(20, 0.0) == {"at work": AT_WORK, "under way": AT_WORK}


async def test_who_waits_for_storage_lets_another_work_up_to_a_bound() -> None:
    assert await _worked_on(20, 0.1) == {"at work": AT_WORK, "under way": AT_WORK * (1 + WAITING_FOR_EACH)}


async def test_to_give_way_twice_or_where_nobody_has_a_place_frees_nothing() -> None:
    give_way()
    places = Places(1)
    first = await places.take()
    first.give_way()
    first.give_way()
    second = await places.take()
    first.leave()
    third = asyncio.create_task(places.take())
    await asyncio.sleep(0.01)
    assert not third.done(), "the second one works"
    second.leave()
    (await third).leave()
