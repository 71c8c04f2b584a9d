"""A check before the first step, on this machine's own kernels: a tree's loss is that of its labels one by one.

Attention over trees is a kernel that is compiled for a device and a mask; should it be wrong there, training would go on and learn
something else. One tree of the first batch costs a few forward passes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed

from dagger_operator.api.training import Packing, Precision, Training
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.batches import Limits, spread
from dagger_operator.training.engine import Engine
from dagger_operator.training.layout import Rank
from dagger_operator.training.packing import Pack, pack
from dagger_operator.training.rows import collate
from dagger_operator.training.samples import Sample

_TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 3e-2}
"""Difference that rounding may make, in nats a target where they lose less than one, else relative; a wrong mask makes a larger one.
Not relative to a small loss: a student that knows its labels by heart loses little but rounding."""


def check_agreement(engine: Engine, batch: Sequence[Sample], training: Training, rank: Rank, limits: Limits) -> float | None:
    """Difference of the two losses, as `_TOLERANCE` has it; None where no tree of the batch has a branch to compare. Collective.

    Raises `StageFailure("TreesDisagree")` where it is more than rounding.
    """
    if training.packing is not Packing.TREES or (chosen := _smallest_tree(batch, limits)) is None:
        return None
    # By cross-entropy, whatever is learned: a divergence may be so small that it is all rounding.
    chosen = [replace(sample, soft=None) for sample in chosen]
    together = _loss(engine, pack(chosen, limits.tokens), rank, limits)
    apart = _loss(engine, pack(chosen, limits.tokens, Packing.LABELS), rank, limits)
    if not math.isfinite(apart):
        return None  # the first step says so
    difference = abs(together - apart) / max(abs(apart), 1.0)
    if not difference <= _TOLERANCE[training.precision]:
        raise StageFailure(
            "TreesDisagree",
            f"the labels of rollout {chosen[0].trajectory} have loss {together:.6f} as a tree and {apart:.6f} one by one: attention over "
            "trees is wrong on this device with this software; write training.packing: Labels, which needs none, and report it",
        )
    return difference


def _smallest_tree(batch: Sequence[Sample], limits: Limits) -> list[Sample] | None:
    """The samples of the trajectory that makes the smallest tree with a branch."""
    by_trajectory: dict[str, list[Sample]] = {}
    for sample in batch:
        by_trajectory.setdefault(sample.trajectory, []).append(sample)
    trees = [(sum(map(len, packs)), name) for name in by_trajectory if _branches(packs := pack(by_trajectory[name], limits.tokens))]
    return by_trajectory[min(trees)[1]] if trees else None


def _branches(packs: Sequence[Pack]) -> bool:
    return any(chain.parent >= 0 for one in packs for chain in one.chains)


def _loss(engine: Engine, packs: Sequence[Pack], rank: Rank, limits: Limits) -> float:
    """Mean loss over all ranks' targets, without a gradient."""
    total = torch.zeros((), dtype=torch.float64, device=rank.device)
    with torch.no_grad():
        for turn in spread(packs, rank.groups, limits):
            mine = [packs[index] for index in turn.packs[rank.group]]
            total += engine(**collate(mine, limits, rank.share, rank.device), pieces=turn.pieces).detach()
    torch.distributed.all_reduce(total)
    return float(total) / sum(float(one.weights.sum()) for one in packs)
