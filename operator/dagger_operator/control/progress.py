"""How far stages are, what is left, and what it has cost: for people, and never a basis for decisions."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from dagger_operator.api import DAggerRun, GpuSharing, Overlap
from dagger_operator.api import Progress as ProgressShown
from dagger_operator.control.jobs import pods_of
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import StageName, Step, Work, next_steps, steps
from dagger_operator.store.objects import Reads, StoreUnavailable
from dagger_operator.store.progress import read_progress as read_reports
from dagger_operator.store.results import EvaluationResult, PublishResult, RolloutResult, StageProgress, TrainingResult

Progress = Mapping[Step, Mapping[int, StageProgress]]
"""What workers report, by step and by worker's index."""
_WORKERS = 16
"""As many are asked how far they are: each sees the whole."""


async def read_progress(store: Reads, run: DAggerRun, results: Results) -> Progress:
    """What both runtimes read for `Observed.progress`: the steps at work, as their workers report them. Never fails."""
    found: dict[Step, Mapping[int, StageProgress]] = {}
    for step in next_steps(run.spec, results) or ():
        try:
            if reports := await read_reports(store, step.round, step.stage, min(pods_of(run, step.stage), _WORKERS)):
                found[step] = reports
        except StoreUnavailable:
            continue  # whoever decides something by what is in storage says so
    return found


def shown(progress: Progress, work: Work | None, previous: ProgressShown | None, now: datetime) -> ProgressShown | None:
    """The step that a run shows. What was shown before stands until a percent is gained, so that a status is not written for less."""
    for step in work or ():
        furthest = max(progress.get(step, {}).values(), key=lambda one: one.done, default=None)  # each worker sees the whole
        if furthest is None or furthest.total <= 0:
            continue
        percent = min(100, 100 * furthest.done // furthest.total)
        fresh = ProgressShown(stage=step.stage, done=furthest.done, total=furthest.total, unit=furthest.unit, percent=percent)
        known = ("stage", "total", "percent")
        if previous is not None and [getattr(previous, one) for one in known] == [getattr(fresh, one) for one in known]:
            return previous
        if (gained := furthest.done - furthest.before) > 0:
            left = furthest.seconds * (furthest.total - furthest.done) / gained
            fresh = fresh.model_copy(update={"estimated_completion_time": _rounded(now + timedelta(seconds=left))})
        return fresh
    return None


def run_end(run: DAggerRun, results: Results, work: Work | None, stage: ProgressShown | None, now: datetime) -> datetime | None:
    """When the run ends, if every stage left takes as long as it took last; None where one was never seen."""
    if work is None:
        return None
    every = list(steps(run.spec))
    newest = {step.stage: took for step in every if (took := seconds_of(results, step)) is not None}
    overlapped = run.spec.evaluation.overlap is Overlap.NEXT_ROUND
    left = [
        step.stage
        for step in every[every.index(work.step) + 1 :]
        if not (step.stage is StageName.EVALUATION and overlapped and step.round < run.spec.rounds)
    ]
    at = stage.estimated_completion_time if stage is not None and stage.stage == work.step.stage else None
    if at is None:
        if work.step.stage not in newest:
            return None
        at = now + timedelta(seconds=newest[work.step.stage])
    if any(one not in newest for one in left):
        return None
    return _rounded(at + timedelta(seconds=sum(newest[one] for one in left)))


def seconds_of(results: Results, step: Step) -> float | None:
    """How long a finished step took."""
    match results.records.get((step.round, step.stage)):
        case PublishResult(seconds=seconds):
            return seconds
        case RolloutResult(summary=summary) | TrainingResult(summary=summary) | EvaluationResult(summary=summary):
            return summary.seconds
    return None


def gpu_hours(run: DAggerRun, progress: Progress, results: Results) -> float:
    """GPUs times the hours of every step that asked for them. An evaluation beside rollouts shares their servers."""
    total = 0.0
    for step in steps(run.spec):
        took = seconds_of(results, step)
        if took is None:
            took = max((one.seconds for one in progress.get(step, {}).values()), default=0.0)
        total += took * _gpus(run, step)
    return total / 3600


def _gpus(run: DAggerRun, step: Step) -> int:
    student, teacher = run.spec.student.served, run.spec.teacher.serving
    serving = (student.gpus * student.replicas if student else 0) + (teacher.gpus * teacher.nodes * teacher.replicas if teacher else 0)
    match step.stage:
        case StageName.PREPARE:
            return 0
        case StageName.TRAINING:
            held = 0 if run.spec.gpu_sharing is GpuSharing.TIME_SHARED else serving
            return held + run.spec.training.nodes * run.spec.training.gpus_per_node
        case StageName.EVALUATION:
            alone = step.round == run.spec.rounds or run.spec.evaluation.overlap is Overlap.NONE
            return (student.gpus * student.replicas if student else 0) if alone else 0
    return serving


def _rounded(at: datetime) -> datetime:
    return at.replace(microsecond=0)
