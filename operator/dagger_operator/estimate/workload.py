"""Tokens of a conversation that grows turn by turn, as one sequence per label, and as trees."""

from collections.abc import Iterator
from dataclasses import dataclass

from dagger_operator.api import Mixing, MixingStrategy


@dataclass(frozen=True)
class Tokens:
    """Training work of one trajectory or many."""

    tokens: float = 0.0
    """Tokens that pass through the model."""
    pairs: float = 0.0
    """Pairs of a token and a token that it sees: what attention computes."""
    targets: float = 0.0
    """Tokens with loss."""
    sequences: float = 0.0
    """Trees, or sequences of one label."""

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.tokens + other.tokens, self.pairs + other.pairs, self.targets + other.targets, self.sequences + other.sequences)

    def __mul__(self, times: float) -> "Tokens":
        return Tokens(self.tokens * times, self.pairs * times, self.targets * times, self.sequences * times)


@dataclass(frozen=True)
class Conversation:
    """A rollout in which every turn adds the same number of tokens: before turn t there are `first + (t - 1) * growth`."""

    turns: int
    first: float
    growth: float
    """Tokens that a turn adds: the action and the resulting observation."""
    label: float
    """Tokens of a policy's turn, as action and as label."""
    labels_branch: bool = False
    """Whether a label never has the same tokens as the turn that was taken, even if it is the same turn (`Shape.hybrid`)."""

    def state(self, turn: int) -> float:
        """Return the number of tokens before turn 1, 2, ..."""
        return self.first + (turn - 1) * self.growth

    @property
    def mean_state(self) -> float:
        """Average number of tokens before a turn."""
        return self.first + (self.turns - 1) * self.growth / 2

    @property
    def prompts(self) -> float:
        """Prompt tokens of one call at every state, cached or not."""
        return self.turns * self.mean_state

    def per_label(self) -> Tokens:
        """Return the work with one causal sequence per label: the state, then the label."""
        total = Tokens()
        for turn in range(1, self.turns + 1):
            total += _causal(self.state(turn) + self.label, self.label)
        return total

    def trees(self, teacher_share: float, most_tokens: float, labels_of_a_step: int | None = None) -> Tokens:
        """Return the work of the same labels as trunks with branches, none above `most_tokens`.

        Where the teacher acted, its label lies on the trunk, unless labels always branch off; the label of the last state ends it. A
        longer tree is split, the latest turns first (`training/packing.py`). With `labels_of_a_step`, optimiser steps split trajectories
        after this many labels, and each part repeats the trunk.
        """
        total = Tokens()
        branching = 1.0 if self.labels_branch else 1 - teacher_share
        for first, last in _groups(self.turns, labels_of_a_step):
            length = 0.0
            for turn in range(last, first - 1, -1):
                cost = branching * self.label
                if not length or length + cost > most_tokens:
                    length = self.state(turn) + self.label
                    total += _causal(length, self.label)
                else:
                    length += cost
                    branch = Tokens(self.label, self.label * self.state(turn) + self.label**2 / 2)
                    total += branch * branching + Tokens(targets=self.label)
        return total


def _causal(tokens: float, targets: float) -> Tokens:
    return Tokens(tokens, tokens**2 / 2, targets, 1)


def _groups(turns: int, size: int | None) -> Iterator[tuple[int, int]]:
    size = size or turns
    for first in range(1, turns + 1, size):
        yield first, min(turns, first + size - 1)


def teacher_share(mixing: Mixing, round_number: int, turns: int) -> float:
    """Return the share of turns in which the teacher acts: beta, or what remains of `turns` after a prefix drawn from 0 to T_max."""
    if mixing.strategy is MixingStrategy.PER_TURN:
        return mixing.beta_at(round_number)
    most = mixing.max_prefix_at(round_number)
    return 1 - sum(min(prefix, turns) for prefix in range(most + 1)) / (most + 1) / turns
