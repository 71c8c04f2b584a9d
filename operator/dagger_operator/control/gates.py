"""What stands in a step's way, and what has failed for good."""

from collections.abc import Iterable, Mapping
from datetime import timedelta

from dagger_operator.api import DAggerRun, GpuSharing
from dagger_operator.control.conditions import Reason
from dagger_operator.control.names import Role
from dagger_operator.control.observe import Child, ChildState, Observed, Trouble
from dagger_operator.control.rounds import StageName, Step

RESULT_GRACE = timedelta(seconds=60)
"""A Job that succeeded wrote its result before it ended; one that cannot be seen for this long is not there."""

_NEEDS_SERVERS = frozenset({StageName.PREFLIGHT, StageName.ROLLOUT, StageName.EVALUATION})
"""Stages that start once the servers answer. Publish does not: it is what brings servers to a version, and waits itself."""

Servers = Mapping[Role, Child | None]
"""The policies served here that a step needs, with their Deployment of the current attempt where one is observed."""


def failure(observed: Observed, step: Step, job: Child | None, servers: Servers) -> Trouble | None:
    """What a retry would not mend: a failed Job, a server that was given up, a result that is not there."""
    if job is not None and job.state is ChildState.FAILED and not job.deleting:
        return job.trouble or Trouble("JobFailed", f"Job {job.name} failed")
    if job is not None and job.state is ChildState.SUCCEEDED and job.finished and observed.now - job.finished > RESULT_GRACE:
        return Trouble(
            Reason.RESULT_MISSING,
            f"Job {job.name} succeeded, but its result is not in storage: look whether something removes objects there "
            f"(`daggerctl store fsck`), then delete the Job or resume the run to have the {step.stage} stage done again",
        )
    for server in servers.values():
        if server is not None and server.state is ChildState.FAILED:
            return server.trouble or Trouble("ServerFailed", f"Deployment {server.name} failed")
    return None


def obstacle(run: DAggerRun, observed: Observed, step: Step, job: Child | None, servers: Servers) -> Trouble | None:
    """Why a step's Job may not be made, or not be resumed, at this moment."""
    if job is not None and job.deleting:
        return Trouble(Reason.LEFTOVERS_STOPPING, f"Job {job.name} is being deleted")
    same = [one for one in observed.children if (one.round, one.component) == (step.round, step.stage) and one is not job]
    if leftovers := [one for one in same if one.holds]:
        return Trouble(Reason.LEFTOVERS_STOPPING, f"an earlier attempt has not stopped yet: {_named(leftovers)}")
    if run.spec.gpu_sharing is GpuSharing.TIME_SHARED and (holding := _holding(observed, step)):
        return Trouble(Reason.WAITING_FOR_GPUS, f"still held by {_named(holding)}")
    return servers_trouble(servers) if step.stage in _NEEDS_SERVERS else None


def servers_trouble(servers: Servers) -> Trouble | None:
    """Why a server does not answer yet; None where all are ready."""
    for role, server in servers.items():
        if server is None or server.state is not ChildState.READY:
            known = server.trouble if server else None
            return known or Trouble(Reason.SERVERS_STARTING, f"the {role}'s server is starting")
    return None


def training_holds_gpus(observed: Observed) -> bool:
    return any(one.component == StageName.TRAINING and one.holds for one in observed.children)


def _holding(observed: Observed, step: Step) -> list[Child]:
    """Under TimeShared: who holds the GPUs that a step is to have."""
    components: tuple[str, ...] = tuple(Role) if step.stage is StageName.TRAINING else (StageName.TRAINING,)
    return [one for one in observed.children if one.component in components and one.holds]


def _named(children: Iterable[Child]) -> str:
    return ", ".join(sorted(f"{one.kind} {one.name}" for one in children))
