"""A stopped run: suspended, failed, or without access to its results. It frees what it holds and keeps what it was doing."""

import json
from typing import Any

from dagger_operator.api import DAggerRun, Keep, Role
from dagger_operator.control.child import SERVERS, Child, ChildState
from dagger_operator.control.gates import Failure, Jobs, Servers
from dagger_operator.control.jobs import build_job
from dagger_operator.control.leftovers import kept
from dagger_operator.control.names import FAILED, Ref
from dagger_operator.control.observe import Observed
from dagger_operator.control.rounds import Work
from dagger_operator.control.servers import build_server, served, server_of
from dagger_operator.control.wanted import find, needed

Manifest = dict[str, Any]
_AT_WORK = (ChildState.WAITING, ChildState.RUNNING, ChildState.SUSPENDED)


def at_a_standstill(
    run: DAggerRun, observed: Observed, work: Work, jobs: Jobs, servers: Servers, failed: Failure | None
) -> tuple[list[Manifest], list[Child]]:
    """Return the objects to apply, and the children that stay as they are. A failure is recorded where it can be seen: on the child that
    failed."""
    keep = kept(run, failed)
    objects = _servers(run, observed, work, servers, failed, keep)
    costs_something = ("Job", *SERVERS)
    stay = [one for one in observed.children if one.kind not in costs_something and keep is not Keep.NOTHING]
    for step, job in jobs.items():
        if job is None:
            continue
        if failed is not None and failed.child is job:
            stay.append(job)
            if job.state in _AT_WORK:
                objects.append(build_job(run, step, observed.results, given_up=failed.trouble))
        elif keep is not Keep.NOTHING:
            if job.state not in _AT_WORK or job.deleting:
                stay.append(job)
            elif run.spec.kueue is None:
                stay.append(job)
                objects.append(build_job(run, step, observed.results, suspend=True))
            elif failed is not None and failed.refused and not run.spec.suspend:
                stay.append(job)  # it counts in the full quota, as in `kept`
            # Otherwise a Job that a queue may start at any moment is removed and created again later: its stage does what is left.
    return objects, stay


def _servers(run: DAggerRun, observed: Observed, work: Work, servers: Servers, failed: Failure | None, keep: Keep) -> list[Manifest]:
    objects = []
    for role, serving in needed(run, work).items():
        server = find(observed, *server_of(run, role, serving))
        stays_up = keep is Keep.EVERYTHING and server is not None and server.state is not ChildState.SUSPENDED
        replicas = serving.replicas if stays_up else 0
        current = servers.get(role)
        if failed is not None and current is not None and (failed.child is current or current.state is ChildState.FAILED):
            trouble = current.trouble if current.state is ChildState.FAILED and current.trouble else failed.trouble
            note = {FAILED: json.dumps({"reason": trouble.reason, "message": trouble.message})}
            objects.append(build_server(run, role, serving, replicas=replicas, annotations=note))
        elif server is not None and keep is not Keep.NOTHING:
            objects.append(build_server(run, role, serving, replicas=replicas))
    return objects


def without_results(run: DAggerRun, observed: Observed, *, late: bool) -> tuple[tuple[Manifest, ...], tuple[Ref, ...]]:
    """Return what to apply and remove while nothing is known about progress: what exists stays, nothing is started. Suspension and deadline
    do not depend on progress and are honoured."""
    if not run.spec.suspend and not late:
        return (), ()
    objects = []
    stay_up = not run.spec.suspend and run.spec.failure_policy.keep is Keep.EVERYTHING
    for role in () if stay_up else Role:
        serving = served(run, role)
        if serving is not None and find(observed, *server_of(run, role, serving)) is not None:
            objects.append(build_server(run, role, serving, replicas=0))
    # Nothing is lost with a Job: its stage does what is left when it is created again.
    remove = [child.ref for child in observed.children if child.kind == "Job" and child.holds and not child.deleting]
    return tuple(objects), tuple(sorted(remove))
