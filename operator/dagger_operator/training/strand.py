"""Token sequences that begin alike, each kept as what is new in it.

The states of a conversation repeat all that came before: kept whole, they take memory with the square of the turns.
"""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from dagger_operator.training.tree import alike

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Strand:
    """A sequence that begins as an earlier one does, whatever the two are of.

    Whoever pickles strands hands them over in the order in which they were made, as pickle follows `before` by recursion.
    """

    own: Tokens
    """What is new in it, shape (len - shared,)."""
    shared: int = 0
    """How many tokens come before those."""
    before: Optional["Strand"] = field(default=None, repr=False)
    """The sequence that has the last of them as its own; None where there are none."""

    def __len__(self) -> int:
        return self.shared + len(self.own)

    def tokens(self, start: int = 0) -> Tokens:
        """Those from `start` on."""
        parts: list[Tokens] = []
        strand: Strand | None = self
        end = len(self)
        while strand is not None and end > start:
            parts.append(strand.own[max(0, start - strand.shared) : end - strand.shared])
            end, strand = strand.shared, strand.before
        return np.concatenate(parts[::-1]) if parts else self.own[:0]


def following(tokens: Tokens, last: Strand | None) -> Strand:
    """These tokens as a strand that keeps what the last one has not."""
    shared = alike(last.tokens(), tokens) if last is not None else 0
    before = last
    while before is not None and shared <= before.shared:
        before = before.before
    return Strand(tokens[shared:].copy(), shared, before)
