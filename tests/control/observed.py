"""Objects as the API server has them, and what is observed of them."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from dagger_operator import control
from dagger_operator.control import ATTEMPT, COMPONENT, ROUND, Child, Trouble

Json = dict[str, Any]


NOW = datetime(2026, 1, 1, 2, tzinfo=UTC)


LABELS = {COMPONENT: "rollout", ROUND: "2", ATTEMPT: "abcd1234"}


def child(manifest: Json, pods: Sequence[Json] = (), now: datetime = NOW) -> Child:
    return control.child(manifest, pods, now)


def children(objects: Sequence[Json], pods: Sequence[Json], warnings: Mapping[tuple[str, str], Trouble] = {}) -> tuple[Child, ...]:
    return control.children(objects, pods, NOW, warnings)


def ago(**passed: float) -> str:
    return (NOW - timedelta(**passed)).isoformat()


def job(*, spec: Json | None = None, **status: Any) -> Json:
    metadata = {"name": "demo-r002-rollout-abcd1234", "uid": "j", "labels": LABELS}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec or {}, "status": status}


def deployment(*, wanted: int = 1, annotations: Json | None = None, generation: int = 1, **status: Any) -> Json:
    metadata = {"name": "demo-student", "labels": LABELS | {COMPONENT: "student"}, "generation": generation, "annotations": annotations}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"replicas": wanted}, "status": status}


def pod(
    name: str = "p", phase: str = "Running", *, labels: Json | None = None, containers: list[Json] | None = None, **status: Any
) -> Json:
    metadata = {"name": name, "labels": labels or LABELS, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": phase, "containerStatuses": containers or [], **status}}


def ended(code: int, message: str = "", *, at: str = "2026-01-01T00:00:00Z", **more: Any) -> Json:
    return {"name": "stage", "state": {"terminated": {"exitCode": code, "message": message, "finishedAt": at, **more}}}


def waiting(reason: str, message: str = "", **more: Any) -> Json:
    return {"name": "stage", "state": {"waiting": {"reason": reason, "message": message}}, **more}


STAGE_SAID = json.dumps({"reason": "LabelCoverageTooLow", "message": "raise labels.attempts"})


def server_pod(**container: Any) -> Json:
    return pod("s", labels=LABELS | {COMPONENT: "student"}, containers=[{"name": "vllm", **container}])


def of(component: str, *objects: Json) -> list[Json]:
    """The same objects as another component's."""
    return [{**one, "metadata": {**one["metadata"], "labels": LABELS | {COMPONENT: component}}} for one in objects]
