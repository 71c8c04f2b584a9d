"""Converts packs to the tensors of one rank's forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dagger_operator.training.attention import Tree
from dagger_operator.training.batches import Limits
from dagger_operator.training.packing import COMPANY, Pack, soft_targets
from dagger_operator.training.tree import Chain, forest

Batch = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """Which part of a row is this rank's: one of `of` equal parts."""

    index: int = 0
    of: int = 1


def collate(packs: Sequence[Pack], limits: Limits, share: Share, device: torch.device) -> Batch:
    """Return the arguments of `Objective`: the packs one after another in a row; without packs, a dummy row for the collectives."""
    packs = packs or [COMPANY]
    lengths = [len(pack) for pack in packs]
    tokens = sum(lengths)
    filler = limits.padding(tokens)
    # The padding is a sequence of its own: no other token sees it.
    layouts = [pack.chains for pack in packs] + ([(Chain(0, filler),)] if filler else [])
    ids = np.concatenate([*(pack.input_ids for pack in packs), np.zeros(filler, dtype=np.int64)])
    positions = np.concatenate([*(pack.position_ids for pack in packs), np.arange(filler)])
    starts = np.cumsum([0, *lengths[:-1]])
    prev = np.concatenate([pack.prev + start for pack, start in zip(packs, starts, strict=True)])
    width = (tokens + filler) // share.of
    first = share.index * width
    mine = (first <= prev) & (prev < first + width)
    arrays = {
        "input_ids": ids[None, first : first + width],
        "position_ids": positions[None, first : first + width],
        "prev": prev[mine] - first,
        "targets": np.concatenate([pack.targets for pack in packs])[mine],
        "weights": np.concatenate([pack.weights for pack in packs])[mine],
    }
    if (soft := soft_targets(packs)) is not None:
        arrays |= {"soft_ids": soft.ids[mine].astype(np.int64), "soft_logprobs": soft.logprobs[mine]}
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    return {**tensors, "tree": Tree(forest(layouts), device)}
