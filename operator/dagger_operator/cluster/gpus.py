"""What GPUs are held for, derived from observed pods; pure. The semantics are those of `docs/metrics.md`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dagger_operator.api import Role
from dagger_operator.cluster.cache import RunKey, run_key
from dagger_operator.control import COMPONENT, StageName
from dagger_operator.control.said import lives, true

Manifest = Mapping[str, Any]

USES = ("student", "teacher", "training", "starting", "idle")

_ASKS: Mapping[str, frozenset[str]] = {
    StageName.PREFLIGHT: frozenset(Role),
    StageName.ROLLOUT: frozenset(Role),
    StageName.PUBLISH: frozenset({Role.STUDENT}),
    StageName.EVALUATION: frozenset({Role.STUDENT}),
}
"""Policies that a stage queries."""


def held(pods: Iterable[Manifest]) -> Counter[str]:
    """Return GPUs by use, over the pods of all runs."""
    stages: defaultdict[RunKey | None, set[str]] = defaultdict(set)
    holding: list[tuple[Manifest, int]] = []
    for pod in pods:
        if not lives(pod):
            continue
        if (stage := _component(pod)) in _ASKS:
            stages[run_key(pod)].add(stage)
        if (gpus := _gpus(pod)) and (pod.get("spec") or {}).get("nodeName"):
            holding.append((pod, gpus))
    found: Counter[str] = Counter()
    for pod, gpus in holding:
        found[_use(pod, stages.get(run_key(pod), set()))] += gpus
    return found


def _use(pod: Manifest, stages: Iterable[str]) -> str:
    """Return the use of a pod's GPUs; `stages` are its run's current stages."""
    component = _component(pod)
    if component not in set(Role):
        return "training"
    if true(pod, "Ready") is None:
        return "starting"
    return component if any(component in _ASKS[stage] for stage in stages) else "idle"


def _gpus(pod: Manifest) -> int:
    """Return the GPUs of a pod, of any vendor: extended resources whose name ends with `/gpu`."""
    limits = ((one.get("resources") or {}).get("limits") or {} for one in (pod.get("spec") or {}).get("containers") or ())
    return sum(int(amount) for one in limits for name, amount in one.items() if name.endswith("/gpu"))


def _component(pod: Manifest) -> str:
    return str((pod["metadata"].get("labels") or {}).get(COMPONENT, ""))
