"""The plan: what should exist, what should be removed, what to report, when to look again.

Pure. It may be called at any moment, twice, by two controllers, with slightly old observations: the same input gives the same plan, and the
name of every Job that it wants identifies its content.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from dagger_operator.api import DAggerRun, Phase, RunStatus
from dagger_operator.control.child import Child, ChildState, Trouble
from dagger_operator.control.conditions import Event, Reason, events
from dagger_operator.control.gates import Failure, Jobs, Servers, active_deadline, blocked, failure, gpus_released, overdue
from dagger_operator.control.jobs import build_job
from dagger_operator.control.leftovers import leftovers
from dagger_operator.control.names import Ref
from dagger_operator.control.observe import Observed
from dagger_operator.control.remedies import within_quota
from dagger_operator.control.rounds import Work, next_steps
from dagger_operator.control.servers import build_server
from dagger_operator.control.situation import Situation, at_work, place
from dagger_operator.control.standing import at_a_standstill, without_results
from dagger_operator.control.status import blind, report, succeeded
from dagger_operator.control.wanted import build_all, build_support, needed, observed_jobs, observed_servers

LOOK_AGAIN = 10.0
"""Seconds. Results in object storage cause no notification."""
LOOK_AGAIN_SOON = 2.0

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Observed objects that are in neither `objects` nor `remove` are left alone."""

    objects: tuple[Manifest, ...]
    """Should exist in this form; apply each."""
    remove: tuple[Ref, ...]
    """Should be removed, with foreground deletion: an object stays until its pods are gone."""
    status: RunStatus
    requeue_after: float | None
    """Seconds; None if only a change can change the plan."""
    events: tuple[Event, ...] = ()
    """To be emitted once the status is written."""
    asked: tuple[Manifest, ...] = ()
    """To be applied as a dry run only: a run that failed because of a refusal continues once the API server would accept all of them."""
    expired: bool = False
    """The run itself is to be deleted: its `ttlSecondsAfterFinished` has passed."""


def plan(run: DAggerRun, observed: Observed) -> Plan:
    """Return the plan, which depends on the arguments only."""
    if run.metadata.deletion_timestamp is not None:
        # The cluster collects pods without an owner.
        made = tuple(child.ref for child in observed.children if not child.deleting and child.kind != "Pod")
        return Plan((), made, run.status or RunStatus(), None)
    if run.status is not None and run.status.phase is Phase.SUCCEEDED and run.status.round >= run.spec.rounds:
        # Final: whoever clears storage after the end, or loses it, does not want the run to start over.
        status = succeeded(run, _done(run.status.round), observed.now)
        return _ended(run, observed, (), leftovers(run, observed, None, []), status)
    if observed.storage_problem is not None:
        late = overdue(run, observed.now)
        objects, remove = without_results(run, observed, late=late is not None)
        status = blind(run, observed.storage_problem, observed.now, late)
        if status.phase is Phase.FAILED:
            ended = _ended(run, observed, objects, remove, status)
            return replace(ended, requeue_after=LOOK_AGAIN if ended.requeue_after is None else min(LOOK_AGAIN, ended.requeue_after))
        return Plan(objects, remove, status, LOOK_AGAIN, news(run.status, status))

    work = next_steps(run.spec, observed.results)
    if work is None:
        return _close(run, observed, None, [], leftovers(run, observed, None, []), _done(run.spec.rounds), {})

    if observed.refused is not None:
        observed = replace(observed, refused=within_quota(observed.refused, work.step.stage))
    servers = observed_servers(run, observed, work)
    jobs = observed_jobs(run, observed, work)
    if (failed := failure(run, observed, work, jobs, servers)) is not None:
        situation = Situation(Phase.FAILED, work.step.round, failed.trouble.reason, f"{place(run, failed.step)}: {failed.trouble.message}")
        stands = _stand_still(run, observed, work, jobs, servers, situation, failed)
        return replace(stands, asked=tuple(build_all(run, observed, work))) if failed.refused else stands
    if run.spec.suspend:
        message = f"{place(run, work.step)}: set spec.suspend to false to go on"
        situation = Situation(Phase.SUSPENDED, work.step.round, Reason.SUSPENDED, message)
        return _stand_still(run, observed, work, jobs, servers, situation, None)
    return _go_on(run, observed, work, jobs, servers)


def _done(rounds: int) -> Situation:
    return Situation(Phase.SUCCEEDED, rounds, Reason.ROUNDS_DONE, f"all {rounds} rounds are done")


def _go_on(run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers) -> Plan:
    released = gpus_released(run, observed, work)
    objects = build_support(run, observed, work)
    objects += [
        build_server(run, role, serving, replicas=0 if released else serving.replicas) for role, serving in needed(run, work).items()
    ]
    waits = blocked(run, observed, work, jobs, servers)
    for step, job in jobs.items():
        if step not in waits:
            objects.append(build_job(run, step, observed.results))
        elif job is not None and not job.deleting and not _makes_room(run, waits[step]):
            objects.append(build_job(run, step, observed.results, suspend=True))
    situation = at_work(run, observed, work, jobs, waits)
    keep = [job for step, job in jobs.items() if job is not None and not (step in waits and _makes_room(run, waits[step]))]
    return _close(run, observed, work, objects, leftovers(run, observed, work, objects, keep), situation, {} if released else servers)


def _makes_room(run: DAggerRun, waits: Trouble) -> bool:
    """Whether a Job that may not run is removed instead of suspended: Kueue would start it; and an evaluation that has to come first may
    need the GPUs for which it would stay in the queue."""
    return run.spec.kueue is not None or waits.reason == Reason.WAITING_FOR_EVALUATION


def _stand_still(
    run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers, situation: Situation, failed: Failure | None
) -> Plan:
    objects, keep = at_a_standstill(run, observed, work, jobs, servers, failed)
    return _close(run, observed, work, objects, leftovers(run, observed, work, objects, keep, failed=failed), situation, {})


def _close(
    run: DAggerRun,
    observed: Observed,
    work: Work | None,
    objects: Sequence[Manifest],
    remove: tuple[Ref, ...],
    situation: Situation,
    servers: Servers,
) -> Plan:
    status = report(run, observed, work, situation, servers)
    if situation.ended:
        return _ended(run, observed, objects, remove, status)
    requeue: float | None = LOOK_AGAIN
    if situation.phase is Phase.SUSPENDED:
        deadline = active_deadline(run, status)  # suspended time counts
        requeue = None if deadline is None else (deadline - observed.now).total_seconds()
    elif any(child.state is ChildState.SUCCEEDED for child in observed.children if work and _is_at_work(work, child)):
        requeue = LOOK_AGAIN_SOON  # its result will be visible soon
    return Plan(tuple(objects), remove, status, requeue, news(run.status, status))


def _ended(run: DAggerRun, observed: Observed, objects: Sequence[Manifest], remove: tuple[Ref, ...], status: RunStatus) -> Plan:
    """Return the plan of a finished run, which waits only for the end of its time to live."""
    requeue, expired = None, False
    if run.spec.ttl_seconds_after_finished is not None and status.completion_time is not None:
        left = status.completion_time + timedelta(seconds=run.spec.ttl_seconds_after_finished) - observed.now
        requeue, expired = max(0.0, left.total_seconds()), left <= timedelta(0)
    return Plan(tuple(objects), remove, status, requeue, news(run.status, status), expired=expired)


def _is_at_work(work: Work, child: Child) -> bool:
    return any((step.round, step.stage) == (child.round, child.component) for step in work)


def news(before: RunStatus | None, status: RunStatus) -> tuple[Event, ...]:
    """Return the events that a new status causes."""
    return events(before.conditions if before else (), status.conditions)
