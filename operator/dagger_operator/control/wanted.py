"""What the current work needs besides its Jobs: servers, names, rights."""

from typing import Any

from dagger_operator.api import DAggerRun, Role, Serving
from dagger_operator.control.child import Child
from dagger_operator.control.gates import Jobs, Servers
from dagger_operator.control.identity import build_identity, sandbox_namespace
from dagger_operator.control.jobs import build_job, build_training_service
from dagger_operator.control.names import ATTEMPT
from dagger_operator.control.network import build_network_policy, build_training_policy
from dagger_operator.control.observe import Observed
from dagger_operator.control.rounds import StageName, Work
from dagger_operator.control.servers import build_server, build_service, served, server_of

Manifest = dict[str, Any]


def needed(run: DAggerRun, work: Work) -> dict[Role, Serving]:
    """Return the serving settings of the policies that are served by the run and queried in this step or after it."""
    if work.step.stage is StageName.PREPARE:
        return {}
    wanted = {Role.STUDENT: True, Role.TEACHER: work.rollouts_remain}
    return {role: serving for role in Role if wanted[role] and (serving := served(run, role)) is not None}


def build_support(run: DAggerRun, observed: Observed, work: Work) -> list[Manifest]:
    """Return what Jobs and servers depend on; it is applied before them."""
    servers = needed(run, work)
    support = [build_service(run, role, serving) for role, serving in servers.items()]
    if servers:
        support.append(build_network_policy(run, observed.scrapers))
    trains = StageName.TRAINING in {step.stage for step in work}
    if trains and run.spec.training.nodes > 1:
        support.append(build_training_service(run))
    # Ranks listen until they have ended, also when the result is there.
    if trains or any(child.component == StageName.TRAINING and child.holds for child in observed.children):
        support.append(build_training_policy(run, observed.scrapers))
    if namespace := next(filter(None, (sandbox_namespace(run, step.stage) for step in work)), None):
        support += build_identity(run, namespace)
    return support


def build_all(run: DAggerRun, observed: Observed, work: Work) -> list[Manifest]:
    """Return everything that the current work needs, with every server up and whatever blocks a Job."""
    servers = [build_server(run, role, serving, replicas=serving.replicas) for role, serving in needed(run, work).items()]
    return [*build_support(run, observed, work), *servers, *(build_job(run, step, observed.results) for step in work)]


def find(observed: Observed, kind: str, name: str) -> Child | None:
    return next((child for child in observed.children if (child.kind, child.name) == (kind, name)), None)


def observed_jobs(run: DAggerRun, observed: Observed, work: Work) -> Jobs:
    """Return the current steps with their Jobs, if they exist."""
    return {step: find(observed, "Job", build_job(run, step, observed.results)["metadata"]["name"]) for step in work}


def observed_servers(run: DAggerRun, observed: Observed, work: Work) -> Servers:
    """Return the servers that are needed, if they exist; one of another attempt does not count."""
    servers: dict[Role, Child | None] = {}
    for role, serving in needed(run, work).items():
        attempt = build_server(run, role, serving, replicas=0)["metadata"]["labels"][ATTEMPT]
        found = find(observed, *server_of(run, role, serving))
        servers[role] = found if found is not None and found.attempt == attempt else None
    return servers
