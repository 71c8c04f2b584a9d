"""What GPUs are held for, derived from observed pods; pure. The semantics are those of `docs/metrics.md`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import structlog
from kubernetes.utils.quantity import parse_quantity

from dagger_operator.api import Role
from dagger_operator.cluster.cache import RunKey, run_key
from dagger_operator.control import COMPONENT, StageName
from dagger_operator.control.said import lives, true

log = structlog.get_logger()

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
    return sum(_whole(str(amount)) for one in limits for name, amount in one.items() if name.endswith("/gpu"))


@lru_cache(maxsize=256)  # so that what is no quantity is logged once, and not every few seconds
def _whole(quantity: str) -> int:
    """Return a quantity as the API server writes it: 1000 is `1k`. One that cannot be read counts as 0."""
    try:
        return int(float(parse_quantity(quantity)))  # type: ignore[no-untyped-call]  # the library's
    except (ValueError, ArithmeticError):
        log.warning("not a number of GPUs, so they are not counted", quantity=quantity)
        return 0


def _component(pod: Manifest) -> str:
    return str((pod["metadata"].get("labels") or {}).get(COMPONENT, ""))
