"""What GPUs are held for, from pods as they are seen; pure. The semantics are those of `docs/metrics.md`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dagger_operator.cluster.cache import RunKey, run_key
from dagger_operator.control import COMPONENT, Role, StageName

Manifest = Mapping[str, Any]

USES = ("student", "teacher", "training", "starting", "idle")

_ASKS: Mapping[str, frozenset[str]] = {
    StageName.PREFLIGHT: frozenset(Role),
    StageName.ROLLOUT: frozenset(Role),
    StageName.PUBLISH: frozenset({Role.STUDENT}),
    StageName.EVALUATION: frozenset({Role.STUDENT}),
}
"""Policies that a stage asks."""


def held(pods: Iterable[Manifest]) -> Counter[str]:
    """GPUs by use, over the pods of all runs."""
    living = [pod for pod in pods if _phase(pod) not in ("Succeeded", "Failed")]
    asked: set[tuple[RunKey | None, str]] = {(run_key(pod), role) for pod in living for role in _ASKS.get(_component(pod), ())}
    found: Counter[str] = Counter()
    for pod in living:
        if (gpus := _gpus(pod)) and (pod.get("spec") or {}).get("nodeName"):
            found[_use(pod, asked)] += gpus
    return found


def _use(pod: Manifest, asked: set[tuple[RunKey | None, str]]) -> str:
    component = _component(pod)
    if component not in list(Role):
        return "training"
    if not any(one["type"] == "Ready" and one["status"] == "True" for one in (pod.get("status") or {}).get("conditions") or ()):
        return "starting"
    return component if (run_key(pod), component) in asked else "idle"


def _gpus(pod: Manifest) -> int:
    """Of whatever vendor: extended resources whose name ends with `/gpu`."""
    limits = ((one.get("resources") or {}).get("limits") or {} for one in (pod.get("spec") or {}).get("containers") or ())
    return sum(int(amount) for one in limits for name, amount in one.items() if name.endswith("/gpu"))


def _component(pod: Manifest) -> str:
    return str((pod["metadata"].get("labels") or {}).get(COMPONENT, ""))


def _phase(pod: Manifest) -> str:
    return str((pod.get("status") or {}).get("phase") or "Pending")
