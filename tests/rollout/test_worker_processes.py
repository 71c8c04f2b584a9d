"""The command that a worker is: what it logs and shows, and that it can be ended and killed at any time."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from dagger_operator.rollout.round import rollout
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import RoundManifest, read_manifest
from dagger_operator.store.stage import ExitCode, Stage
from rollout.gathered import result_of, trajectories, until


async def start(ground: Any, run: Any, index: int = 0, module: str = "rollout") -> asyncio.subprocess.Process:
    environ = ground.environ(run, index=index, kind=module)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"dagger_operator.{module}", env=environ, stdout=asyncio.subprocess.PIPE
    )


async def test_the_command_logs_what_it_does_and_never_a_token(ground: Any) -> None:
    run = ground.run(train=2)
    environ = ground.environ(run) | {"DAGGER_TEACHER_TOKEN": "sk-teacher-secret"}
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dagger_operator.rollout", env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(worker.communicate(), 120)
    assert (worker.returncode, err) == (ExitCode.DONE, b"")
    lines = [json.loads(line) for line in out.splitlines()]
    ended = [line for line in lines if line["event"] == "rollout finished"]
    assert len(ended) == 2
    assert {"run", "round", "task", "rollout", "worker", "outcome", "turns"} <= ended[0].keys()
    assert b"sk-teacher-secret" not in out
    everything = b"".join(path.read_bytes() for path in ground.root.rglob("*") if path.is_file() and "store" in path.parts)
    assert b"sk-teacher-secret" not in everything


async def test_prometheus_reads_a_worker_while_it_works(ground: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ground.run(train=6)
    working = asyncio.create_task(rollout(Stage.from_environment(ground.environ(run) | {"DAGGER_METRICS_PORT": str(port)})))
    said = ""
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while not working.done():
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
                    said = await response.text()
            await asyncio.sleep(0.02)
    await working
    # One exposition for the worker and its gateway; nothing in it grows with the number of tasks.
    assert "dagger_rollouts_under_way" in said and "dagger_gateway_turns_total" in said and "dagger_sandbox_command_seconds_count" in said
    assert "repair-" not in said and "t0000" not in said


async def test_a_worker_that_is_asked_to_end_ends_and_the_next_goes_on(ground: Any) -> None:
    run = ground.run(train=6, rollouts={"concurrency": 2, "leaseSeconds": 30})
    worker = await start(ground, run)
    await until(lambda: len(ground.policies.requests) > 4)
    worker.send_signal(signal.SIGTERM)
    await asyncio.wait_for(worker.communicate(), 60)
    assert worker.returncode == ExitCode.UNAVAILABLE
    began = time.monotonic()
    await rollout(ground.stage(run))
    assert time.monotonic() - began < 25, "claims were not given back"
    assert (await result_of(ground.store(run))).summary.rollouts == 6


@pytest.mark.heavy
@pytest.mark.timeout(600)
async def test_workers_killed_again_and_again_lose_and_double_nothing(ground: Any) -> None:
    """kill -9 at random moments; the data set is the one of a run that nobody disturbed."""
    count, workers = 24, 2
    # On a busy machine a worker is killed many times before it ends a rollout.
    settings = {"workers": workers, "concurrency": 3, "leaseSeconds": 2, "infrastructureRetries": 100}
    calm = ground.run(train=count, rollouts=settings, storage={"url": f"file://{ground.root}/calm"})
    await rollout(ground.stage(calm))
    undisturbed = await read_manifest(ground.store(calm), 1)

    run = ground.run(train=count, rollouts=settings)
    store, rng = ground.store(run), random.Random(7)
    lives: dict[int, asyncio.subprocess.Process] = {}
    kills, seen = 0, dict[str, bytes]()

    async def finished_objects() -> dict[str, bytes]:
        found = {}
        for info in await store.list(layout.trajectories(1, Kind.ROLLOUT)):
            entry = await store.get(info.key)
            assert entry is not None
            found[info.key] = entry.data
        return found

    try:
        while not await store.exists(layout.result(1, "rollout")):
            for index in range(workers):
                if index not in lives or lives[index].returncode is not None:
                    lives[index] = await start(ground, run, index)
            # Early kills hit the start of a worker, later ones hit rollouts, records and the closing of the round.
            await asyncio.sleep(rng.uniform(0.5, 5.0))
            now = await finished_objects()
            assert seen.items() <= now.items(), "a finished rollout was lost or written again"
            seen = now
            victim = rng.randrange(workers)
            if kills < 6 and lives[victim].returncode is None:
                lives[victim].kill()
                await lives[victim].communicate()
                kills += 1
        for worker in lives.values():
            await asyncio.wait_for(worker.communicate(), 120)
    finally:
        for worker in lives.values():
            if worker.returncode is None:
                worker.kill()
                await worker.communicate()
    disturbed = await read_manifest(store, 1)
    assert kills >= 3, "the round was over before it was disturbed"
    assert disturbed is not None and undisturbed is not None
    assert _what_counts(disturbed) == _what_counts(undisturbed)
    ended = await trajectories(store)
    assert Counter(t.rollout_id for t in ended) == Counter({t.rollout_id: 1 for t in ended}) and len(ended) == count
    assert (await result_of(store)).summary.data_digest == undisturbed.data_digest


def _what_counts(manifest: RoundManifest) -> tuple[Any, ...]:
    return manifest.data_digest, manifest.rollouts, manifest.turns, manifest.labels, manifest.excluded, manifest.shards
