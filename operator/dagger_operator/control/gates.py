"""What blocks a step, and what has failed for good."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from dagger_operator.api import DAggerRun, GpuSharing, Role, RunStatus
from dagger_operator.api.course import waits_for_evaluation
from dagger_operator.control.child import Child, ChildState, Trouble
from dagger_operator.control.conditions import Reason
from dagger_operator.control.failures import given_up, server_given_up
from dagger_operator.control.jobs import pods_of
from dagger_operator.control.names import RETRY
from dagger_operator.control.observe import Observed
from dagger_operator.control.refusals import since, waited_since
from dagger_operator.control.rounds import StageName, Step, Work

RESULT_GRACE = timedelta(seconds=60)
"""A Job that succeeded wrote its result before it ended; a result that is not visible for this long is missing."""

ASKS_SERVERS = frozenset({StageName.PREFLIGHT, StageName.ROLLOUT, StageName.EVALUATION})
"""Stages that start once the servers answer. Publish is not one of them: it brings servers to a version, and waits by itself, but only
while the student's pods have their nodes."""

Servers = Mapping[Role, Child | None]
"""The policies served by the run that a step needs, with their server of the current attempt if one is observed."""
Jobs = Mapping[Step, Child | None]
"""The current steps, with their Job of the current attempt if one is observed."""


@dataclass(frozen=True)
class Failure:
    """Why a run is stopped until it is changed or resumed, and which child shows it."""

    step: Step
    trouble: Trouble
    child: Child | None = None
    refused: bool = False
    """The API server refused an object for too long."""


def failure(run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers) -> Failure | None:
    """Return a failure that a retry would not fix, or something that took too long."""
    for step, job in jobs.items():
        if job is not None and (trouble := _of_job(run, observed, step, job, servers)) is not None:
            return Failure(step, trouble, job)
    for server in servers.values():
        if server is not None and (trouble := _of_server(run, server)) is not None:
            return Failure(work.step, trouble, server)
    return _too_late(run, observed, work, jobs, servers)


def _of_job(run: DAggerRun, observed: Observed, step: Step, job: Child, servers: Servers) -> Trouble | None:
    if job.state is ChildState.FAILED and not job.deleting:
        return job.trouble or Trouble("JobFailed", f"Job {job.name} failed")
    if job.state is ChildState.SUCCEEDED and job.finished and observed.now - job.finished > RESULT_GRACE:
        return Trouble(
            Reason.RESULT_MISSING,
            f"Job {job.name} succeeded, but its result is not in storage: look whether something removes objects there "
            f"(`daggerctl store fsck`), then have the {step.stage} stage done again: delete the Job, or give the run a new value of the "
            f"annotation {RETRY} (on one machine `daggerctl resume`)",
        )
    if job.state in (ChildState.WAITING, ChildState.RUNNING, ChildState.SUSPENDED) and not job.deleting:
        return given_up(run, step.stage, job, pods_of(run, step.stage), servers)
    return None


def _of_server(run: DAggerRun, server: Child) -> Trouble | None:
    if server.state is ChildState.FAILED:
        return server.trouble or Trouble("ServerFailed", f"{server.kind} {server.name} failed")
    return server_given_up(run, server)


def _too_late(run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers) -> Failure | None:
    """Return the failure of a run, or of what waits to run, that is past its deadline."""
    if (late := overdue(run, observed.now)) is not None:
        return Failure(work.step, late)
    waiting = [(step, job) for step, job in jobs.items()] + [(work.step, server) for server in servers.values()]
    for step, one in waiting:
        if one is not None and not one.deleting and _waited_too_long(run, one.waiting_since, observed.now):
            known = one.trouble or Trouble(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, f"a pod of {one.kind} {one.name} does not run")
            return Failure(step, Trouble(known.reason, f"{known.message}; {_patience(run)}"), one)
    for step, trouble in blocked(run, observed, work, jobs, servers).items():
        if trouble.reason == Reason.NODE_LOST and not run.spec.suspend and _waited_too_long(run, trouble.since, observed.now):
            return Failure(step, Trouble(trouble.reason, f"{since(trouble)}; {_patience(run)}"))
    refused = observed.refused
    if refused is not None and _waited_too_long(run, refused.since, observed.now):
        return Failure(work.step, Trouble(refused.reason, f"{since(refused)}; {_patience(run)}"), refused=True)
    return None


def active_deadline(run: DAggerRun, status: RunStatus | None) -> datetime | None:
    """Return when the run has to be done."""
    started, limit = status.start_time if status else None, run.spec.active_deadline_seconds
    return None if started is None or limit is None else started + timedelta(seconds=limit)


def overdue(run: DAggerRun, now: datetime) -> Trouble | None:
    """Return the trouble of a run that exceeded its deadline, whatever it did meanwhile."""
    deadline = active_deadline(run, run.status)
    if deadline is None or now < deadline:
        return None
    limit = run.spec.active_deadline_seconds
    message = f"not done by {deadline:%Y-%m-%d %H:%M:%S} UTC, {limit} s after it began: raise activeDeadlineSeconds to go on"
    return Trouble(Reason.ACTIVE_DEADLINE_EXCEEDED, message)


def _waited_too_long(run: DAggerRun, since: datetime | None, now: datetime) -> bool:
    limit = run.spec.pre_running_deadline_seconds
    return limit is not None and since is not None and now - since > timedelta(seconds=limit)


def _patience(run: DAggerRun) -> str:
    return f"preRunningDeadlineSeconds is {run.spec.pre_running_deadline_seconds}"


def blocked(run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers) -> dict[Step, Trouble]:
    """Return the steps whose Job may not be created or resumed at this moment, and why."""
    released = gpus_released(run, observed, work)
    idle = {step: job for step, job in jobs.items() if not _may_work(run, step, job, servers, released)}
    found = {step: _obstacle(run, observed, work, step, job, servers) for step, job in idle.items()}
    return {step: trouble for step, trouble in found.items() if trouble is not None}


def _may_work(run: DAggerRun, step: Step, job: Child | None, servers: Servers, released: bool) -> bool:
    """Whether a Job keeps running: it was started before, and what it queries is still there."""
    if job is None or job.deleting or (released and step.stage in ASKS_SERVERS):
        return False
    if job.state in (ChildState.WAITING, ChildState.RUNNING, ChildState.SUSPENDED) and _nowhere_to_publish(step, servers) is not None:
        return False
    # A Job in a queue is suspended by whoever admits it.
    return job.state is not ChildState.SUSPENDED or run.spec.kueue is not None


def _obstacle(run: DAggerRun, observed: Observed, work: Work, step: Step, job: Child | None, servers: Servers) -> Trouble | None:
    if job is not None and job.deleting:
        return _held_up(run, observed, Reason.LEFTOVERS_STOPPING, f"Job {job.name} is being deleted", [job])
    same = [one for one in observed.children if (one.round, one.component) == (step.round, step.stage) and one is not job]
    if leftovers := [one for one in same if one.holds]:
        return _held_up(run, observed, Reason.LEFTOVERS_STOPPING, f"an earlier attempt has not stopped yet: {_named(leftovers)}", leftovers)
    shared = run.spec.gpu_sharing is GpuSharing.TIME_SHARED
    if work.beside is not None and waits_for_evaluation(run.spec, step.stage):
        return Trouble(Reason.WAITING_FOR_EVALUATION, f"evaluation of round {work.beside.round} still asks the student as it is")
    if shared and (holding := _holding(observed, step)):
        return _held_up(run, observed, Reason.WAITING_FOR_GPUS, f"still held by {_named(holding)}", holding)
    return servers_trouble(servers) if step.stage in ASKS_SERVERS else _nowhere_to_publish(step, servers)


def _held_up(run: DAggerRun, observed: Observed, reason: Reason, message: str, by: Iterable[Child]) -> Trouble:
    """Return the trouble of a step that waits for others to end, with the reason if one of them never will by itself. Its time counts from
    when this run began to wait, not from when that child was lost."""
    lost = next((one.lost for one in sorted(by, key=lambda one: one.name) if one.lost is not None), None)
    if lost is None:
        return Trouble(reason, message)
    return Trouble(lost.reason, f"{message}: {lost.message}", waited_since(run.status, lost.reason, observed.now))


def _nowhere_to_publish(step: Step, servers: Servers) -> Trouble | None:
    """Return why a pod of the student has no node: publish would only spend its deadline. It waits for nothing else, since a server that
    has its node may need the new weights to become ready."""
    student = servers.get(Role.STUDENT) if step.stage is StageName.PUBLISH else None
    return None if student is None else student.unplaced


def servers_trouble(servers: Servers) -> Trouble | None:
    """Return why a server does not answer yet; None if all are ready."""
    for role, server in servers.items():
        if server is None or server.state is not ChildState.READY:
            known = server.trouble if server else None
            return known or Trouble(Reason.SERVERS_STARTING, f"the {role}'s server is starting")
    return None


def gpus_released(run: DAggerRun, observed: Observed, work: Work) -> bool:
    """Whether servers leave their GPUs to training: it is next and nothing queries them any more, or it has not stopped yet."""
    if run.spec.gpu_sharing is not GpuSharing.TIME_SHARED:
        return False
    trains = work.step.stage is StageName.TRAINING and work.beside is None
    return trains or any(one.component == StageName.TRAINING and one.holds for one in observed.children)


def _holding(observed: Observed, step: Step) -> list[Child]:
    """Return which children hold the GPUs that a step needs under TimeShared."""
    components: tuple[str, ...] = tuple(Role) if step.stage is StageName.TRAINING else (StageName.TRAINING,)
    return [one for one in observed.children if one.component in components and one.holds]


def _named(children: Iterable[Child]) -> str:
    return ", ".join(sorted(f"{one.kind} {one.name}" for one in children))
