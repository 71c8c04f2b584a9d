"""What ends a training before it reaches the weights."""

import math
import statistics
from collections.abc import Sequence

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.samples import Sample

_RECENT = 32
"""Steps that a step's loss is held against."""
_SPIKE = 10.0
"""Times their median."""


def refuse_broken(loss: float, before: Sequence[float], batch: Sequence[Sample]) -> None:
    """Raises `StageFailure` where a step's loss is no number, or tells that training has come apart.

    A spike is ten times the median of the last 32 steps, and above all that the round has seen: a hard batch late in a round, when the
    loss is small, is not taken for one.
    """
    step = len(before) + 1
    if not math.isfinite(loss):
        raise StageFailure(
            "LossNotFinite",
            f"the loss of step {step} is {loss}: lower training.learningRate or training.gradientClip, or train with precision FP32; "
            f"the weights before this round are unharmed. {_learned(batch)}",
        )
    if len(before) >= _RECENT and loss > _SPIKE * statistics.median(before[-_RECENT:]) and loss > max(before):
        raise StageFailure(
            "LossSpike",
            f"the loss of step {step} is {loss:.4g}, of the {_RECENT} steps before it {statistics.median(before[-_RECENT:]):.4g}: lower "
            f"training.learningRate or training.gradientClip, or look for broken labels. {_learned(batch)}",
        )


def _learned(batch: Sequence[Sample]) -> str:
    names = sorted({sample.trajectory for sample in batch})
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"Its labels are of rollouts {', '.join(names[:8])}{more} (round/rollout)"
