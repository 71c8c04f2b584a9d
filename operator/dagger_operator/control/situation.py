"""The current situation of a run: its phase, and whether it progresses or what it waits for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dagger_operator.api import DAggerRun, Phase
from dagger_operator.api.course import ONCE
from dagger_operator.control.child import Child, ChildState, Trouble
from dagger_operator.control.conditions import Reason, running
from dagger_operator.control.gates import Jobs
from dagger_operator.control.observe import Observed
from dagger_operator.control.refusals import since
from dagger_operator.control.rounds import StageName, Step, Work

_PHASES = {
    StageName.PREPARE: Phase.PREPARING,
    StageName.PREFLIGHT: Phase.PREFLIGHT,
    StageName.ROLLOUT: Phase.ROLLOUT,
    StageName.TRAINING: Phase.TRAINING,
    StageName.PUBLISH: Phase.PUBLISHING,
    StageName.EVALUATION: Phase.EVALUATION,
}


@dataclass(frozen=True)
class Situation:
    phase: Phase
    round: int
    reason: str
    message: str
    progressing: bool = False

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)


def place(run: DAggerRun, step: Step) -> str:
    return str(step.stage) if step.stage in ONCE else f"round {step.round} of {run.spec.rounds}, {step.stage}"


def at_work(run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, blocked: Mapping[Step, Trouble]) -> Situation:
    """Return the situation of a run at work, described by its next step; if that waits for the evaluation beside it, by the evaluation."""
    if observed.refused is not None:
        return _waiting(run, work.step, observed.refused)
    speaks = work.step
    if work.beside is not None and (held := blocked.get(work.step)) is not None and held.reason == Reason.WAITING_FOR_EVALUATION:
        speaks = work.beside
    situation = _waiting(run, speaks, blocked[speaks]) if speaks in blocked else _working(run, speaks, jobs[speaks])
    if work.beside is not None:
        other = work.step if speaks is work.beside else work.beside
        verb = "waits for it" if other is work.step else "beside it"
        situation = replace(situation, message=f"{situation.message}; {place(run, other)} {verb}")
    return replace(situation, phase=_PHASES[work.step.stage], round=work.step.round)


def _working(run: DAggerRun, step: Step, job: Child | None) -> Situation:
    where = place(run, step)
    if job is not None and job.state is ChildState.SUSPENDED and run.spec.kueue is not None:
        held = f"Job {job.name} is in the queue {run.spec.kueue.queue_name}: `kubectl get workloads` says what it waits for"
        return Situation(_PHASES[step.stage], step.round, Reason.WAITING_IN_QUEUE, f"{where} waits: {held}")
    if job is not None and job.state is ChildState.WAITING and job.trouble is not None:
        return _waiting(run, step, job.trouble)
    if job is not None and job.state in (ChildState.RUNNING, ChildState.SUCCEEDED):
        return Situation(_PHASES[step.stage], step.round, running(step.stage), where, progressing=True)
    return Situation(_PHASES[step.stage], step.round, Reason.STAGE_STARTING, where, progressing=True)


def _waiting(run: DAggerRun, step: Step, trouble: Trouble) -> Situation:
    return Situation(_PHASES[step.stage], step.round, trouble.reason, f"{place(run, step)} waits: {since(trouble)}")
