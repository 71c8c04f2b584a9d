"""Servers: for each policy that is served here a Deployment with a headless Service."""

from typing import Any

from dagger_operator.api import DAggerRun, Serving
from dagger_operator.control.names import COMPONENT, MANAGED_BY, RUN, Role, attempt_of, labels, server_name
from dagger_operator.control.pods import (
    AGENT_PORT,
    SCRATCH,
    SHARED,
    container,
    own_environment,
    owned,
    pod_spec,
    storage_environment,
    value,
)
from dagger_operator.control.vllm import vllm_arguments, vllm_environment

PROBE_SECONDS = 2


def served(run: DAggerRun, role: Role) -> Serving | None:
    """A policy's serving settings; None where it is an endpoint."""
    return run.spec.student.served if role is Role.STUDENT else run.spec.teacher.serving


def build_deployment(
    run: DAggerRun, role: Role, serving: Serving, *, replicas: int, annotations: dict[str, str] | None = None
) -> dict[str, Any]:
    """The Deployment of a policy. Its template holds nothing of a round, so servers live through all of them."""
    pod = _pod(run, role, serving)
    attempt = attempt_of(run, pod)
    own = labels(run, role, 0, attempt)
    return {
        **owned(run, "apps/v1", "Deployment", server_name(run, role), own, annotations),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 1,
            # Two generations at once would need twice the GPUs.
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": serving.startup_deadline_seconds + 60,
            "selector": {"matchLabels": _selector(own)},
            "template": {"metadata": {"labels": dict(own)}, "spec": pod},
        },
    }


def build_service(run: DAggerRun, role: Role) -> dict[str, Any]:
    """A name that resolves to the address of every replica that is ready."""
    own = labels(run, role, 0, "")
    port = {"name": "http", "port": AGENT_PORT, "targetPort": AGENT_PORT}
    return {
        **owned(run, "v1", "Service", server_name(run, role), own),
        "spec": {"clusterIP": "None", "selector": _selector(own), "ports": [port]},
    }


def _selector(own: dict[str, str]) -> dict[str, str]:
    return {key: own[key] for key in (MANAGED_BY, RUN, COMPONENT)}


def _pod(run: DAggerRun, role: Role, serving: Serving) -> dict[str, Any]:
    weights = _own_container(run, role, "weights", requests={"cpu": "100m", "memory": "1Gi"})
    vllm = container(
        "vllm",
        serving.image,
        ["python", "-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(serving)],
        [value("DAGGER_SHARED", SHARED), *vllm_environment(serving)],
        mounts=[("shared", SHARED), ("scratch", SCRATCH), ("shm", "/dev/shm")],  # noqa: S108 - a mount of the pod's own
        gpus=serving.gpus,
        requests={"cpu": "1", "memory": "2Gi"},
        # The agent answers for vLLM, which listens on a Unix socket only.
        startupProbe=_probe("/health/server", failures=-(-serving.startup_deadline_seconds // PROBE_SECONDS)),
        livenessProbe=_probe("/health/server", failures=5),
    )
    agent = _own_container(
        run,
        role,
        "agent",
        requests={"cpu": "250m", "memory": "512Mi"},
        ports=[{"name": "http", "containerPort": AGENT_PORT}],
        readinessProbe=_probe("/health/ready", failures=1),
    )
    return pod_spec([vllm, agent], volumes=["shared", "scratch"], memory_volumes=["shm"], initContainers=[weights])


def _own_container(run: DAggerRun, role: Role, name: str, **more: Any) -> dict[str, Any]:
    env = [
        *own_environment(run, "serving", role),
        value("DAGGER_ROUND", 0),
        value("DAGGER_WORKER", role),
        value("DAGGER_ROLE", role),
        value("DAGGER_SHARED", SHARED),
    ]
    mounts = [("shared", SHARED), ("scratch", SCRATCH)]
    command = ["python", "-m", f"dagger_operator.serving.{name}"]
    return container(name, run.spec.image, command, env, env_from=storage_environment(run), mounts=mounts, **more)


def _probe(path: str, *, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": AGENT_PORT},
        "periodSeconds": PROBE_SECONDS,
        "timeoutSeconds": PROBE_SECONDS,
        "failureThreshold": failures,
    }
