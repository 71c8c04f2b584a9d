"""The round state machine: which stage is next, decided from results alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from dagger_operator.api import RunSpec, TrainingMode
from dagger_operator.control.results import Results


class StageName(StrEnum):
    """A stage is one command; its result in object storage proves that it is done."""

    PREPARE = "prepare"
    PREFLIGHT = "preflight"
    ROLLOUT = "rollout"
    TRAINING = "training"
    PUBLISH = "publish"
    EVALUATION = "evaluation"


@dataclass(frozen=True, order=True)
class Step:
    """One stage of one round; prepare and preflight belong to round 0."""

    round: int
    stage: StageName


def steps(spec: RunSpec) -> Iterator[Step]:
    """Every step of a run in order."""
    yield Step(0, StageName.PREPARE)
    yield Step(0, StageName.PREFLIGHT)
    for number in range(1, spec.rounds + 1):
        yield Step(number, StageName.ROLLOUT)
        if spec.training.mode is TrainingMode.DISABLED:
            continue
        yield Step(number, StageName.TRAINING)
        yield Step(number, StageName.PUBLISH)
        if spec.evaluation.at(number, spec.rounds):
            yield Step(number, StageName.EVALUATION)


def next_step(spec: RunSpec, results: Results) -> Step | None:
    """The first step without a result; None where the run is done.

    An evaluation that was not asked for when its time came is not made up for: a later student is served by then.
    """
    newest = results.newest_round
    for step in steps(spec):
        passed = step.stage is StageName.EVALUATION and step.round < newest
        if not passed and not results.has(step.round, step.stage):
            return step
    return None


def before(spec: RunSpec, step: Step | None) -> Step | None:
    """The step that came before; with None the last one."""
    previous = None
    for candidate in steps(spec):
        if candidate == step:
            break
        previous = candidate
    return previous


def rollouts_remain(spec: RunSpec, step: Step) -> bool:
    """Whether the teacher will be asked again."""
    return step.round < spec.rounds or step.stage in (StageName.PREPARE, StageName.PREFLIGHT, StageName.ROLLOUT)
