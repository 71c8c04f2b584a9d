"""Progress of stages, remaining time and cost so far: for people, and never used for decisions."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from dagger_operator.api import DAggerRun
from dagger_operator.api import Progress as ProgressShown
from dagger_operator.api.course import cost
from dagger_operator.control.jobs import pods_of
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import Step, Work, next_steps, settled, steps
from dagger_operator.store.objects import Reads, StoreUnavailable
from dagger_operator.store.progress import read_progress as read_reports
from dagger_operator.store.results import EvaluationResult, PublishResult, RolloutResult, StageProgress, TrainingResult

Progress = Mapping[Step, Mapping[int, StageProgress]]
"""What workers report, by step and by worker's index."""
_WORKERS = 16
"""Maximum number of workers whose progress is read: each reports on the whole stage."""


async def read_progress(store: Reads, run: DAggerRun, results: Results) -> Progress:
    """Read `Observed.progress`, for both runtimes: the current steps, as their workers report them. Never fails."""
    found: dict[Step, Mapping[int, StageProgress]] = {}
    for step in next_steps(run.spec, results) or ():
        try:
            if reports := await read_reports(store, step.round, step.stage, min(pods_of(run, step.stage), _WORKERS)):
                found[step] = reports
        except StoreUnavailable:
            continue  # code that decides by what is in storage reports this
    return found


def shown(progress: Progress, work: Work | None, previous: ProgressShown | None, now: datetime) -> ProgressShown | None:
    """Return the progress that a run shows. The previous value stays until a percent is gained, to avoid writing a status for less."""
    for step in work or ():
        if (furthest := _furthest(progress, step)) is None:
            continue
        percent = min(100, 100 * furthest.done // furthest.total)
        fresh = ProgressShown(stage=step.stage, done=furthest.done, total=furthest.total, unit=furthest.unit, percent=percent)
        known = ("stage", "total", "percent")
        if previous is not None and [getattr(previous, one) for one in known] == [getattr(fresh, one) for one in known]:
            return previous
        if (left := _left(furthest)) is not None:
            fresh = fresh.model_copy(update={"estimated_completion_time": _rounded(now + timedelta(seconds=left))})
        return fresh
    return None


def run_end(run: DAggerRun, results: Results, work: Work | None, progress: Progress, now: datetime) -> datetime | None:
    """Return when the run ends if every remaining stage takes as long as it took last; None if one was never seen."""
    if work is None:
        return None
    every = list(steps(run.spec))
    newest = {step.stage: took for step in every if (took := seconds_of(results, step)) is not None}
    left = {step: newest.get(step.stage) for step in every if not settled(step, results)}
    for step in work:
        if (furthest := _furthest(progress, step)) is not None and (seconds := _left(furthest)) is not None:
            left[step] = seconds
    if None in left.values():
        return None
    return _rounded(now + timedelta(seconds=cost(run.spec, lambda step: left.get(step) or 0.0).seconds))


def _furthest(progress: Progress, step: Step) -> StageProgress | None:
    """Return the most advanced report: each worker reports on the whole stage once it knows its size."""
    furthest = max(progress.get(step, {}).values(), key=lambda one: one.done, default=None)
    return furthest if furthest is not None and furthest.total > 0 else None


def _left(furthest: StageProgress) -> float | None:
    """Return the seconds until a step is done if it continues at its rate so far; None if nothing was gained yet."""
    gained = furthest.done - furthest.before
    return furthest.seconds * (furthest.total - furthest.done) / gained if gained > 0 else None


def seconds_of(results: Results, step: Step) -> float | None:
    """Return how many seconds a finished step took."""
    match results.records.get((step.round, step.stage)):
        case PublishResult(seconds=seconds):
            return seconds
        case RolloutResult(summary=summary) | TrainingResult(summary=summary) | EvaluationResult(summary=summary):
            return summary.seconds
    return None


def gpu_hours(run: DAggerRun, progress: Progress, results: Results) -> float:
    """Return the GPUs times the hours for which the steps so far have held them."""

    def seconds(step: Step) -> float:
        took = seconds_of(results, step)
        return took if took is not None else max((one.seconds for one in progress.get(step, {}).values()), default=0.0)

    return cost(run.spec, seconds).gpu_seconds / 3600


def _rounded(at: datetime) -> datetime:
    return at.replace(microsecond=0)
