"""The course of a run, as determined by its spec alone: its steps in order, which of them overlap, and the GPUs held meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from dagger_operator.api.evaluation import Overlap
from dagger_operator.api.run import GpuSharing, RunSpec
from dagger_operator.api.training import TrainingMode


class StageName(StrEnum):
    """A stage is one command; its result in object storage proves that it is done."""

    PREPARE = "prepare"
    PREFLIGHT = "preflight"
    ROLLOUT = "rollout"
    TRAINING = "training"
    PUBLISH = "publish"
    EVALUATION = "evaluation"


ONCE = frozenset({StageName.PREPARE, StageName.PREFLIGHT})
"""Stages that run in round 0 only. Its only other possible stage is the evaluation of the initial student."""


@dataclass(frozen=True, order=True)
class Step:
    """One stage of one round; round 0 is everything before the first rollouts."""

    round: int
    stage: StageName


def steps(spec: RunSpec) -> Iterator[Step]:
    """Yield every step of a run, in order of rounds."""
    yield Step(0, StageName.PREPARE)
    yield Step(0, StageName.PREFLIGHT)
    if spec.evaluation.at(0, spec.rounds):
        yield Step(0, StageName.EVALUATION)
    for number in range(1, spec.rounds + 1):
        yield Step(number, StageName.ROLLOUT)
        if spec.training.mode is TrainingMode.DISABLED:
            continue
        yield Step(number, StageName.TRAINING)
        yield Step(number, StageName.PUBLISH)
        if spec.evaluation.at(number, spec.rounds):
            yield Step(number, StageName.EVALUATION)


@dataclass(frozen=True)
class Span:
    """Steps that run one after the other and, concurrently with all of them, an optional evaluation that the next span waits for."""

    steps: tuple[Step, ...]
    beside: Step | None = None


def waits_for_evaluation(spec: RunSpec, stage: StageName) -> bool:
    """Whether a stage would take away the student that the previous round's evaluation queries, or the GPUs that serve it."""
    return stage is StageName.PUBLISH or (stage is StageName.TRAINING and spec.gpu_sharing is GpuSharing.TIME_SHARED)


def spans(spec: RunSpec) -> Iterator[Span]:
    """Yield every step of a run once. An evaluation runs concurrently with all later steps that do not wait for it: those of the next
    round, or all of a run without training."""
    overlaps = spec.evaluation.overlap is Overlap.NEXT_ROUND
    beside: Step | None = None
    together: tuple[Step, ...] = ()
    for step in steps(spec):
        if overlaps and step.stage is StageName.EVALUATION and step.round < spec.rounds:
            beside = step
        elif beside is not None and not waits_for_evaluation(spec, step.stage):
            together += (step,)
        else:
            if beside is not None:
                yield Span(together, beside)
                beside, together = None, ()
            yield Span((step,))
    if beside is not None:
        yield Span(together, beside)


def rollouts_remain(spec: RunSpec, step: Step) -> bool:
    """Whether the teacher will be queried again."""
    return step.round < spec.rounds or step.stage is StageName.ROLLOUT


def gpus_held(spec: RunSpec, step: Step) -> int:
    """Return the number of GPUs that a run holds while a step runs."""
    if step.stage is StageName.PREPARE:
        return 0
    serving = _serving(spec, teacher=rollouts_remain(spec, step))
    if step.stage is not StageName.TRAINING:
        return serving
    training = spec.training.nodes * spec.training.gpus_per_node
    return training if spec.gpu_sharing is GpuSharing.TIME_SHARED else training + serving


def _serving(spec: RunSpec, *, teacher: bool) -> int:
    served = (spec.student.served, spec.teacher.serving if teacher else None)
    return sum(one.gpus * one.nodes * one.replicas for one in served if one is not None)


@dataclass(frozen=True)
class Cost:
    seconds: float
    """Wall-clock time."""
    gpu_seconds: float
    """GPUs times the seconds for which they are held."""


def cost(spec: RunSpec, seconds: Callable[[Step], float]) -> Cost:
    """Return the total cost of a run, given the seconds that each step takes."""
    costs = cost_by_step(spec, seconds).values()
    return Cost(sum(one.seconds for one in costs), sum(one.gpu_seconds for one in costs))


def cost_by_step(spec: RunSpec, seconds: Callable[[Step], float]) -> dict[Step, Cost]:
    """Return what each step adds to the cost. A concurrent evaluation has no GPUs of its own; if it outlasts the steps beside it, the run
    waits for it while holding the servers that the next step uses."""
    costs: dict[Step, Cost] = {}
    for span in spans(spec):
        took = {step: seconds(step) for step in span.steps}
        costs |= {step: Cost(took[step], took[step] * gpus_held(spec, step)) for step in took}
        if span.beside is not None:
            waits = max(0.0, seconds(span.beside) - sum(took.values()))
            costs[span.beside] = Cost(waits, waits * _serving(spec, teacher=span.steps[-1].round < spec.rounds))
    return costs
