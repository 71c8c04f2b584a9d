"""The identity of workers: the ServiceAccount of stages that create sandbox pods, and its rights in the sandbox namespace."""

from typing import Any

from dagger_operator.api import DAggerRun, SandboxBackend
from dagger_operator.control.names import MANAGED_BY, MANAGED_BY_VALUE, RUN, RUN_NAMESPACE, labels
from dagger_operator.control.pods import owned
from dagger_operator.control.rounds import StageName

WORKER_ROLE = "dagger-sandbox-worker"
"""Role in the sandbox namespace; the chart creates it."""
WORKER = "worker"
"""Component of objects shared by all stages with workers."""


def sandbox_namespace(run: DAggerRun, stage: StageName) -> str | None:
    """Return the namespace in which a stage creates sandbox pods; None if it creates none."""
    if stage not in (StageName.ROLLOUT, StageName.EVALUATION) or run.spec.sandbox.backend is SandboxBackend.PROCESS:
        return None
    return run.spec.sandbox.namespace


def worker_account(run: DAggerRun) -> str:
    """Return the name of the ServiceAccount: the run's own, unless the user gives one, such as a cloud's workload identity."""
    return run.spec.rollouts.pod.service_account_name or f"{run.metadata.name}-worker"


def build_identity(run: DAggerRun, namespace: str) -> list[dict[str, Any]]:
    """Return the ServiceAccount, and its RoleBinding in the sandbox namespace. The binding has no owner, since that would have to be in the
    same namespace: the operator removes bindings whose run is gone."""
    own = labels(run, WORKER, 0, "")
    account = {"kind": "ServiceAccount", "name": worker_account(run), "namespace": run.metadata.namespace}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {
            "name": f"{run.metadata.namespace}.{run.metadata.name}.worker",
            "namespace": namespace,
            "labels": {MANAGED_BY: MANAGED_BY_VALUE, RUN: run.metadata.name, RUN_NAMESPACE: run.metadata.namespace},
        },
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": WORKER_ROLE},
        "subjects": [account],
    }
    if run.spec.rollouts.pod.service_account_name is not None:
        return [binding]
    return [{**owned(run, "v1", "ServiceAccount", worker_account(run), own), "automountServiceAccountToken": False}, binding]
