"""What a stage left in the store."""

import asyncio
from collections.abc import Callable

from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Store
from dagger_operator.store.records import Trajectory
from dagger_operator.store.results import RolloutResult, read_result
from dagger_operator.store.trajectories import read_trajectories


async def trajectories(store: Store, kind: Kind = Kind.ROLLOUT) -> list[Trajectory]:
    return [trajectory async for trajectory in read_trajectories(store, 1, kind)]


async def result_of(store: Store) -> RolloutResult:
    result = await read_result(store, 1, RolloutResult)
    assert result is not None
    return result


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)
