"""Checks that stop a training that diverges."""

import math
import statistics
from collections.abc import Iterable, Sequence

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.samples import Sample

_LASTING = 5
"""Steps in a row. A single step ten times above the others is common: a batch of states that are new to the student, or one hard label."""
_BEFORE = 32
"""Number of steps before them to compare with."""
_SPIKE = 10.0
"""Multiple of the median of those."""


_REMEDY = "lower training.learningRate or training.gradientClip, or train with precision FP32; the weights before this round are unharmed."


def refuse_broken(loss: float, before: Sequence[float], batch: Sequence[Sample]) -> None:
    """Raise `StageFailure` if a step's loss is not finite, or shows that training has diverged.

    It has if five steps in a row are above ten times the median of the 32 before them, and above every earlier step of the round.
    """
    step = len(before) + 1
    if not math.isfinite(loss):
        raise StageFailure(
            "LossNotFinite",
            f"the loss of step {step} is {loss}: {_REMEDY} {_learned(batch)}",
        )
    lasting, earlier = [*before[1 - _LASTING :], loss], before[: 1 - _LASTING]
    if len(earlier) < _BEFORE:
        return
    usual = statistics.median(earlier[-_BEFORE:])
    if min(lasting) > max(_SPIKE * usual, *earlier):
        raise StageFailure(
            "LossSpike",
            f"the loss of steps {step - _LASTING + 1} to {step} is {min(lasting):.4g} or more, of the {_BEFORE} steps before them it was "
            f"{usual:.4g}: lower training.learningRate or training.gradientClip, or look for broken labels. {_learned(batch)}",
        )


def refuse_skipped(stepped: bool, before: Sequence[float], batch: Sequence[Sample]) -> None:
    """Raise `StageFailure` if a step was skipped because its gradient is not finite although its loss is.

    DeepSpeed would skip such steps to the end, and a training that has learned nothing would count as done.
    """
    if not stepped:
        raise StageFailure("GradientNotFinite", f"the gradient of step {len(before) + 1} is not finite: {_REMEDY} {_learned(batch)}")


def _learned(batch: Sequence[Sample]) -> str:
    rollouts, shards = _listed(sample.trajectory for sample in batch), _listed(sample.shard for sample in batch)
    return f"Its labels are of rollouts {rollouts} (round/rollout), in shards {shards}"


def _listed(names: Iterable[str]) -> str:
    each = sorted(set(names))
    more = f" and {len(each) - 8} more" if len(each) > 8 else ""
    return ", ".join(each[:8]) + more
