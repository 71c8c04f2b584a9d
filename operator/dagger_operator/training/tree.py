"""Merges token sequences with common prefixes into one tree, in which shared tokens exist once.

The tree is a list of *chains*, runs of adjacent tokens. The longest sequence is the first chain, the trunk; every other chain branches
off an earlier one. Nothing is assumed about turns or templates: only tokens are compared, so a template that renders history differently
costs tokens, but never changes what is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Span = tuple[int, int]
"""Start and end of a run of adjacent tokens."""


@dataclass(frozen=True)
class Chain:
    """Tokens `start` to `end` of a layout; the first of them follows the parent's first `at` tokens."""

    start: int
    end: int
    parent: int = -1
    """Index of an earlier chain; -1 for a trunk, which has none before it."""
    at: int = 0

    def __len__(self) -> int:
        return self.end - self.start


Chains = tuple[Chain, ...]


def paths(chains: Chains) -> list[list[Span]]:
    """Return for each chain the spans of the layout that its tokens see before their own, from the trunk down."""
    found: list[list[Span]] = []
    for chain in chains:
        if chain.parent < 0:
            found.append([])
        else:
            start = chains[chain.parent].start
            found.append([*found[chain.parent], (start, start + chain.at)])
    return found


def visits(chains: Chains) -> tuple[Ints, Ints]:
    """Return numbers that reduce the mask to two comparisons: token q sees token k if `first[k] <= first[q] < last[k]`.

    Both have shape (tokens,). `first` is the token's position in a depth-first walk that takes every branch before it continues along the
    chain; what then follows until the end of the chain, `last`, descends from the token.
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
    """Concatenate layouts into one; none sees another."""
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
    """Builds a tree one sequence at a time; none may be longer than the one before."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self._tokens: list[Ints] = []
        self._next: dict[tuple[int, int, int], int] = {}
        """Maps (chain, position in it, token) to the chain that continues there."""
        self.length = 0
        """Number of tokens so far."""

    def cost(self, tokens: Ints) -> int:
        """Return by how many tokens this sequence would enlarge the tree."""
        *_, known = self._follow(tokens)
        return len(tokens) - known

    def add(self, tokens: Ints) -> Ints:
        """Add a sequence; return the positions of its tokens in the layout, shape (tokens,)."""
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
        """Return the layout's tokens, shape (length,)."""
        return np.concatenate(self._tokens)

    def positions(self) -> Ints:
        """Return how many tokens come before each one on its path, shape (length,)."""
        depth: list[int] = []
        for chain in self.chains:
            depth.append(depth[chain.parent] + chain.at if chain.parent >= 0 else 0)
        return np.concatenate([np.arange(len(chain)) + before for chain, before in zip(self.chains, depth, strict=True)])

    def _follow(self, tokens: Ints) -> tuple[list[Span], int, int, int]:
        """Match these tokens as far as possible. Return their spans, the chain and position where they end, and the number matched."""
        spans: list[Span] = []
        chain, at, known = -1, 0, 0
        while known < len(tokens) and (following := self._next.get((chain, at, int(tokens[known])))) is not None:
            chain, at = following, alike(self._tokens[following], tokens[known:])
            start = self.chains[chain].start
            spans.append((start, start + at))
            known += at
        return spans, chain, at, known


def alike(left: NDArray[np.integer[Any]], right: NDArray[np.integer[Any]]) -> int:
    """Return the length of the common prefix."""
    both = min(len(left), len(right))
    differs = np.flatnonzero(left[:both] != right[:both])
    return int(differs[0]) if len(differs) else both
