"""kill -9 of any worker at any moment: nothing is lost, nothing is doubled."""

import asyncio
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from dagger_operator.api import Storage
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Store
from dagger_operator.store.trajectories import finished, read_trajectories

IDS = [f"{number:06d}" for number in range(60)]


@pytest.mark.heavy
async def test_no_rollout_is_lost_or_written_twice(settings: tuple[Storage, dict[str, str]], store: Store, tmp_path: Path) -> None:
    storage, environ = settings
    journal = tmp_path / "journal"

    async def start(worker: str) -> asyncio.subprocess.Process:
        script = Path(__file__).with_name("claims_worker.py")
        arguments = [storage.model_dump_json(), worker, json.dumps(IDS), str(journal)]
        return await asyncio.create_subprocess_exec(sys.executable, str(script), *arguments, env={**os.environ, **environ})

    workers = {f"rollout-{number:04d}": await start(f"rollout-{number:04d}") for number in range(3)}
    dice, kills = random.Random(1), 0
    try:
        async with asyncio.timeout(200):
            while set(IDS) - await finished(store, 1, Kind.ROLLOUT):
                # Long enough for the interpreter to start at least now and then, whatever the machine.
                await asyncio.sleep(dice.uniform(0.3, 1.0 + kills / 5))
                name = dice.choice(sorted(workers))
                if workers[name].returncode is None:
                    workers[name].kill()
                    kills += 1
                await workers[name].wait()
                workers[name] = await start(name)
            assert [await process.wait() for process in workers.values()] == [0, 0, 0]
    finally:
        for process in workers.values():
            if process.returncode is None:
                process.kill()
                await process.wait()

    assert [trajectory.rollout_id async for trajectory in read_trajectories(store, 1, Kind.ROLLOUT)] == IDS
    acknowledged = Counter(journal.read_text().split())
    assert kills >= 2 and set(acknowledged) <= set(IDS) and set(acknowledged.values()) == {1}
