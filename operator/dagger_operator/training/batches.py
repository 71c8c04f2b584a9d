"""Which samples make up an optimiser step, and which rank computes which part of it. All of it follows from (seed, round, step)."""

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

    The samples of all epochs form one stream, in which each epoch has its own order of trajectories and a trajectory's labels stay
    together. Every step takes the next `batchSize` labels or trajectories; only the last may be smaller.
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
        """Return the indices of the samples of step 0, 1, ..."""
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
    """One forward pass of every group of ranks that share a row. All groups have the same number of passes, and of pieces in each, so that
    none waits forever in a collective."""

    packs: tuple[tuple[int, ...], ...]
    """Indices of packs, by group; an empty one is a dummy pass, so that the group takes part in the collectives."""
    pieces: int
    """Number of parts in which every rank computes its logits."""


@dataclass(frozen=True)
class Limits:
    """Limits of one forward pass."""

    tokens: int
    """Maximum tokens of a row, including padding; a longer sequence gets a row of its own. A multiple of `multiple`."""
    targets: int
    """Maximum number of targets whose logits exist at a time."""
    multiple: int = 1
    """A row is padded to a multiple of this many tokens."""
    few_lengths: bool = False
    """Whether the multiple doubles with the row length, beyond eight multiples: each length costs a compiled kernel, padding costs less."""
    longest: int = 0
    """Maximum padded length of a sequence that has a row of its own; for other rows it is `tokens`."""

    def padding(self, tokens: int) -> int:
        """Return how many padding tokens a row of `tokens` tokens gets."""
        step = self.multiple
        while self.few_lengths and tokens > 8 * step:
            step *= 2
        least, most = tokens + -tokens % self.multiple, self.tokens if tokens <= self.tokens else self.longest
        return max(least, min(tokens + -tokens % step, most)) - tokens


def spread(packs: Sequence[Pack], groups: int, limits: Limits) -> list[Pass]:
    """Return the forward passes of one step: balanced by tokens, rows bounded with padding. A pack above the bound gets its own row."""
    longest_first = sorted(range(len(packs)), key=lambda index: (-len(packs[index]), index))
    mine: list[list[int]] = [[] for _ in range(groups)]
    load = [0] * groups
    for index in longest_first:
        group = load.index(min(load))
        mine[group].append(index)
        load[group] += len(packs[index])
    passes = []
    for together in zip_longest(*(_rows(indices, packs, limits) for indices in mine), fillvalue=()):
        targets = max(sum(len(packs[index].targets) for index in indices) for indices in together)
        passes.append(Pass(together, max(1, math.ceil(targets / limits.targets))))
    return passes


def padding(passes: Iterable[Pass], packs: Sequence[Pack], limits: Limits) -> int:
    """Return the number of padding tokens in the rows of all groups."""
    return sum(limits.padding(sum(len(packs[index]) for index in indices)) for each in passes for indices in each.packs)


def _rows(indices: Sequence[int], packs: Sequence[Pack], limits: Limits) -> list[tuple[int, ...]]:
    """Put the packs, which come longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    taken: list[int] = []
    for index in indices:
        length = len(packs[index])
        fitting = (row for row, tokens in enumerate(taken) if tokens + length + limits.padding(tokens + length) <= limits.tokens)
        if (row := next(fitting, len(rows))) == len(rows):
            rows.append([])
            taken.append(0)
        rows[row].append(index)
        taken[row] += length
    return [tuple(row) for row in rows]
