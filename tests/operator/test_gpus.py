"""Who holds GPUs for what, as `docs/metrics.md` says."""

from typing import Any

from dagger_operator.cluster.gpus import held

Json = dict[str, Any]


def pod(component: str, *, gpus: int = 1, ready: bool = True, phase: str = "Running", bound: bool = True, run: str = "demo") -> Json:
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"{run}-{component}",
            "namespace": "lab",
            "labels": {"dagger-operator.dev/run": run, "dagger-operator.dev/component": component},
        },
        "spec": {
            **({"nodeName": "node-1"} if bound else {}),
            "containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": str(gpus), "cpu": "8"}}}] if gpus else [],
        },
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def test_servers_that_are_asked_are_at_work_and_others_are_idle() -> None:
    servers = [pod("student", gpus=2), pod("teacher", gpus=4)]
    assert held(servers) == {"idle": 6}
    assert held([*servers, pod("rollout", gpus=0)]) == {"student": 2, "teacher": 4}
    assert held([*servers, pod("evaluation", gpus=0)]) == {"student": 2, "idle": 4}
    assert held([*servers, pod("rollout", gpus=0, phase="Succeeded")]) == {"idle": 6}
    assert held([*servers, pod("rollout", gpus=0, run="other")]) == {"idle": 6}


def test_a_server_that_is_not_ready_is_starting_whoever_waits_for_it() -> None:
    assert held([pod("student", ready=False), pod("rollout", gpus=0)]) == {"starting": 1}


def test_a_gpu_is_held_from_the_node_to_the_end() -> None:
    assert held([pod("training", gpus=8)]) == {"training": 8}
    assert held([pod("training", gpus=8, bound=False)]) == {}
    assert held([pod("training", gpus=8, phase="Failed")]) == {}
