"""Token sequences that begin alike as one tree: what they share exists once.

The tree is a list of *chains*, runs of tokens that lie next to each other. The longest sequence is the first chain, the trunk; every
other chain branches off an earlier one. Nothing is assumed about turns or templates: only tokens are compared, so a template that
renders history another way costs tokens, and never changes what is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Span = tuple[int, int]
"""Start and end of neighbouring tokens."""


@dataclass(frozen=True)
class Chain:
    """Tokens `start` to `end` of a layout; the first of them follows the parent's first `at` tokens."""

    start: int
    end: int
    parent: int = -1
    """Index of an earlier chain; -1 for a trunk, which nothing comes before."""
    at: int = 0

    def __len__(self) -> int:
        return self.end - self.start


Chains = tuple[Chain, ...]


def paths(chains: Chains) -> list[list[Span]]:
    """For each chain, the spans of the layout that its tokens see before its own, from the trunk down."""
    found: list[list[Span]] = []
    for chain in chains:
        if chain.parent < 0:
            found.append([])
        else:
            start = chains[chain.parent].start
            found.append([*found[chain.parent], (start, start + chain.at)])
    return found


def visits(chains: Chains) -> tuple[Ints, Ints]:
    """Numbers by which a mask is two comparisons: token q sees token k where `first[k] <= first[q] < last[k]`.

    Both of shape (tokens,). `first` is when a walk through the tree meets a token if it takes every branch before it goes on along
    the chain; what then follows until the end of the chain, `last`, is what descends from the token.
    """
    sizes = [len(chain) for chain in chains]
    for index in range(len(chains) - 1, -1, -1):
        if (parent := chains[index].parent) >= 0:
            sizes[parent] += sizes[index]
    children: dict[int, list[int]] = {}
    for index, chain in enumerate(chains):
        children.setdefault(chain.parent, []).append(index)
    tokens = sum(map(len, chains))
    first, last = np.empty(tokens, dtype=np.int64), np.empty(tokens, dtype=np.int64)
    met = dict.fromkeys(range(len(chains)), 0)
    count = 0
    for root in children.get(-1, []):
        met[root], count = count, count + sizes[root]
    for index, chain in enumerate(chains):
        begin = met[index]
        delay = np.zeros(len(chain) + 1, dtype=np.int64)
        taken = 0
        for child in sorted(children.get(index, []), key=lambda child: chains[child].at):
            met[child] = begin + chains[child].at + taken
            taken += sizes[child]
            delay[chains[child].at] += sizes[child]
        first[chain.start : chain.end] = begin + np.arange(len(chain)) + np.cumsum(delay)[:-1]
        last[chain.start : chain.end] = begin + sizes[index]
    return first, last


def forest(parts: Sequence[Chains]) -> Chains:
    """Layouts one after the other as one; none sees another."""
    joined: list[Chain] = []
    tokens = 0
    for chains in parts:
        before = len(joined)
        joined += (
            replace(chain, start=chain.start + tokens, end=chain.end + tokens, parent=chain.parent + before if chain.parent >= 0 else -1)
            for chain in chains
        )
        tokens += sum(map(len, chains))
    return tuple(joined)


class TreeBuilder:
    """Grows by one sequence at a time, of which none is longer than the one before."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self._tokens: list[Ints] = []
        self._next: dict[tuple[int, int, int], int] = {}
        """By chain, place in it and token: the chain that goes on there."""
        self.length = 0
        """Tokens so far."""

    def cost(self, tokens: Ints) -> int:
        """By how many tokens this sequence would make the tree larger."""
        *_, known = self._follow(tokens)
        return len(tokens) - known

    def add(self, tokens: Ints) -> Ints:
        """Places of these tokens in the layout, shape (tokens,)."""
        spans, parent, at, known = self._follow(tokens)
        if known < len(tokens):
            self._next[parent, at, int(tokens[known])] = len(self.chains)
            end = self.length + len(tokens) - known
            self.chains.append(Chain(self.length, end, parent, at))
            self._tokens.append(tokens[known:])
            spans.append((self.length, end))
            self.length = end
        return np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, dtype=np.int64)

    def tokens(self) -> Ints:
        """The layout's tokens, shape (length,)."""
        return np.concatenate(self._tokens)

    def positions(self) -> Ints:
        """How many tokens come before each one on its path, shape (length,)."""
        depth: list[int] = []
        for chain in self.chains:
            depth.append(depth[chain.parent] + chain.at if chain.parent >= 0 else 0)
        return np.concatenate([np.arange(len(chain)) + before for chain, before in zip(self.chains, depth, strict=True)])

    def _follow(self, tokens: Ints) -> tuple[list[Span], int, int, int]:
        """As far as the tree goes along with these tokens: the way, the chain and place where it ends, and the tokens known."""
        spans: list[Span] = []
        chain, at, known = -1, 0, 0
        while known < len(tokens) and (following := self._next.get((chain, at, int(tokens[known])))) is not None:
            chain, at = following, alike(self._tokens[following], tokens[known:])
            start = self.chains[chain].start
            spans.append((start, start + at))
            known += at
        return spans, chain, at, known


def alike(left: NDArray[np.integer[Any]], right: NDArray[np.integer[Any]]) -> int:
    """Length of what both begin with."""
    both = min(len(left), len(right))
    differs = np.flatnonzero(left[:both] != right[:both])
    return int(differs[0]) if len(differs) else both
