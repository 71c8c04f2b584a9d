"""The round state machine: which steps are at work, decided from results alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from dagger_operator.api import Overlap, RunSpec, TrainingMode
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
    """Every step of a run, in order of rounds."""
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


@dataclass(frozen=True)
class Work:
    """What a run works on: the next step of its rounds and, beside it, the evaluation of the student that the round before made."""

    step: Step
    beside: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        yield self.step
        if self.beside is not None:
            yield self.beside


def next_steps(spec: RunSpec, results: Results) -> Work | None:
    """The first step without a result, and what may be done beside it; None where the run is done.

    An evaluation can be made up for until the next student is published: then this one is served no more.
    """
    left = [step for step in steps(spec) if not _settled(step, results)]
    if not left:
        return None
    first, rest = left[0], left[1:]
    if first.stage is StageName.EVALUATION and rest and spec.evaluation.overlap is Overlap.NEXT_ROUND:
        return Work(rest[0], beside=first)
    return Work(first)


def _settled(step: Step, results: Results) -> bool:
    """Done, or too late."""
    too_late = step.stage is StageName.EVALUATION and results.has(step.round + 1, StageName.PUBLISH)
    return too_late or results.has(step.round, step.stage)


def before(spec: RunSpec, work: Work | None) -> frozenset[Step]:
    """The steps that were at work last: the one before the next, and the newest evaluation before that."""
    passed: list[Step] = []
    for step in steps(spec):
        if work is not None and step == work.step:
            break
        passed.append(step)
    evaluations = [step for step in passed if step.stage is StageName.EVALUATION]
    return frozenset([*passed[-1:], *[step for step in passed if step.stage is not StageName.EVALUATION][-1:], *evaluations[-1:]])


def rollouts_remain(spec: RunSpec, step: Step) -> bool:
    """Whether the teacher will be asked again."""
    return step.round < spec.rounds or step.stage in (StageName.PREPARE, StageName.PREFLIGHT, StageName.ROLLOUT)
