"""The plan: what should exist, what should go, what to report, when to look again.

Pure. It may be asked at any moment, twice, by two controllers, with children observed a while ago: the same input gives the same
plan, and every Job that it asks for has a name that says what is inside.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dagger_operator.api import DAggerRun, GpuSharing, Phase, RunStatus, Serving
from dagger_operator.control.conditions import Event, Reason, events, running
from dagger_operator.control.gates import Servers, failure, obstacle, training_holds_gpus
from dagger_operator.control.jobs import build_job, build_training_service
from dagger_operator.control.names import ATTEMPT, FAILED, Ref, Role, server_name
from dagger_operator.control.observe import Child, ChildState, Observed, Trouble
from dagger_operator.control.rounds import StageName, Step, before, next_step, rollouts_remain
from dagger_operator.control.servers import build_deployment, build_service, served
from dagger_operator.control.status import Situation, blind, report, since

LOOK_AGAIN = 10.0
"""Seconds. Results in object storage announce themselves to nobody."""
LOOK_AGAIN_SOON = 2.0

_PHASES = {
    StageName.PREPARE: Phase.PREPARING,
    StageName.PREFLIGHT: Phase.PREFLIGHT,
    StageName.ROLLOUT: Phase.ROLLOUT,
    StageName.TRAINING: Phase.TRAINING,
    StageName.PUBLISH: Phase.PUBLISHING,
    StageName.EVALUATION: Phase.EVALUATION,
}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Observed objects that neither `objects` nor `remove` names are left alone."""

    objects: tuple[Manifest, ...]
    """Should exist in this form; apply each."""
    remove: tuple[Ref, ...]
    """Should go, in the foreground: an object stays until its pods are gone."""
    status: RunStatus
    requeue_after: float | None
    """Seconds; None where only a change can change the plan."""
    events: tuple[Event, ...] = ()
    """To be told once the status is written."""
    expired: bool = False
    """The run itself is to be deleted: its `ttlSecondsAfterFinished` is over."""


def plan(run: DAggerRun, observed: Observed) -> Plan:
    """Decides from nothing but its arguments."""
    if run.metadata.deletion_timestamp is not None:
        return Plan((), tuple(child.ref for child in observed.children if not child.deleting), run.status or RunStatus(), None)
    if observed.storage_problem is not None:
        return _without_results(run, observed, observed.storage_problem)

    step = next_step(run.spec, observed.results)
    if step is None:
        done = Situation(Phase.SUCCEEDED, run.spec.rounds, Reason.ROUNDS_DONE, f"all {run.spec.rounds} rounds are done")
        return _close(run, observed, None, None, [], done, {})

    deployments = {role: build_deployment(run, role, serving, replicas=serving.replicas) for role, serving in _needed(run, step).items()}
    servers = {role: _observed_server(observed, manifest) for role, manifest in deployments.items()}
    job = build_job(run, step, observed.results)
    current = _find(observed, "Job", job["metadata"]["name"])

    if (failed := failure(observed, step, current, servers)) is not None:
        situation = Situation(Phase.FAILED, step.round, failed.reason, f"{_place(run, step)}: {failed.message}")
        return _stand_still(run, observed, step, current, servers, situation)
    if run.spec.suspend:
        situation = Situation(Phase.SUSPENDED, step.round, Reason.SUSPENDED, f"{_place(run, step)}: set spec.suspend to false to go on")
        return _stand_still(run, observed, step, current, servers, situation)

    released = run.spec.gpu_sharing is GpuSharing.TIME_SHARED and (step.stage is StageName.TRAINING or training_holds_gpus(observed))
    objects = [_scaled_to_zero(one) if released else one for one in deployments.values()]
    objects += [build_service(run, role) for role in deployments]
    if step.stage is StageName.TRAINING and run.spec.training.nodes > 1:
        objects.append(build_training_service(run))

    blocked = None
    if current is None or current.deleting or current.state is ChildState.SUSPENDED:
        blocked = obstacle(run, observed, step, current, servers)
    if blocked is None:
        objects.append(job)
        situation = _working(run, step, current)
    else:
        situation = _waiting(run, step, blocked)
        if current is not None and not current.deleting:
            objects.append(build_job(run, step, observed.results, suspend=True))
    return _close(run, observed, step, current, objects, situation, {} if released else servers)


def _needed(run: DAggerRun, step: Step) -> dict[Role, Serving]:
    """Serving settings of the policies that are served here and asked in this step or after it."""
    if step.stage is StageName.PREPARE:
        return {}
    wanted = {Role.STUDENT: True, Role.TEACHER: rollouts_remain(run.spec, step)}
    return {role: serving for role in Role if wanted[role] and (serving := served(run, role)) is not None}


def _stand_still(run: DAggerRun, observed: Observed, step: Step, current: Child | None, servers: Servers, situation: Situation) -> Plan:
    """Frees what the run holds and keeps what it was doing: its Job suspended, its servers at zero, a failure where it can be seen."""
    objects: list[Manifest] = []
    for role, serving in _needed(run, step).items():
        server = servers.get(role)
        if server is not None and server.state is ChildState.FAILED:
            said = server.trouble or Trouble("ServerFailed")
            note = {FAILED: json.dumps({"reason": said.reason, "message": said.message})}
            objects.append(build_deployment(run, role, serving, replicas=0, annotations=note))
        elif _find(observed, "Deployment", server_name(run, role)) is not None:
            objects.append(build_deployment(run, role, serving, replicas=0))
    objects += [build_service(run, role) for role in _needed(run, step) if _find(observed, "Service", server_name(run, role)) is not None]
    if current is not None and current.state in (ChildState.WAITING, ChildState.RUNNING, ChildState.SUSPENDED) and not current.deleting:
        objects.append(build_job(run, step, observed.results, suspend=True))
    return _close(run, observed, step, current, objects, situation, {})


def _without_results(run: DAggerRun, observed: Observed, problem: str) -> Plan:
    """Nothing is known about progress: what exists stays, nothing is started; suspension needs no results and is honoured."""
    objects: list[Manifest] = []
    remove: list[Ref] = []
    if run.spec.suspend:
        for role in Role:
            serving = served(run, role)
            if serving is not None and _find(observed, "Deployment", server_name(run, role)) is not None:
                objects.append(build_deployment(run, role, serving, replicas=0))
        # Nothing is lost with a Job: its stage does what is left when it is made again.
        remove = [child.ref for child in observed.children if child.kind == "Job" and child.holds and not child.deleting]
    status = blind(run, problem, observed.now)
    return Plan(tuple(objects), tuple(sorted(remove)), status, LOOK_AGAIN, _news(run, status))


def _close(
    run: DAggerRun,
    observed: Observed,
    step: Step | None,
    current: Child | None,
    objects: Sequence[Manifest],
    situation: Situation,
    servers: Servers,
) -> Plan:
    status = report(run, observed, situation, servers)
    requeue: float | None = LOOK_AGAIN
    expired = False
    if situation.ended and run.spec.ttl_seconds_after_finished is not None and status.completion_time is not None:
        left = status.completion_time + timedelta(seconds=run.spec.ttl_seconds_after_finished) - observed.now
        requeue, expired = max(0.0, left.total_seconds()), left <= timedelta(0)
    elif situation.ended or situation.phase is Phase.SUSPENDED:
        requeue = None
    elif current is not None and current.state is ChildState.SUCCEEDED:
        requeue = LOOK_AGAIN_SOON  # its result is about to be seen
    return Plan(tuple(objects), _unwanted(run, observed, step, current, objects), status, requeue, _news(run, status), expired)


def _unwanted(run: DAggerRun, observed: Observed, step: Step | None, current: Child | None, objects: Sequence[Manifest]) -> tuple[Ref, ...]:
    """Leftovers: servers that nobody asks, Jobs of other attempts, and Jobs of stages that were done long ago."""
    wanted = {(one["kind"], one["metadata"]["name"]) for one in objects}
    leftovers = [
        child.ref
        for child in observed.children
        if child is not current
        and not child.deleting
        and (child.kind, child.name) not in wanted
        and child.kind != "Pod"  # what it belonged to is gone, or not seen yet; the cluster collects it
        and not (child.kind == "Job" and _may_stay(run, observed, step, child))
    ]
    return tuple(sorted(leftovers))


def _may_stay(run: DAggerRun, observed: Observed, step: Step | None, job: Child) -> bool:
    """Whether the Job of a stage that is done is left alone: while it winds up, and then for its logs until two rounds on."""
    if not observed.results.has(job.round, job.component):
        return False
    if not job.holds:
        return job.round >= (step.round if step else run.spec.rounds) - 1
    holds_gpus_back = run.spec.gpu_sharing is GpuSharing.TIME_SHARED and job.component == StageName.TRAINING
    previous = before(run.spec, step)
    return previous == Step(job.round, StageName(job.component)) and not holds_gpus_back


def _news(run: DAggerRun, status: RunStatus) -> tuple[Event, ...]:
    return events(run.status.conditions if run.status else (), status.conditions)


def _working(run: DAggerRun, step: Step, job: Child | None) -> Situation:
    place = _place(run, step)
    if job is not None and job.state is ChildState.WAITING and job.trouble is not None:
        return Situation(_PHASES[step.stage], step.round, job.trouble.reason, f"{place} waits: {since(job.trouble)}")
    if job is not None and job.state in (ChildState.RUNNING, ChildState.SUCCEEDED):
        return Situation(_PHASES[step.stage], step.round, running(step.stage), place, progressing=True)
    return Situation(_PHASES[step.stage], step.round, Reason.STAGE_STARTING, place, progressing=True)


def _waiting(run: DAggerRun, step: Step, blocked: Trouble) -> Situation:
    return Situation(_PHASES[step.stage], step.round, blocked.reason, f"{_place(run, step)} waits: {since(blocked)}")


def _place(run: DAggerRun, step: Step) -> str:
    return f"round {step.round} of {run.spec.rounds}, {step.stage}" if step.round else str(step.stage)


def _find(observed: Observed, kind: str, name: str) -> Child | None:
    return next((child for child in observed.children if (child.kind, child.name) == (kind, name)), None)


def _observed_server(observed: Observed, manifest: Manifest) -> Child | None:
    """A Deployment as it is observed; None where what is observed is another attempt."""
    found = _find(observed, "Deployment", manifest["metadata"]["name"])
    return found if found is not None and found.attempt == manifest["metadata"]["labels"][ATTEMPT] else None


def _scaled_to_zero(manifest: Manifest) -> Manifest:
    return {**manifest, "spec": {**manifest["spec"], "replicas": 0}}
