"""What a spec says of a run's course."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

from dagger_operator.api import RunSpec, load
from dagger_operator.api.course import StageName, Step, cost, gpus_held, spans, steps

COURSES = [
    dict(zip(("rounds", "gpuSharing", "overlap", "mode", "training", "initial"), one, strict=True))
    for one in product(
        (1, 2, 4), ("TimeShared", "Dedicated"), ("NextRound", "None"), ("EveryRound", "LastRound", "Disabled"), (True, False), (True, False)
    )
]
SECONDS = {"prepare": 1.0, "preflight": 2.0, "rollout": 10.0, "training": 5.0, "publish": 1.0, "evaluation": 12.0}


def _spec(rounds: int, gpuSharing: str, overlap: str, mode: str, training: bool, initial: bool = False) -> RunSpec:  # noqa: N803 - as in specs
    """A student on 2 GPUs, a teacher on 4, training on 8."""
    tasks = {"type": "JSONL", "uri": "tasks"}
    spec: Mapping[str, Any] = {
        "rounds": rounds,
        "gpuSharing": gpuSharing,
        "student": {"model": "s", "serving": {"gpus": 1, "replicas": 2}},
        "teacher": {"model": "t", "serving": {"gpus": 2, "replicas": 2}},
        "tasks": {"source": tasks, "heldOut": {"source": tasks}},
        "training": {"gpusPerNode": 8, "mode": "Enabled" if training else "Disabled"},
        "evaluation": {"mode": mode, "overlap": overlap, "initial": initial},
        "storage": {"url": "file:///tmp/x"},
    }
    return load({"metadata": {"name": "x"}, "spec": spec}).spec


@pytest.mark.parametrize("course", COURSES, ids=str)
def test_every_step_has_its_place_on_the_clock_once_and_none_before_what_it_needs(course: dict[str, Any]) -> None:
    spec = _spec(**course)
    seen = [step for span in spans(spec) for step in (*span.steps, *([span.beside] if span.beside else []))]
    assert sorted(seen) == sorted(steps(spec))
    begun = {step: at for at, span in enumerate(spans(spec)) for step in (*span.steps, *([span.beside] if span.beside else []))}
    for step in seen:
        if step.stage is StageName.EVALUATION:
            assert begun[step] > begun[Step(step.round, StageName.PUBLISH if step.round else StageName.PREFLIGHT)]
            assert begun[step] < begun.get(Step(step.round + 1, StageName.PUBLISH), len(begun)), "it is of this student, not of the next"
    alone = [step for span in spans(spec) for step in span.steps]
    assert alone == [step for step in steps(spec) if step in alone]


@pytest.mark.parametrize("course", [course for course in COURSES if course["initial"]], ids=str)
def test_the_initial_student_is_evaluated_after_preflight_whatever_else_is_evaluated_or_trained(course: dict[str, Any]) -> None:
    first = [Step(0, StageName.PREPARE), Step(0, StageName.PREFLIGHT)]
    others = list(steps(_spec(**course | {"initial": False})))
    assert list(steps(_spec(**course))) == [*first, Step(0, StageName.EVALUATION), *others[2:]]


@pytest.mark.parametrize(("overlap", "clock", "paid"), [("NextRound", 3 + 12, 2 * 6 + 10 * 6 + 2 * 2), ("None", 3 + 12 + 10, 24 * 6)])
def test_where_nothing_is_trained_the_initial_students_evaluation_may_outlast_all_rollouts_without_the_teacher(
    overlap: str, clock: float, paid: float
) -> None:
    spec = _spec(rounds=1, gpuSharing="Dedicated", overlap=overlap, mode="Disabled", training=False, initial=True)
    found = cost(spec, lambda step: SECONDS[step.stage])
    assert (found.seconds, found.gpu_seconds) == (clock, paid)


@pytest.mark.parametrize(
    ("course", "clock"),
    [
        # Round 2's rollouts are outlasted by the evaluation of round 1, and training waits: 3 + 10 + 5 + 1, 12 + 5 + 1, 12.
        ({"gpuSharing": "TimeShared", "overlap": "NextRound"}, 49.0),
        ({"gpuSharing": "TimeShared", "overlap": "None"}, 59.0),
        # Rollouts and training outlast it.
        ({"gpuSharing": "Dedicated", "overlap": "NextRound"}, 47.0),
        ({"gpuSharing": "Dedicated", "overlap": "None"}, 59.0),
    ],
)
def test_an_evaluation_lengthens_a_run_by_what_it_outlasts_the_steps_beside_it(course: dict[str, Any], clock: float) -> None:
    spec = _spec(rounds=2, mode="EveryRound", training=True, **course)
    assert cost(spec, lambda step: SECONDS[step.stage]).seconds == clock


def test_gpus_are_paid_for_while_training_waits_for_an_evaluation() -> None:
    spec = _spec(rounds=3, gpuSharing="TimeShared", overlap="NextRound", mode="EveryRound", training=True)
    longer = cost(spec, lambda step: SECONDS[step.stage] + (step == Step(1, StageName.EVALUATION)))
    last = cost(spec, lambda step: SECONDS[step.stage] + (step == Step(2, StageName.EVALUATION)))
    usual = cost(spec, lambda step: SECONDS[step.stage])
    assert longer.gpu_seconds - usual.gpu_seconds == 6, "student and teacher: their servers stay up"
    assert last.gpu_seconds - usual.gpu_seconds == 2, "the teacher's servers went with the last rollouts"


def test_gpus_held_are_those_of_servers_and_of_training_as_they_are_shared() -> None:
    shared, dedicated = (
        _spec(rounds=2, gpuSharing=how, overlap="None", mode="EveryRound", training=True) for how in ("TimeShared", "Dedicated")
    )
    held = {spec.gpu_sharing: [gpus_held(spec, step) for step in steps(spec)] for spec in (shared, dedicated)}
    assert held["TimeShared"] == [0, 6, 6, 8, 6, 6, 6, 8, 2, 2]
    assert held["Dedicated"] == [0, 6, 6, 14, 6, 6, 6, 10, 2, 2]
