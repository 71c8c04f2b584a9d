"""Servers: for each policy served by the run a Deployment, or a LeaderWorkerSet if a replica needs several nodes, with a headless
Service."""

from typing import Any

from dagger_operator.api import DAggerRun, Role, Serving
from dagger_operator.api.ports import AGENT_PORT
from dagger_operator.control.names import COMPONENT, MANAGED_BY, RUN, attempt_of, group_name, labels, server_name
from dagger_operator.control.pods import (
    SCRATCH,
    SHARED,
    WORKER_IMAGE,
    container,
    from_field,
    own_environment,
    own_secrets,
    owned,
    pod_spec,
    value,
)
from dagger_operator.control.scheduling import pod_template, queue_labels
from dagger_operator.control.vllm import vllm_command, vllm_environment

PROBE_SECONDS = 2
PATIENCE_SECONDS = 15
"""The agent waits ten seconds for vLLM's answer before it reports that vLLM does not respond."""


def served(run: DAggerRun, role: Role) -> Serving | None:
    """Return a policy's serving settings; None if it is an endpoint."""
    return run.spec.student.served if role is Role.STUDENT else run.spec.teacher.serving


def server_of(run: DAggerRun, role: Role, serving: Serving) -> tuple[str, str]:
    """Return kind and name of the object that runs a policy's servers."""
    return ("LeaderWorkerSet", group_name(run, role)) if serving.nodes > 1 else ("Deployment", server_name(run, role))


def build_server(
    run: DAggerRun, role: Role, serving: Serving, *, replicas: int, annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the servers of a policy. Their template contains nothing specific to a round, so they live through all rounds."""
    template = pod_template({}, _pod(run, role, serving), serving.pod, main="vllm")
    follower = pod_template({}, _follower(run, role, serving), serving.pod, main="vllm") if serving.nodes > 1 else None
    queue = queue_labels(run.spec.kueue)
    kind, name = server_of(run, role, serving)
    attempt = attempt_of(run, {"leader": template, "follower": follower, "queue": queue})
    own = labels(run, role, 0, attempt)
    for one in (template, follower):
        if one is not None:
            one["metadata"]["labels"] |= own
    head = own | queue, annotations
    if follower is not None:
        return {
            **owned(run, "leaderworkerset.x-k8s.io/v1", kind, name, *head),
            "spec": {
                "replicas": replicas,
                "leaderWorkerTemplate": {
                    "size": serving.nodes,
                    # An engine over several nodes does not survive the loss of any of them.
                    "restartPolicy": "RecreateGroupOnPodRestart",
                    "leaderTemplate": template,
                    "workerTemplate": follower,
                },
            },
        }
    return {
        **owned(run, "apps/v1", kind, name, *head),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 1,
            # Two generations at once would need twice the GPUs.
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": serving.startup_deadline_seconds + 60,
            "selector": {"matchLabels": _selector(own)},
            "template": template,
        },
    }


def build_service(run: DAggerRun, role: Role, serving: Serving) -> dict[str, Any]:
    """Return the Service whose name resolves to the address of every ready replica: of its first node, if it has several."""
    own = labels(run, role, 0, "")
    port = {"name": "http", "port": AGENT_PORT, "targetPort": AGENT_PORT}
    first = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if serving.nodes > 1 else {}
    return {
        **owned(run, "v1", "Service", server_name(run, role), own),
        "spec": {"clusterIP": "None", "selector": _selector(own) | first, "ports": [port]},
    }


def _selector(own: dict[str, str]) -> dict[str, str]:
    return {key: own[key] for key in (MANAGED_BY, RUN, COMPONENT)}


def _pod(run: DAggerRun, role: Role, serving: Serving) -> dict[str, Any]:
    vllm = _vllm(
        serving,
        vllm_command(serving),
        # The agent answers for vLLM, which listens on a Unix socket only.
        startupProbe=_probe("/health/server", failures=-(-serving.startup_deadline_seconds // PROBE_SECONDS)),
        # Longer than the agent takes to restart.
        livenessProbe=_probe("/health/server", failures=4, period=5, timeout=PATIENCE_SECONDS),
    )
    agent = _own_container(
        run,
        role,
        serving,
        "agent",
        requests={"cpu": "250m", "memory": "512Mi"},
        ports=[{"name": "http", "containerPort": AGENT_PORT}],
        readinessProbe=_probe("/health/ready", failures=1),
    )
    return pod_spec([vllm, agent], volumes=["shared", "scratch"], memory_volumes=["shm"], initContainers=[_weights(run, role, serving)])


def _follower(run: DAggerRun, role: Role, serving: Serving) -> dict[str, Any]:
    """Return the pod of a further node of a replica: the same weights, and workers of the first node's engine."""
    vllm = _vllm(serving, vllm_command(serving, follower=True))
    return pod_spec([vllm], volumes=["shared", "scratch"], memory_volumes=["shm"], initContainers=[_weights(run, role, serving)])


def _weights(run: DAggerRun, role: Role, serving: Serving) -> dict[str, Any]:
    return _own_container(run, role, serving, "weights", requests={"cpu": "100m", "memory": "1Gi"})


def _vllm(serving: Serving, command: list[str], **more: Any) -> dict[str, Any]:
    address = [from_field("VLLM_HOST_IP", "status.podIP")] if serving.nodes > 1 else []
    return container(
        "vllm",
        serving.image,
        command,
        [value("DAGGER_SHARED", SHARED), *address, *vllm_environment(serving)],
        mounts=[("shared", SHARED), ("scratch", SCRATCH), ("shm", "/dev/shm")],  # noqa: S108 - a mount of the pod's own
        gpus=serving.gpus,
        requests={"cpu": "1", "memory": "2Gi"},
        **more,
    )


def _own_container(run: DAggerRun, role: Role, serving: Serving, name: str, **more: Any) -> dict[str, Any]:
    env = [
        *own_environment(run, serving.pod, "serving", role),
        value("DAGGER_ROUND", 0),
        value("DAGGER_WORKER", role),
        value("DAGGER_ROLE", role),
        value("DAGGER_SHARED", SHARED),
    ]
    mounts = [("shared", SHARED), ("scratch", SCRATCH)]
    command = ["python", "-m", f"dagger_operator.serving.{name}"]
    return container(name, run.spec.image or WORKER_IMAGE, command, env, env_from=own_secrets(run, serving.pod), mounts=mounts, **more)


def _probe(path: str, *, failures: int, period: int = PROBE_SECONDS, timeout: int = PROBE_SECONDS) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": AGENT_PORT},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }
