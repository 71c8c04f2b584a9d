"""The round state machine: the current steps, determined from results alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from dagger_operator.api import Overlap, RunSpec
from dagger_operator.api.course import StageName, Step, steps
from dagger_operator.control.results import Results

__all__ = ["StageName", "Step", "Work", "before", "next_steps", "settled", "steps"]


@dataclass(frozen=True)
class Work:
    """What a run works on: the next step of its rounds and, beside it, the evaluation of the previous round's student."""

    step: Step
    beside: Step | None = None
    rollouts_remain: bool = True
    """Whether the teacher will be queried again."""

    def __iter__(self) -> Iterator[Step]:
        yield self.step
        if self.beside is not None:
            yield self.beside


def next_steps(spec: RunSpec, results: Results) -> Work | None:
    """Return the first step without a result, and what may run beside it; None if the run is done.

    An evaluation can be caught up until the next student is published, if one ever is: then this one is no longer served. `overlap`
    determines when the next round starts: if it is changed while a round's rollouts are already done, that round is not held back, and its
    training is not ended.
    """
    left = [step for step in steps(spec) if not settled(step, results)]
    if not left:
        return None
    first, rest = left[0], left[1:]
    remain = any(step.stage is StageName.ROLLOUT for step in left)
    begun = results.has(first.round + 1, StageName.ROLLOUT)
    if first.stage is StageName.EVALUATION and rest and (begun or spec.evaluation.overlap is Overlap.NEXT_ROUND):
        return Work(rest[0], beside=first, rollouts_remain=remain)
    return Work(first, rollouts_remain=remain)


def settled(step: Step, results: Results) -> bool:
    """Whether a step is done, or too late."""
    too_late = step.stage is StageName.EVALUATION and results.has(step.round + 1, StageName.PUBLISH)
    return too_late or results.has(step.round, step.stage)


def before(spec: RunSpec, work: Work | None) -> frozenset[Step]:
    """Return the steps that ran last: the one before the next, and the newest evaluation before that."""
    passed: list[Step] = []
    for step in steps(spec):
        if work is not None and step == work.step:
            break
        passed.append(step)
    evaluations = [step for step in passed if step.stage is StageName.EVALUATION]
    return frozenset([*passed[-1:], *[step for step in passed if step.stage is not StageName.EVALUATION][-1:], *evaluations[-1:]])
