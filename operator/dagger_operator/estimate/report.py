"""An estimate as plain data, for other programs."""

from dataclasses import fields, is_dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from dagger_operator.estimate.host import Need, TrainingNode
from dagger_operator.estimate.memory import Memory
from dagger_operator.estimate.result import Estimate
from dagger_operator.estimate.serving import Pool


def as_data(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate with camelCase names as in the resource; bytes, seconds and tokens as numbers. Unknown values are not numbers."""
    return {
        "gpu": _plain(estimate.gpu),
        "assumed": _plain(estimate.assumed),
        "fits": estimate.fits,
        "findings": [_plain(finding) for finding in estimate.findings],
        "gpus": estimate.gpus,
        "hours": estimate.hours,
        "gpuHours": estimate.gpu_hours,
        "initialEvaluationSeconds": estimate.initial_evaluation_seconds,
        "initialEvaluationGpuHours": estimate.initial_evaluation_gpu_hours,
        "rounds": [{**_plain(one), "saved": one.saved} for one in estimate.rounds],
        "trainingMemory": _memory(estimate.training),
        "trainingNode": _node(estimate.training_node),
        "studentServing": _pool(estimate.student, estimate),
        "teacherServing": _pool(estimate.teacher, estimate),
        "studentPod": _node(estimate.student_pod),
        "teacherPod": _node(estimate.teacher_pod),
    }


def _memory(memory: Memory | None) -> dict[str, Any] | None:
    return None if memory is None else {**_plain(memory), "total": memory.total}


def _node(node: Need | None) -> dict[str, Any] | None:
    if node is None:
        return None
    anew = {"diskCutAnew": node.disk_cut_anew} if isinstance(node, TrainingNode) else {}
    return {**_plain(node), "memory": node.memory, "disk": node.disk, **anew}


def _pool(pool: Pool | None, estimate: Estimate) -> dict[str, Any] | None:
    if pool is None:
        return None
    return {
        "gpus": pool.gpus,
        "weights": pool.weights,
        "kvCache": max(0.0, pool.kv_memory),
        "kvTokensOfAReplica": pool.kv_tokens,
        "wholeContextsOfAReplica": pool.whole_contexts,
        "rolloutsHeld": pool.holds(estimate.mean_state),
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {to_camel(field.name): _plain(getattr(value, field.name)) for field in fields(value)}
    return value
