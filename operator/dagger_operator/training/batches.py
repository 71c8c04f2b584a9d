"""Which samples make which optimiser step, and which rank computes what of it. All of it follows from (seed, round, step)."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from dagger_operator.api import BatchUnit, Training
from dagger_operator.training.packing import Pack
from dagger_operator.training.samples import Sample


class Curriculum:
    """The steps of one round, by random access: a resumed training asks for the next one.

    The samples of epoch after epoch form one stream, trajectories in an order of the epoch's own and each trajectory's labels
    together. Every step takes the next `batchSize` labels or trajectories of it; only the last may be smaller.
    """

    def __init__(self, samples: Sequence[Sample], training: Training, *, seed: int, round_number: int) -> None:
        by_trajectory: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            by_trajectory.setdefault(sample.trajectory, []).append(index)
        self._trajectories = [by_trajectory[name] for name in sorted(by_trajectory)]
        self._size, self._seed, self._round = training.batch_size, seed, round_number
        self._labels = training.batch_unit is BatchUnit.LABELS
        self._epoch_units = len(samples) if self._labels else len(self._trajectories)
        self._units = training.epochs * self._epoch_units
        self.steps = math.ceil(self._units / self._size)
        """Optimiser steps of the round."""
        if training.steps is not None:
            self.steps = max(1, round(training.steps.at(round_number)))
            self._units = self.steps * self._size
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of step 0, 1, ..."""
        start, end = step * self._size, min((step + 1) * self._size, self._units)
        units: list[list[int]] = []
        while start < end:
            epoch, position = divmod(start, self._epoch_units)
            taken = self._epoch(epoch)[position : position + end - start]
            units.extend(taken)
            start += len(taken)
        return [index for unit in units for index in unit]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = list(self._trajectories)
        random.Random(f"{self._seed}/{self._round}/{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
        return [[index] for trajectory in order for index in trajectory] if self._labels else order


@dataclass(frozen=True)
class Pass:
    """One forward pass of every rank. All have as many, and as many pieces in each, so that none waits for ever in a collective."""

    packs: tuple[tuple[int, ...], ...]
    """By rank, indices of packs; none is a pass for company."""
    pieces: int
    """Parts in which every rank computes its logits."""


def spread(packs: Sequence[Pack], ranks: int, micro_batch_tokens: int, targets_at_once: int) -> list[Pass]:
    """The forward passes of one step: balanced by tokens, micro-batches bounded with padding counted. A pack above the bound goes
    alone. `targets_at_once` bounds the targets of a piece."""
    longest_first = sorted(range(len(packs)), key=lambda index: (-len(packs[index]), index))
    mine: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in longest_first:
        rank = load.index(min(load))
        mine[rank].append(index)
        load[rank] += len(packs[index])
    by_rank = [_micro_batches(indices, packs, micro_batch_tokens) for indices in mine]
    passes = []
    for together in zip_longest(*by_rank, fillvalue=()):
        targets = max(sum(len(packs[index].targets) for index in indices) for indices in together)
        passes.append(Pass(together, max(1, math.ceil(targets / targets_at_once))))
    return passes


def padding(passes: Iterable[Pass], packs: Sequence[Pack]) -> int:
    """Tokens by which the micro-batches of all ranks are larger than the packs in them."""
    batches = [[len(packs[index]) for index in indices] for turn in passes for indices in turn.packs if indices]
    return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)


def _micro_batches(indices: Sequence[int], packs: Sequence[Pack], bound: int) -> list[tuple[int, ...]]:
    batches: list[list[int]] = []
    for index in indices:  # longest first: the first of a micro-batch sets its width
        if batches and (len(batches[-1]) + 1) * len(packs[batches[-1][0]]) <= bound:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]
