"""Which pods may reach a run's servers."""

from collections.abc import Iterable
from typing import Any

from dagger_operator.api import DAggerRun, Role
from dagger_operator.api.ports import AGENT_PORT
from dagger_operator.control.names import COMPONENT, MANAGED_BY, MANAGED_BY_VALUE, RUN, labels
from dagger_operator.control.pods import owned

SERVING = "serving"
"""Component of objects shared by the servers of both policies."""
Peer = dict[str, Any]
"""An entry below `from` in a NetworkPolicy."""
PROMETHEUS: tuple[Peer, ...] = ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}},)


def build_network_policy(run: DAggerRun, scrapers: Iterable[Peer] = PROMETHEUS) -> dict[str, Any]:
    """Return the policy by which serving pods accept requests only from this run's pods, and scrapes from `scrapers`. Probes come from the
    node and pass."""
    own_pods = {"matchLabels": {MANAGED_BY: MANAGED_BY_VALUE, RUN: run.metadata.name}}
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
    return {
        **owned(run, "networking.k8s.io/v1", "NetworkPolicy", f"{run.metadata.name}-serving", labels(run, SERVING, 0, "")),
        "spec": {"podSelector": servers, "policyTypes": ["Ingress"], "ingress": ingress},
    }
