"""Samples as sequences for one forward pass: the seam between labelled states and the model.

A pack says for itself which position predicts which target (`prev`), so a later packing may lay a trajectory out as a trunk with
branches and nothing after it changes. This packing merges only what needs no mask: a sample whose input is a prefix of another's
rides along in that one causal sequence. Where the teacher acted, a state with its label is the beginning of the next state, so a run
of the teacher's turns costs one sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dagger_operator.training.samples import Sample

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """One sequence of n tokens with k targets."""

    input_ids: Ints
    """Shape (n,). No label's last token is among them, unless something follows it: it predicts nothing."""
    position_ids: Ints
    """Shape (n,)."""
    prev: Ints
    """Shape (k,): the position whose logits predict each target."""
    targets: Ints
    """Shape (k,): token ids."""
    weights: NDArray[np.float32]
    """Shape (k,): each target's share in the loss; 1 in the paper's recipe."""
    labels: int
    """Labels in it."""

    def __len__(self) -> int:
        return len(self.input_ids)


def pack(samples: Iterable[Sample]) -> list[Pack]:
    """Packs the samples of one optimiser step; loss and gradients are those of one sequence per sample."""
    by_trajectory: dict[str, list[Sample]] = {}
    for sample in samples:
        by_trajectory.setdefault(sample.trajectory, []).append(sample)
    return [_pack(group) for group_of_one in by_trajectory.values() for group in _riding(group_of_one)]


def token_ratio(samples: Sequence[Sample], packs: Sequence[Pack]) -> float:
    """Tokens that one sequence per sample would cost, by tokens that the packs cost."""
    return sum(len(sample.tokens) - 1 for sample in samples) / max(1, sum(map(len, packs)))


def _riding(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples in groups; the first of each is the longest, and the inputs of the others are prefixes of its tokens."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        inputs = sample.tokens[:-1]
        for group in groups:
            if np.array_equal(inputs, group[0].tokens[: len(inputs)]):
                group.append(sample)
                break
        else:
            groups.append([sample])
    return groups


def _pack(group: Sequence[Sample]) -> Pack:
    inputs = group[0].tokens[:-1].astype(np.int64)
    targets = np.concatenate([sample.targets for sample in group]).astype(np.int64)
    return Pack(
        input_ids=inputs,
        position_ids=np.arange(len(inputs), dtype=np.int64),
        prev=np.concatenate([np.arange(sample.prompt - 1, len(sample.tokens) - 1, dtype=np.int64) for sample in group]),
        targets=targets,
        weights=np.ones(len(targets), dtype=np.float32),
        labels=len(group),
    )
