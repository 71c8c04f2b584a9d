"""Checks before the first step, on this machine's own kernels: attention is right, forward and backward, and a tree's loss equals that of
its labels computed one by one.

Attention over trees is a kernel that is compiled for a device and a mask; if it were wrong there, training would continue and learn
something else. So it is compared with torch's public attention on a small tree, and a few labels of the first batch are computed both
ways: this costs a few forward passes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dagger_operator.api.training import Packing, Precision, Training
from dagger_operator.store.stage import StageFailure
from dagger_operator.training import segments
from dagger_operator.training.attention import Tree, tree_attention
from dagger_operator.training.batches import Limits, Pass, spread
from dagger_operator.training.engine import Engine
from dagger_operator.training.layout import Rank
from dagger_operator.training.packing import Pack, pack
from dagger_operator.training.rows import collate
from dagger_operator.training.samples import Sample
from dagger_operator.training.tree import Chain, Chains, forest

_TREE = (Chain(0, 300), Chain(300, 340, 0, 100), Chain(340, 410, 0, 200), Chain(410, 440, 2, 30))
"""One of its branches has a branch. Two copies fit in one padded row on CUDA, with blocks that the kernel skips, masks and takes whole."""
_OFF_BY = {Precision.FP32: 1e-2, Precision.BF16: 1e-1}
"""Relative difference that rounding may cause at the worst token; on the CPU it is 2e-6 and 3e-2, but CUDA may round FP32 as TF32. One
token too many causes 1 where one should be seen, and 0.06 where 300 should."""
_BRANCHES = 3
"""Maximum branches of a tree to compare with labels one by one: each is a row, and on CUDA perhaps a kernel, of its own."""
_TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 3e-2}
"""Difference that rounding may cause, in nats per target if the loss is below one, otherwise relative; a wrong mask causes a larger one.
Not relative to a small loss: if the student has memorised its labels, the loss is mostly rounding."""


@dataclass(frozen=True)
class Agreement:
    """The measured differences, each beside the largest that rounding may cause."""

    attention: float
    """Relative difference at the worst token, over outputs and gradients."""
    attention_allowed: float
    loss: float | None
    """Difference of the two losses; None if no tree of the batch has a branch to compare, or the labels' loss is not finite."""
    loss_allowed: float


def check_agreement(engine: Engine, batch: Sequence[Sample], training: Training, rank: Rank, limits: Limits) -> Agreement:
    """Run both checks. Collective. Raises `StageFailure("TreesDisagree")` if anything differs by more than rounding."""
    attention = _check_attention(engine.policy.config.get_text_config(), training, rank, limits)
    loss = _check_loss(engine, batch, training, rank, limits)
    return Agreement(attention, _OFF_BY[training.precision], loss, _TOLERANCE[training.precision])


def _check_loss(engine: Engine, batch: Sequence[Sample], training: Training, rank: Rank, limits: Limits) -> float | None:
    """Return the difference of the two losses, in the unit of `_TOLERANCE`."""
    if training.packing is not Packing.TREES or (chosen := _smallest_tree(batch, limits)) is None:
        return None
    # By cross-entropy, whatever the training loss: a divergence may be so small that it is all rounding.
    chosen = [replace(sample, soft=None) for sample in chosen]
    trees, labels = pack(chosen, limits.tokens), pack(chosen, limits.tokens, Packing.LABELS)
    together = _loss(engine, trees, spread(trees, rank.groups, limits), rank, limits)
    # One row per label: the isolation of labels within a row is what is being checked.
    apart = _loss(engine, labels, spread(labels, rank.groups, replace(limits, tokens=0)), rank, limits)
    if not math.isfinite(apart):
        return None  # the first step reports it
    difference = abs(together - apart) / max(abs(apart), 1.0)
    if not difference <= _TOLERANCE[training.precision]:
        raise StageFailure(
            "TreesDisagree",
            f"the labels of rollout {chosen[0].trajectory} have loss {together:.6f} as a tree and {apart:.6f} one by one: attention over "
            "trees is wrong on this device with this software; write training.packing: Labels, which has no branches, and report it",
        )
    return difference


def _check_attention(config: Any, training: Training, rank: Rank, limits: Limits) -> float:
    """Return the largest error of outputs and gradients on one tree (one sequence if each label has its own) and on two in a row.

    Uses the model's number and size of heads and, if training does, activation checkpointing: the recomputation compiles its kernels
    again, in autograd's own thread. Collective, so that all ranks stop if one is wrong.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (heads // rank.rows_shared_by, max(1, kv_heads // rank.rows_shared_by), size)
    dtype = torch.bfloat16 if training.precision is Precision.BF16 else torch.float32
    trees = training.packing is Packing.TREES
    one = _TREE if trees else _TREE[:1]
    worst = 0.0
    for row in (one, forest([one, one])):
        filler = limits.padding(row[-1].end)
        whole = forest([row, (Chain(0, filler),)]) if filler else row
        off = _off(whole, *shape, dtype, rank.device, again=training.activation_checkpointing)
        torch.distributed.all_reduce(off, torch.distributed.ReduceOp.MAX)
        worst = max(worst, float(off.max()))
        if not float(off.max()) <= _OFF_BY[training.precision]:
            by = ", ".join(f"{name} by {number:.1%}" for name, number in zip(("outputs", *"qkv"), off.tolist(), strict=True))
            remedy = "write training.packing: Labels, which has no branches" if trees else "take the trainer's image, or another device"
            raise StageFailure(
                "TreesDisagree",
                f"attention over {'trees' if row is one else 'a row of several'} is wrong on this device with this software, {by} "
                f"(letters: gradients); {remedy}, and report it",
            )
    return worst


def _off(chains: Chains, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device, *, again: bool) -> Tensor:
    """Return this device's largest error at any token, in the output and in the gradients of query, key and value; shape (4,).
    With `again` the output is recomputed for the gradients, as with activation checkpointing."""
    dice, tokens = torch.Generator().manual_seed(heads), chains[-1].end
    shapes = [(1, count, tokens, size) for count in (heads, kv_heads, kv_heads)] + [(1, tokens, heads, size)]
    *given, gradient = (torch.randn(shape, generator=dice).to(device, dtype) for shape in shapes)
    tree, scaling = Tree(chains, device), size**-0.5

    def here(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(torch.nn.Identity(), query, key, value, None, tree=tree, scaling=scaling)[0]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segments.attend(query, key, value, tree.segments, scaling)

    mine = _results(functools.partial(checkpoint, here, use_reentrant=False) if again else here, given, gradient)
    right = _results(plain, [tensor.float() for tensor in given], gradient.float())
    return torch.stack([_difference(*pair) for pair in zip(mine, right, strict=True)])


def _results(attend: Callable[..., Tensor], given: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    given = [tensor.detach().requires_grad_() for tensor in given]
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


def _difference(mine: Tensor, right: Tensor) -> Tensor:
    """Return the largest difference at any token and head, relative to the norm there or, if larger, to its root mean square."""
    there: Tensor = right.norm(dim=-1)
    off: Tensor = (mine.float() - right).norm(dim=-1) / there.clamp_min(float(there.square().mean().sqrt()))
    return off.max().nan_to_num(nan=math.inf)


def _smallest_tree(batch: Sequence[Sample], limits: Limits) -> list[Sample] | None:
    """Return a few samples of the trajectory for which they make the smallest tree with a branch."""
    by_trajectory: dict[str, list[Sample]] = {}
    for sample in batch:
        if len(sample.targets):
            by_trajectory.setdefault(sample.trajectory, []).append(sample)
    trees = [few for samples in by_trajectory.values() if (few := _trunk_and_branches(samples, limits))]
    return min(trees, key=lambda few: sum(map(len, pack(few, limits.tokens))), default=None)


def _trunk_and_branches(samples: Sequence[Sample], limits: Limits) -> list[Sample]:
    """Return the longest sample and the shortest that branch off it, at most `_BRANCHES`; empty if none does."""
    trunk, *others = sorted(samples, key=lambda sample: -len(sample.tokens))
    branches = [sample for sample in others if _branches(pack([trunk, sample], limits.tokens))]
    return [trunk, *branches[-_BRANCHES:]] if branches else []


def _branches(packs: Sequence[Pack]) -> bool:
    return any(chain.parent >= 0 for one in packs for chain in one.chains)


def _loss(engine: Engine, packs: Sequence[Pack], passes: Sequence[Pass], rank: Rank, limits: Limits) -> float:
    """Return the mean loss over all ranks' targets, without computing gradients."""
    total = torch.zeros((), dtype=torch.float64, device=rank.device)
    with torch.no_grad():
        for each in passes:
            mine = [packs[index] for index in each.packs[rank.group]]
            total += engine(**collate(mine, limits, rank.share, rank.device), pieces=each.pieces).detach()
    torch.distributed.all_reduce(total)
    return float(total) / sum(float(one.weights.sum()) for one in packs)
