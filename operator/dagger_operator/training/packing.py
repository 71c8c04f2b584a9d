"""Packs samples as trees for one forward pass: the interface between labelled states and the model.

The labels of a trajectory share its conversation: that is the trunk, and each label is a branch that sees its prefix of the trunk and
itself. Where the teacher acted and its turn has the same tokens in the history, the label lies on the trunk and there is no branch.
What no label needs (the trunk after the last labelled state) is left out. A pack states which position predicts which target
(`prev`): the first token of a branch is predicted from the trunk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dagger_operator.api.training import Packing
from dagger_operator.training.samples import Sample
from dagger_operator.training.soft import Soft, hard, joined
from dagger_operator.training.tree import Chain, Chains, Ints, TreeBuilder


@dataclass(frozen=True)
class Pack:
    """One tree of n tokens with k targets."""

    input_ids: Ints
    """Shape (n,). The last token of a label is left out, as it predicts nothing, unless something follows it."""
    position_ids: Ints
    """Shape (n,): number of tokens before each one on its path."""
    chains: Chains
    """Which tokens see which."""
    prev: Ints
    """Shape (k,): the position whose logits predict each target."""
    targets: Ints
    """Shape (k,): token ids."""
    weights: NDArray[np.float32]
    """Shape (k,): each target's weight in the loss; 1 in the paper's recipe."""
    labels: int
    """Number of labels in the pack."""
    soft: Soft | None = None
    """The teacher's distribution at each target; None if no target has one, or the loss does not use it."""

    def __len__(self) -> int:
        return len(self.input_ids)


def pack(samples: Iterable[Sample], most_tokens: int, packing: Packing = Packing.TREES) -> list[Pack]:
    """Pack the samples of one optimiser step; loss and gradients equal those of one sequence per sample.

    A tree of more than `most_tokens` is split, and each part repeats what it needs of the trunk. A single sequence that is longer stays
    whole.
    """
    groups: dict[object, list[Sample]] = {}
    for number, sample in enumerate(sample for sample in samples if len(sample.targets)):
        groups.setdefault(sample.trajectory if packing is Packing.TREES else number, []).append(sample)
    return [_pack(part) for group in groups.values() for part in _parts(group, most_tokens)]


def _parts(samples: Sequence[Sample], most_tokens: int) -> list[list[Sample]]:
    """Split samples into trees, longest first, as many to a tree as fit: late turns together, since they share the longest trunk."""
    parts: list[list[Sample]] = []
    tree = TreeBuilder()
    for sample in sorted(samples, key=lambda sample: -len(sample.strand)):
        inputs = _inputs(sample)
        if not parts or tree.length + tree.cost(inputs) > most_tokens:
            tree = TreeBuilder()
            parts.append([])
        tree.add(inputs)
        parts[-1].append(sample)
    return parts


def _pack(samples: Sequence[Sample]) -> Pack:
    tree = TreeBuilder()
    prev = [tree.add(_inputs(sample))[sample.prompt - 1 :] for sample in samples]
    weights = [np.full(len(sample.targets), sample.weight, dtype=np.float32) for sample in samples]
    return Pack(
        input_ids=tree.tokens(),
        position_ids=tree.positions(),
        chains=tuple(tree.chains),
        prev=np.concatenate(prev),
        targets=np.concatenate([sample.targets for sample in samples]).astype(np.int64),
        weights=np.concatenate(weights),
        labels=len(samples),
        soft=soft_targets(samples),
    )


def soft_targets(of: Sequence[Sample] | Sequence[Pack]) -> Soft | None:
    """Return the soft targets of all of these, in order; None if none has any. Those that have none get hard ones."""
    if all(one.soft is None for one in of):
        return None
    return joined([hard(one.targets) if one.soft is None else one.soft for one in of])


def _inputs(sample: Sample) -> Ints:
    return sample.tokens[:-1].astype(np.int64)


COMPANY = Pack(
    input_ids=np.zeros(1, dtype=np.int64),
    position_ids=np.zeros(1, dtype=np.int64),
    chains=(Chain(0, 1),),
    prev=np.zeros(1, dtype=np.int64),
    targets=np.zeros(1, dtype=np.int64),
    weights=np.zeros(1, dtype=np.float32),
    labels=0,
)
"""Dummy pack for a rank that has nothing to do in a pass: it takes part in the same collectives and contributes no gradient."""
