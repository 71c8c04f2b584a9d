"""Which pods may reach a run's servers and its trainings."""

from collections.abc import Iterable
from typing import Any

from dagger_operator.api import DAggerRun, Role
from dagger_operator.api.ports import AGENT_PORT, METRICS_PORT
from dagger_operator.control.names import COMPONENT, MANAGED_BY, MANAGED_BY_VALUE, RUN, labels
from dagger_operator.control.pods import owned
from dagger_operator.control.rounds import StageName

SERVING = "serving"
"""Component of objects shared by the servers of both policies."""
Peer = dict[str, Any]
"""An entry below `from` in a NetworkPolicy."""
PROMETHEUS: tuple[Peer, ...] = ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}},)


def build_network_policy(run: DAggerRun, scrapers: Iterable[Peer] = PROMETHEUS) -> dict[str, Any]:
    """Return the policy by which serving pods accept requests only from this run's pods, and scrapes from `scrapers`. Probes come from the
    node and pass."""
    own_pods = _pods_of(run)
    roles = [{"key": COMPONENT, "operator": "In", "values": sorted(Role)}]
    servers = {**own_pods, "matchExpressions": roles}
    ingress: list[dict[str, Any]] = [
        {
            "from": [{"podSelector": own_pods}, *scrapers],
            "ports": [{"port": AGENT_PORT, "protocol": "TCP"}],
        }
    ]
    if run.spec.teacher.serving is not None and run.spec.teacher.serving.nodes > 1:
        ingress.append({"from": [{"podSelector": servers}]})  # the nodes of one replica communicate on ports that they choose themselves
    return _policy(run, SERVING, servers, ingress)


def build_training_policy(run: DAggerRun, scrapers: Iterable[Peer] = PROMETHEUS) -> dict[str, Any]:
    """Return the policy by which the pods of a training accept connections only from each other, and scrapes from `scrapers`.

    Whoever reaches rank 0's store could run code in every rank: it asks for no authentication, ranks find each other by what it contains,
    and they exchange pickled objects. On one node too it listens on all of the pod's addresses, whatever address it was given.
    """
    ranks = _pods_of(run)
    ranks["matchLabels"][COMPONENT] = StageName.TRAINING
    # Ranks choose most of their ports themselves.
    ingress: list[dict[str, Any]] = [{"from": [{"podSelector": ranks}]}]
    if peers := list(scrapers):  # an empty list of peers would mean everybody
        ingress.append({"from": peers, "ports": [{"port": METRICS_PORT, "protocol": "TCP"}]})
    return _policy(run, StageName.TRAINING, ranks, ingress)


def _pods_of(run: DAggerRun) -> dict[str, Any]:
    return {"matchLabels": {MANAGED_BY: MANAGED_BY_VALUE, RUN: run.metadata.name}}


def _policy(run: DAggerRun, component: str, pods: dict[str, Any], ingress: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **owned(run, "networking.k8s.io/v1", "NetworkPolicy", f"{run.metadata.name}-{component}", labels(run, component, 0, "")),
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress},
    }
