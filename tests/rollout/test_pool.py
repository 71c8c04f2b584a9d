"""Workers share a stage's rollouts: each is finished once, whatever happens to those who work on it."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dagger_operator.api import Storage
from dagger_operator.control.failures import RETRIES
from dagger_operator.rollout.metrics import WorkerMetrics
from dagger_operator.rollout.outcome import InfrastructureFailed
from dagger_operator.rollout.pool import MOST_DEATHS, Pool, Share
from dagger_operator.store.claims import Claims
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Object, Store
from dagger_operator.store.progress import read_progress
from dagger_operator.store.records import Failure, Outcome, Trajectory
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.trajectories import finished, read_trajectories
from dagger_operator.tasks.deal import Assignment
from dagger_operator.tasks.task import ScriptGrading, Task

AWAY = Failure(reason="Unreachable", message="the teacher is away")


def assignments(count: int) -> tuple[Assignment, ...]:
    tasks = [Task(id=f"t{i}", statement="s", grading=ScriptGrading(command="true")) for i in range(count)]
    return tuple(Assignment(rollout_id=f"t{i:05d}-a0", ordinal=i, task=task, attempt=0) for i, task in enumerate(tasks))


class Bench:
    """Attempts that are counted, take a moment, and fail as often as they are told to."""

    def __init__(self, store: Store, count: int) -> None:
        self.store, self.assignments = store, assignments(count)
        self.started: Counter[str] = Counter()
        self.failing: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.seconds = 0.02
        self.policy = asyncio.Event()
        self.policy.set()

    def pool(self, index: int = 0, *, workers: int = 1, concurrency: int = 3, retries: int = 2, lease: float = 2.0) -> Pool:
        share = Share(
            store=self.store,
            round=1,
            kind=Kind.ROLLOUT,
            worker=f"rollout-{index:04d}",
            index=index,
            workers=workers,
            assignments=self.assignments,
            concurrency=concurrency,
            lease_seconds=lease,
            retries=retries,
            most_backoff_seconds=0.05,
        )
        self.registry = CollectorRegistry()
        return Pool(share, WorkerMetrics(self.registry, Kind.ROLLOUT), self.attempt, self.excluded, self.recovered)

    async def attempt(self, assignment: Assignment, tries: int) -> Trajectory:
        self.started[assignment.rollout_id] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if not self.policy.is_set():
            raise InfrastructureFailed(AWAY)
        if self.failing[assignment.rollout_id] > 0:
            self.failing[assignment.rollout_id] -= 1
            raise InfrastructureFailed(AWAY)
        return self.record(assignment, tries, Outcome.RESOLVED)

    async def recovered(self) -> None:
        await self.policy.wait()

    def excluded(self, assignment: Assignment, tries: int, failure: Failure) -> Trajectory:
        return self.record(assignment, tries, Outcome.INFRASTRUCTURE_FAILURE, failure)

    def record(self, assignment: Assignment, tries: int, outcome: Outcome, failure: Failure | None = None) -> Trajectory:
        where: dict[str, Any] = {"run": "r", "round": 1, "rollout_id": assignment.rollout_id, "task_id": assignment.task.id}
        return Trajectory(**where, student="s", turns=(), outcome=outcome, failure=failure, tries=tries)

    async def ended(self) -> dict[str, Trajectory]:
        return {t.rollout_id: t async for t in read_trajectories(self.store, 1, Kind.ROLLOUT)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Store.open(Storage(url=f"file://{tmp_path}/store")), 20)


async def test_every_rollout_is_run_once_by_as_many_slots_as_there_may_be(bench: Bench) -> None:
    await asyncio.wait_for(bench.pool(concurrency=3).run(), 60)
    assert set(bench.started.values()) == {1}
    assert await finished(bench.store, 1, Kind.ROLLOUT) == {a.rollout_id for a in bench.assignments}
    assert bench.most_under_way == 3
    assert await bench.store.list("rounds/0001/rollout/claims/") == []


async def test_workers_share_the_rollouts_and_end_together(bench: Bench) -> None:
    await asyncio.wait_for(asyncio.gather(*(bench.pool(index, workers=3).run() for index in range(3))), 60)
    assert set(bench.started.values()) == {1}
    assert len(await bench.ended()) == 20


async def test_what_infrastructure_broke_is_tried_again_on_its_own_budget(bench: Bench) -> None:
    bench.failing.update({"t00001-a0": 2, "t00002-a0": 99})
    await asyncio.wait_for(bench.pool(retries=2).run(), 60)
    ended = await bench.ended()
    assert (ended["t00001-a0"].outcome, ended["t00001-a0"].tries) == (Outcome.RESOLVED, 3)
    lost = ended["t00002-a0"]
    assert (lost.outcome, lost.failure, lost.tries) == (Outcome.INFRASTRUCTURE_FAILURE, AWAY, 3)
    assert bench.started["t00002-a0"] == 3
    assert {a.outcome for i, a in ended.items() if i != "t00002-a0"} == {Outcome.RESOLVED}


async def test_a_policy_that_is_away_for_long_costs_a_rollout_one_try(bench: Bench) -> None:
    bench.policy.clear()
    running = [asyncio.create_task(bench.pool(index, workers=2, retries=1).run()) for index in range(2)]
    await asyncio.sleep(2)  # the pauses are over long before
    bench.policy.set()
    await asyncio.wait_for(asyncio.gather(*running), 60)
    ended = await bench.ended()
    assert {t.outcome for t in ended.values()} == {Outcome.RESOLVED}
    assert sorted(bench.started.values()) == [1] * 14 + [2] * 6  # the six that were under way


async def test_a_policy_that_stays_away_ends_the_worker_and_costs_no_try(bench: Bench) -> None:
    async def given_up() -> None:
        raise StageFailure("StudentNotServed", "not served after 1800 s", permanent=False)

    bench.policy.clear()
    bench.recovered = given_up  # type: ignore[method-assign]  # patience that is over
    with pytest.raises(StageFailure, match="StudentNotServed"):
        await asyncio.wait_for(bench.pool(retries=0).run(), 60)
    assert await bench.ended() == {}


async def test_a_cancelled_worker_gives_its_rollouts_back_at_once(bench: Bench) -> None:
    bench.seconds = 60
    running = asyncio.create_task(bench.pool(lease=60).run())
    while bench.under_way < 3:
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bench.under_way == 0
    bench.seconds, began = 0.01, time.monotonic()
    await asyncio.wait_for(bench.pool(1, workers=2, lease=60).run(), 60)
    assert time.monotonic() - began < 30, "the next worker waited for the leases of the first"
    assert len(await bench.ended()) == 20


class Slow(Store):
    """A real store where some writes take a while."""

    slow = False

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        if self.slow and "t00002" in key:
            await asyncio.sleep(0.5)
        return await super().swap(key, data, expected)


async def test_a_claim_that_is_slow_to_give_back_is_given_back_too(bench: Bench) -> None:
    given = bench.store
    bench.store = slow = Slow(given._backend, given.url, scheme=given._scheme, folder=given._folder)
    bench.seconds = 60
    running = asyncio.create_task(bench.pool(lease=60).run())
    while bench.under_way < 3:
        await asyncio.sleep(0.01)
    slow.slow = True
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    next_worker = Claims(given, 1, Kind.ROLLOUT, "rollout-0001", 60)
    leases = [await next_worker.take(a.rollout_id) for a in bench.assignments[:3]]
    assert [lease.deaths for lease in leases if lease is not None] == [0, 0, 0]


async def test_a_silent_workers_rollouts_are_taken_over(bench: Bench) -> None:
    bench.assignments = bench.assignments[:3]
    silent = Claims(bench.store, 1, Kind.ROLLOUT, "rollout-0000", 60)  # takes one, and is never heard of again
    assert await silent.take("t00000-a0") is not None
    await asyncio.wait_for(bench.pool(1, workers=2, lease=1.0).run(), 60)
    assert len(await bench.ended()) == 3


async def test_a_rollout_that_kills_its_workers_is_excluded_and_the_others_are_run(bench: Bench) -> None:
    for _ in range(MOST_DEATHS + 1):  # lives that end over it; the last one ends over another, too
        life = Claims(bench.store, 1, Kind.ROLLOUT, "rollout-0000", 60)
        assert await life.take("t00003-a0") is not None
    assert await life.take("t00004-a0") is not None
    for _ in range(MOST_DEATHS + 1):  # drains are no deaths
        lease = await life.take("t00005-a0")
        assert lease is not None
        await lease.release()
    await asyncio.wait_for(bench.pool().run(), 60)
    ended = await bench.ended()
    lost = ended.pop("t00003-a0")
    assert (lost.outcome, bench.started["t00003-a0"]) == (Outcome.INFRASTRUCTURE_FAILURE, 0)
    assert lost.failure == Failure(reason="WorkerDied", message="its worker died 6 times")
    assert {t.outcome for t in ended.values()} == {Outcome.RESOLVED} and len(ended) == 19


def test_a_rollout_that_kills_its_worker_is_excluded_before_its_stage_is_given_up() -> None:
    assert MOST_DEATHS + 1 <= RETRIES


async def test_a_worker_that_lost_its_claim_writes_nothing_and_goes_on(bench: Bench) -> None:
    bench.assignments = bench.assignments[:2]
    bench.seconds = 3.0
    slow = asyncio.create_task(bench.pool(0, concurrency=1, lease=2.0).run())
    while not bench.under_way:
        await asyncio.sleep(0.01)
    (claim,) = await bench.store.list("rounds/0001/rollout/claims/")
    thief = Claims(bench.store, 1, Kind.ROLLOUT, "rollout-0000", 60)  # another life under the same name takes over at first sight
    lease = await thief.take(claim.key.removeprefix("rounds/0001/rollout/claims/").removesuffix(".json"))
    assert lease is not None
    bench.seconds = 0.01
    async with asyncio.timeout(60):
        while bench.under_way:
            await asyncio.sleep(0.01)
    assert await finished(bench.store, 1, Kind.ROLLOUT) <= {a.rollout_id for a in bench.assignments} - {lease.rollout_id}
    await lease.release()
    await asyncio.wait_for(slow, 60)
    assert len(await bench.ended()) == 2


async def ends_by_its_deadline(seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            asyncio.get_running_loop().call_soon(time.sleep, 3.0)
            await asyncio.sleep(60)


async def stands_still_itself() -> None:
    time.sleep(3.0)  # what finds its time over without asking the event loop, such as a thread


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda: ends_by_its_deadline(0.1), id="before the claim is renewed"),
        pytest.param(lambda: ends_by_its_deadline(0.6), id="after the claim is renewed"),
        pytest.param(lambda: ends_by_its_deadline(2.0), id="after the claim is over"),
        pytest.param(stands_still_itself, id="unseen by the event loop"),
    ],
)
async def test_deadlines_that_pass_while_a_worker_stands_still_end_no_rollout(bench: Bench, end: Callable[[], Awaitable[None]]) -> None:
    """To its timers a loop that stands still is a process that was stopped: on waking all are due."""

    async def attempt(assignment: Assignment, tries: int) -> Trajectory:
        if tries > 1:
            return bench.record(assignment, tries, Outcome.RESOLVED)
        await end()
        return bench.record(assignment, tries, Outcome.LIMIT_REACHED)

    bench.assignments, bench.attempt = bench.assignments[:1], attempt  # type: ignore[method-assign]
    await asyncio.wait_for(bench.pool(lease=1.0).run(), 60)
    (ended,) = (await bench.ended()).values()
    assert (ended.outcome, ended.tries) == (Outcome.RESOLVED, 2)


async def test_progress_counts_the_whole_stage_and_this_workers_part(bench: Bench) -> None:
    await bench.pool().run()
    said = (await read_progress(bench.store, 1, "rollout"))[0]
    assert (said.done, said.total, said.unit) == (20, 20, "rollouts")
    assert said.counters["Resolved"] == 20
    await bench.pool().run()  # started again, it finds all done: none of it says how fast it is
    again = (await read_progress(bench.store, 1, "rollout"))[0]
    assert (again.done, again.before, again.counters["turns"]) == (20, 20, 0)


async def test_prometheus_is_told_of_every_try_and_of_how_it_ended(bench: Bench) -> None:
    bench.failing["t00001-a0"] = 2
    pool = bench.pool()

    def counted(name: str, **labels: str) -> float | None:
        return bench.registry.get_sample_value(name, {"kind": "rollout", **labels})

    assert counted("dagger_rollout_seconds_count", outcome="Broken") == 0, "before anything was broken"
    await pool.run()
    assert counted("dagger_rollout_seconds_count", outcome="Done") == 20
    assert counted("dagger_rollout_seconds_count", outcome="Broken") == 2
    assert counted("dagger_infrastructure_failures_total", reason="Unreachable") == 2
    assert (counted("dagger_rollout_seconds_sum", outcome="Broken") or 0) >= 2 * bench.seconds
