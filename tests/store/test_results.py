"""Results prove that a stage is done; progress proves nothing."""

import re
from collections.abc import Awaitable, Callable

import pytest

from dagger_operator.api import EvaluationSummary, TrainingSummary
from dagger_operator.api.training import MOST_STEPS
from dagger_operator.store import layout
from dagger_operator.store.objects import SMALL_BYTES, DamagedObject, Store, StoreUnavailable
from dagger_operator.store.owner import read_owner
from dagger_operator.store.policies import pointed
from dagger_operator.store.progress import Reporter, read_progress, report
from dagger_operator.store.results import (
    MOST_LOSSES,
    RESULT_BYTES,
    EvaluationResult,
    PublishResult,
    StageProgress,
    TrainingResult,
    read_result,
    save_result,
)
from dagger_operator.store.stage import StageFailure


async def test_the_first_result_stands(store: Store) -> None:
    assert await read_result(store, 1, PublishResult) is None
    first = PublishResult(policy="r001-a", replicas=2, seconds=3.5)
    assert await save_result(store, 1, first)
    assert not await save_result(store, 1, PublishResult(policy="r001-b", replicas=1, seconds=1))
    assert await read_result(store, 1, PublishResult) == first
    assert await read_result(store, 2, PublishResult) is None


async def test_a_garbled_result_is_damage_and_not_an_undone_stage(store: Store) -> None:
    await store.put(layout.result(1, "publish"), b'{"policy": 3}')
    with pytest.raises(DamagedObject, match=r"results/publish\.json: is no PublishResult"):
        await read_result(store, 1, PublishResult)


@pytest.mark.parametrize(
    ("key", "read"),
    [
        (layout.result(1, "publish"), lambda store: read_result(store, 1, PublishResult)),
        (layout.RUN, read_owner),
        (layout.POLICY, pointed),
    ],
)
async def test_what_should_be_small_and_is_not_is_damage(store: Store, key: str, read: Callable[[Store], Awaitable[object]]) -> None:
    await store.put(key, b"{}".ljust(RESULT_BYTES + 1))
    with pytest.raises(DamagedObject, match=rf"^{re.escape(key)}: has {RESULT_BYTES + 1} bytes or more, where .* at most are expected"):
        await read(store)


def _trained(losses: tuple[float, ...]) -> TrainingResult:
    summary = TrainingSummary(steps=len(losses), labels=1, tokens=1, checkpoint="r001-a", seconds=1)
    return TrainingResult(summary=summary, policy="r001-a", losses=losses)


@pytest.mark.parametrize("steps", [2 * MOST_STEPS + 1, MOST_STEPS, MOST_LOSSES + 1])
async def test_a_training_of_however_many_steps_leaves_a_result_that_can_be_read(store: Store, steps: int) -> None:
    losses = tuple(1 / (3 + step) for step in range(steps))
    assert await save_result(store, 1, _trained(losses))
    read = await read_result(store, 1, TrainingResult)
    assert read is not None and MOST_LOSSES / 2 < len(read.losses) <= MOST_LOSSES
    of = -(-steps // MOST_LOSSES)
    assert read.losses[0] == pytest.approx(sum(losses[:of]) / of)
    assert losses[-of] >= read.losses[-1] >= losses[-1]


async def test_up_to_ten_thousand_steps_it_has_the_loss_of_each(store: Store) -> None:
    result = _trained(tuple(1 / (3 + step) for step in range(MOST_LOSSES)))
    await save_result(store, 1, result)
    assert result.losses[-1] == 1 / (2 + MOST_LOSSES)
    assert await read_result(store, 1, TrainingResult) == result


async def test_a_result_that_could_not_be_read_again_is_refused_before_it_is_stored(store: Store) -> None:
    names = tuple(f"{number}".rjust(100, "x") for number in range(50_000))
    summary = EvaluationSummary(policy="p", tasks=50_000, resolved=50_000, resolved_rate=1, interval=[1, 1], false_submits=0, seconds=1)
    result = EvaluationResult(summary=summary, resolved_tasks=names, unresolved_tasks=())
    with pytest.raises(StageFailure, match=r"ResultTooLarge: .* evaluation of round 1 has .*tasks\.heldOut\.count") as refused:
        await save_result(store, 1, result)
    assert refused.value.permanent and await store.list() == []


async def test_progress_is_overwritten_and_kept_apart_by_stage_and_worker(store: Store) -> None:
    def at(done: int) -> StageProgress:
        return StageProgress(done=done, total=9, unit="rollouts", counters={"loss": 0.5})

    assert await read_progress(store, 1, "rollout", 12) == {}
    await report(store, 1, "rollout", 0, at(1))
    await report(store, 1, "rollout", 0, at(2))
    await report(store, 1, "rollout", 11, at(3))
    await report(store, 1, "training", 0, at(4))
    assert await read_progress(store, 1, "rollout", 12) == {0: at(2), 11: at(3)}
    assert await read_progress(store, 1, "rollout", 11) == {0: at(2)}


async def test_progress_that_cannot_be_read_stops_nobody(store: Store) -> None:
    await report(store, 1, "rollout", 0, StageProgress(done=1, total=9, unit="rollouts"))
    await store.put(layout.progress(1, "rollout", 1), b"\0")
    await store.put(layout.progress(1, "rollout", 2), b"{}".ljust(SMALL_BYTES + 1))
    assert set(await read_progress(store, 1, "rollout", 3)) == {0}


async def test_a_reporter_writes_the_first_and_the_last_and_little_between(store: Store) -> None:
    reporter = Reporter(store, 1, "training", "steps")
    told = [await reporter.tell(step, 1000, counters={"loss": 1.0}, seconds=step / 10) for step in range(1001)]
    assert told[0] and told[-1] and sum(told) < 10
    expected = StageProgress(done=1000, total=1000, unit="steps", counters={"loss": 1.0}, seconds=100)
    assert await read_progress(store, 1, "training") == {0: expected}


async def test_a_store_that_is_away_costs_the_report_and_not_the_stage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(key: str, data: bytes) -> None:
        raise StoreUnavailable("writing", key, "connection refused")

    monkeypatch.setattr(store, "put", away)
    await Reporter(store, 1, "training", "steps").tell(1, 9)
    assert await read_progress(store, 1, "training") == {}
