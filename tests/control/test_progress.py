"""Progress is shown with an end in sight, and costs few writes."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.api import DAggerRun
from dagger_operator.api.course import gpus_held
from dagger_operator.control import ChildState, Results, StageName, Step, next_steps, read_progress
from dagger_operator.store.objects import Store
from dagger_operator.store.progress import report
from dagger_operator.store.results import PreflightResult, PrepareResult, StageProgress

Story = Any


def at(done: int, seconds: float, total: int = 200) -> StageProgress:
    return StageProgress(done=done, total=total, unit="rollouts", seconds=seconds)


def test_a_stage_shows_how_far_it_is_and_when_it_ends(story: Callable[..., Story]) -> None:
    tale = story()
    tale.into_rollouts()
    step = Step(1, StageName.ROLLOUT)
    shown = tale.plan(progress={step: {0: at(50, 100.0), 1: at(48, 100.0)}}).status.progress
    assert (shown.stage, shown.done, shown.total, shown.percent) == ("rollout", 50, 200, 25)
    assert shown.estimated_completion_time == tale.now + timedelta(seconds=300)
    tale.later(seconds=1)
    assert tale.plan(progress={step: {0: at(51, 101.0)}}).status.progress == shown, "less than a percent is not worth a write"
    assert tale.plan(progress={step: {0: at(52, 102.0)}}).status.progress.percent == 26
    assert tale.plan(progress={}).status.progress is None


def test_a_worker_that_was_started_again_is_not_taken_for_a_fast_one(story: Callable[..., Story]) -> None:
    tale = story()
    tale.into_rollouts()
    again = at(50, 10.0).model_copy(update={"before": 40})
    shown = tale.plan(progress={Step(1, StageName.ROLLOUT): {0: again}}).status.progress
    assert shown.estimated_completion_time == tale.now + timedelta(seconds=150)


def test_the_end_of_a_run_is_foreseen_once_every_stage_was_seen(story: Callable[..., Story]) -> None:
    tale = story(rounds=3)
    tale.into_rollouts()
    assert tale.plan(progress={Step(1, StageName.ROLLOUT): {0: at(50, 100.0)}}).status.estimated_completion_time is None
    tale.done("rollout", "training", "publish", "evaluation", round_number=1)
    status = tale.plan(progress={Step(2, StageName.ROLLOUT): {0: at(100, 60.0)}}).status
    # 60 s of this stage; then training and publish, and rollout, training, publish and evaluation of round 3: 9, 1, 1 and 1 s.
    assert status.estimated_completion_time == tale.now + timedelta(seconds=60 + 2 + 9 + 2 + 1)


def test_gpu_hours_are_those_of_finished_stages_and_of_the_one_at_work(story: Callable[..., Story]) -> None:
    tale = story(gpuSharing="TimeShared", training={"gpusPerNode": 8, "nodes": 2})
    tale.into_rollouts()
    assert tale.plan(progress={Step(1, StageName.ROLLOUT): {0: at(50, 3600.0)}}).status.gpu_hours == "2.0"
    tale.done("rollout", "training", round_number=1)  # 9 s of 2 GPUs, 1 s of 16: rounded
    assert tale.plan().status.gpu_hours == "0.0"


def test_the_wait_of_training_for_an_evaluation_is_paid_for_and_foreseen(story: Callable[..., Story]) -> None:
    tale = story(rounds=3, gpuSharing="TimeShared", training={"gpusPerNode": 8})
    tale.into_rollouts()
    tale.done("rollout", "training", "publish", round_number=1)
    tale.done("rollout", round_number=2)
    evaluation = Step(1, StageName.EVALUATION)
    early, late = (tale.plan(told=False, progress={evaluation: {0: at(100, hours * 3600.0)}}).status for hours in (1, 11))
    assert float(late.gpu_hours) - float(early.gpu_hours) == pytest.approx(2 * 10, abs=0.1), "the student's two servers stay up for it"
    assert early.estimated_completion_time is None, "no evaluation was seen to its end"
    tale.done("evaluation", round_number=1)
    tale.results[2, "evaluation"] = tale.results.pop((1, "evaluation"))  # as if that one had been seen
    ends = [
        tale.plan(told=False, progress={evaluation: {0: at(100, seconds)}}).status.estimated_completion_time for seconds in (60.0, 600.0)
    ]
    assert ends[1] - ends[0] == timedelta(seconds=540), "all that is left waits for it"


@pytest.mark.parametrize("initial", [False, True], ids=["trained students", "the initial one too"])
@pytest.mark.parametrize("overlap", ["NextRound", "None"])
@pytest.mark.parametrize("sharing", ["TimeShared", "Dedicated"])
def test_gpus_that_are_counted_are_those_that_the_plan_asks_for(
    story: Callable[..., Story], sharing: str, overlap: str, initial: bool
) -> None:
    teacher, evaluation = {"model": "t", "serving": {"gpus": 2, "replicas": 2}}, {"overlap": overlap, "initial": initial}
    tale = story(rounds=3, gpuSharing=sharing, teacher=teacher, training={"gpusPerNode": 8, "nodes": 2}, evaluation=evaluation)
    while (work := next_steps(tale.run.spec, Results(dict(tale.results)))) is not None:
        for _ in range(6):  # until what is to stop has stopped, and servers are ready
            planned = tale.plan()
            tale.carry_out(planned)
            up = [one.component for one in tale.children.values() if one.kind == "Deployment" and one.state is not ChildState.SUSPENDED]
            for component in up:
                tale.see(component, state=ChildState.READY)
        waits = work.beside is not None and work.step.stage in (
            StageName.PUBLISH,
            *([StageName.TRAINING] if sharing == "TimeShared" else []),
        )
        counted = Step(work.step.round, StageName.PUBLISH) if waits else work.step
        assert sum(map(_gpus, planned.objects)) == gpus_held(tale.run.spec, counted), work
        finished = work.beside if waits else work.step
        tale.done(finished.stage, round_number=finished.round)


def _gpus(manifest: dict[str, Any]) -> int:
    spec = manifest.get("spec", {})
    pods = {"Deployment": "replicas", "Job": "parallelism"}.get(manifest["kind"])
    if pods is None or spec.get("suspend"):
        return 0
    limits = [one.get("resources", {}).get("limits", {}) for one in spec["template"]["spec"]["containers"]]
    return int(spec[pods]) * sum(int(one.get("nvidia.com/gpu", 0)) for one in limits)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reports=st.lists(st.tuples(st.integers(0, 500), st.floats(0, 1e6)), max_size=30), total=st.integers(0, 500))
def test_whatever_workers_report_no_decision_rests_on_it(story: Callable[..., Story], reports: list[tuple[int, float]], total: int) -> None:
    tale = story()
    tale.into_rollouts()
    plain = tale.plan(told=False)
    for done, seconds in reports:
        seen = tale.plan(progress={Step(1, StageName.ROLLOUT): {0: at(done, seconds, total)}})
        assert (seen.objects, seen.remove, seen.status.conditions) == (plain.objects, plain.remove, plain.status.conditions)
        assert seen.status.progress is None or 0 <= seen.status.progress.percent <= 100


@pytest.mark.parametrize("stage", StageName)
async def test_every_stage_is_shown_with_its_end(story: Callable[..., Story], stage: StageName, tmp_path: Any) -> None:
    tale = story(storage={"url": f"file://{tmp_path}"})
    number = 0 if stage in (StageName.PREPARE, StageName.PREFLIGHT) else 1
    for earlier in list(StageName)[: list(StageName).index(stage)]:
        tale.done(earlier, round_number=0 if earlier in (StageName.PREPARE, StageName.PREFLIGHT) else 1)
    store = Store.open(tale.run.spec.storage)
    await report(store, number, stage, 0, at(50, 100.0))
    seen = tale.plan(progress=await read_progress(store, tale.run, Results(dict(tale.results)))).status.progress
    assert (seen.stage, seen.percent, seen.estimated_completion_time) == (stage, 25, tale.now + timedelta(seconds=300))


async def test_progress_of_every_step_at_work_is_read(make_run: Callable[..., DAggerRun], tmp_path: Any) -> None:
    run = make_run(storage={"url": f"file://{tmp_path}"}, rollouts={"workers": 2})
    store = Store.open(run.spec.storage)
    results = Results(
        {(0, "prepare"): PrepareResult(policy="p", teacher="t"), (0, "preflight"): PreflightResult(student="p", teacher="t", checks={})}
    )
    assert await read_progress(store, run, results) == {}
    await report(store, 1, "rollout", 1, at(3, 1.0))
    await report(store, 1, "evaluation", 0, at(3, 1.0))
    assert await read_progress(store, run, results) == {Step(1, StageName.ROLLOUT): {1: at(3, 1.0)}}
