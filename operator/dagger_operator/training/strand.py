"""Token sequences with common prefixes, each stored as what it adds.

The states of a conversation repeat everything before: stored whole, they take memory quadratic in the number of turns.
"""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from dagger_operator.training.tree import alike

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Strand:
    """A sequence that shares a prefix with an earlier one, whatever the two represent.

    Pickle strands in the order in which they were made, as pickle follows `before` by recursion.
    """

    own: Tokens
    """The tokens that it adds, shape (len - shared,)."""
    shared: int = 0
    """Number of tokens before those."""
    before: Optional["Strand"] = field(default=None, repr=False)
    """The sequence whose `own` has the last of the shared tokens; None if there are none."""

    def __len__(self) -> int:
        return self.shared + len(self.own)

    def tokens(self, start: int = 0) -> Tokens:
        """Return the tokens from `start` on."""
        parts: list[Tokens] = []
        strand: Strand | None = self
        end = len(self)
        while strand is not None and end > start:
            parts.append(strand.own[max(0, start - strand.shared) : end - strand.shared])
            end, strand = strand.shared, strand.before
        return np.concatenate(parts[::-1]) if parts else self.own[:0]


def following(tokens: Tokens, last: Strand | None) -> Strand:
    """Return these tokens as a strand that stores only what `last` lacks."""
    shared = alike(last.tokens(), tokens) if last is not None else 0
    before = last
    while before is not None and shared <= before.shared:
        before = before.before
    return Strand(tokens[shared:].copy(), shared, before)
