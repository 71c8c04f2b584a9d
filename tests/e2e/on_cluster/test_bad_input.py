"""What a run asks for and the cluster does not have is said in its status with field, value and remedy, by the real kubelet's words."""

from typing import Any

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

SMALL = {"requests": {"cpu": "50m", "memory": "128Mi"}}
NOWHERE = "https://student.invalid/v1"


def _run(name: str, prefix: str = "", **sections: Any) -> dict[str, Any]:
    """A run of rollouts alone; `sections` replace those of its spec."""
    spec = {
        "student": {"model": "s", "endpoint": {"url": NOWHERE}},
        "teacher": {"model": "t", "endpoint": {"url": NOWHERE}},
        "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
        "training": {"mode": "Disabled"},
        "rollouts": {"pod": {"resources": SMALL}},
        "storage": _storage(prefix or name),
        **sections,
    }
    return {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": {"name": name}, "spec": spec}


def _storage(prefix: str, secret: str = "dagger-operator-s3") -> dict[str, Any]:
    url, endpoint = f"s3://dagger/bad/{prefix}", "http://dagger-operator-s3.dagger-system.svc:7070"
    return {"url": url, "endpointUrl": endpoint, "region": "us-east-1", "secretRef": {"name": secret}}


RUNS: dict[str, tuple[dict[str, Any], set[str], list[str]]] = {
    "no-image": (
        _run("no-image", image="localhost/none:1"),
        {"ErrImagePull", "ImagePullBackOff"},
        ["spec.image", "localhost/none:1", "name an image that the nodes can pull", "spec.rollouts.pod.imagePullSecrets"],
    ),
    "no-keys": (
        _run("no-keys", storage=_storage("no-keys", "none")),
        {"StorageUnavailable"},
        ["Secret none", "spec.storage.secretRef", "create it"],
    ),
    "no-token": (
        _run("no-token", teacher={"model": "t", "endpoint": {"url": NOWHERE, "secretRef": {"name": "none"}}}),
        {"CreateContainerConfigError"},
        ['secret "none" not found', "spec.teacher.endpoint", "create it in the run's namespace"],
    ),
    "no-gpu": (
        _run("no-gpu", rollouts={"pod": {"resources": {**SMALL, "limits": {"nvidia.com/gpu": "8"}}}}, preRunningDeadlineSeconds=5),
        {"Unschedulable"},
        ["Insufficient nvidia.com/gpu", "spec.rollouts.pod.resources", "preRunningDeadlineSeconds is 5"],
    ),
    "no-model": (
        _run("no-model", student={"model": "s3://dagger/bad/no-model/none", "serving": {"gpus": 0}}, training={"mode": "Enabled"}),
        {"ModelNotFound"},
        ["student.model", "nothing below none/ in s3://dagger/bad/no-model", "put it there"],
    ),
    "no-prefix": (
        _run("no-prefix", "no-token"),
        {"PrefixTaken"},
        ["s3://dagger/bad/no-token", "belongs to run", "/no-token", "set storage.url to a prefix of its own"],
    ),
}


def test_what_is_missing_is_said_with_field_value_and_remedy(installation: Any) -> None:
    first = [document for name, (document, _, _) in RUNS.items() if name != "no-prefix"]
    installation.apply(*first)
    installation.until("the first run has the prefix", lambda: _phase(installation, "no-token") == "Preflight", 120)
    installation.apply(RUNS["no-prefix"][0])
    try:
        for name, (_, reasons, parts) in RUNS.items():
            said = installation.until(f"{name} says why", lambda name=name, reasons=reasons: _said(installation, name, reasons), 120)
            assert [part for part in parts if part not in said] == [], f"{name}: {said}"
    finally:
        installation.kubectl("delete", "daggerruns", *RUNS, "--timeout=60s")


def _said(installation: Any, name: str, reasons: set[str]) -> str | None:
    """The message of the condition that stands in the way, once it is one of these reasons; of a deadline, once it is over."""
    status = installation.run(name).get("status", {})
    conditions = {one["type"]: one for one in status.get("conditions", ()) if one["reason"] in reasons}
    if status.get("reason") not in reasons or (name == "no-gpu" and "Failed" not in conditions):
        return None
    shown = conditions.get("Failed") or conditions.get("Progressing")
    return str(shown["message"]) if shown else None


def _phase(installation: Any, name: str) -> str | None:
    found: str | None = installation.run(name).get("status", {}).get("phase")
    return found
