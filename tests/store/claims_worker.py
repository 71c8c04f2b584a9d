"""A worker as a process of its own: claims, works a little, writes; ends when every rollout is finished."""

import asyncio
import json
import os
import random
import sys
from pathlib import Path

from dagger_operator.api import Storage
from dagger_operator.store.claims import Claims, LeaseLost
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Store
from dagger_operator.store.records import Outcome, Trajectory
from dagger_operator.store.trajectories import finished, write_trajectory


async def main(storage: str, worker: str, ids: str, journal: str) -> None:
    store = Store.open(Storage.model_validate_json(storage))
    claims = Claims(store, 1, Kind.ROLLOUT, worker, lease_seconds=1.5)
    while missing := set(json.loads(ids)) - await finished(store, 1, Kind.ROLLOUT):
        await asyncio.gather(
            *(work(store, claims, worker, rollout_id, journal) for rollout_id in random.sample(sorted(missing), min(3, len(missing))))
        )
        await asyncio.sleep(0.05)


async def work(store: Store, claims: Claims, worker: str, rollout_id: str, journal: str) -> None:
    lease = await claims.take(rollout_id)
    if lease is None:
        return
    try:
        async with lease.kept():
            await asyncio.sleep(random.uniform(0, 0.3))
            trajectory = Trajectory(
                run="r", round=1, rollout_id=rollout_id, task_id="t", student="s", turns=(), outcome=Outcome.UNRESOLVED,
                worker=f"{worker} {os.getpid()}", tries=lease.tries,
            )  # fmt: skip
            if await write_trajectory(store, Kind.ROLLOUT, trajectory):
                descriptor = os.open(Path(journal), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(descriptor, f"{rollout_id}\n".encode())
                os.close(descriptor)
    except LeaseLost:
        return


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
