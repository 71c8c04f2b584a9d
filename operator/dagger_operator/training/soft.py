"""Soft targets: what the teacher told of its distribution at each token of a label, as the loss takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dagger_operator.store.logprobs import TopLogprobs

_NOT_LISTED = -np.inf


@dataclass(frozen=True)
class Soft:
    """The tokens that are listed at each target, k of them at most. What is left of 1 is the tail: all tokens that are not listed."""

    ids: NDArray[np.int32]
    """Shape (targets, k). A place that lists nothing repeats a token of its row that is listed."""
    logprobs: NDArray[np.float32]
    """Shape (targets, k): log-probabilities; -inf where nothing is listed."""


def hard(targets: Sequence[int] | NDArray[np.integer[Any]]) -> Soft:
    """Targets of which only the token is known: all of the probability is its own."""
    ids = np.asarray(targets, dtype=np.int32)[:, None]
    return Soft(ids, np.zeros(ids.shape, dtype=np.float32))


def soft(label: Sequence[int], told: TopLogprobs, vocabulary: int) -> Soft | None:
    """What was told of a label, which is these tokens of the student's; None where it was told of others: of another tokenizer's, or of
    a text that reads the same in other pieces or another form.

    Only the token that ends the turn may differ or not be told: it is a hard target then. Ids from `vocabulary` on are none of the
    student's: their probability goes to the tail.
    """
    ids = np.frombuffer(told.token_ids, dtype=np.int32)
    turn, wanted = len(label) - 1, np.asarray(label, dtype=np.int32)
    if len(ids) not in (turn, turn + 1) or not told.k or not np.array_equal(ids[:turn], wanted[:turn]):
        return None
    whole = turn + 1 if len(ids) > turn and ids[turn] == wanted[turn] else turn
    top = np.frombuffer(told.top_ids, dtype=np.int32).reshape(-1, told.k)[:whole]
    logprobs = np.frombuffer(told.top_logprobs, dtype=np.float32).reshape(-1, told.k)[:whole]
    logprobs = np.where((top >= 0) & (top < vocabulary), logprobs, _NOT_LISTED)
    if not np.isfinite(logprobs).any(axis=1).all():
        return None
    listed = Soft(_filled(top, logprobs), logprobs)
    return listed if whole > turn else joined([listed, hard(wanted[turn:])])


def joined(parts: Sequence[Soft]) -> Soft:
    """Targets one after the other, as wide as the widest."""
    k = max(part.ids.shape[1] for part in parts)
    logprobs = np.concatenate([_widened(part.logprobs, k, _NOT_LISTED) for part in parts])
    return Soft(_filled(np.concatenate([_widened(part.ids, k, 0) for part in parts]), logprobs), logprobs)


def _widened(array: NDArray[np.generic], k: int, value: float) -> NDArray[np.generic]:
    return np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)


def _filled(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> NDArray[np.int32]:
    """With every place that lists nothing on the likeliest token of its row."""
    likeliest = np.take_along_axis(ids, logprobs.argmax(axis=1)[:, None], axis=1)
    return np.where(np.isneginf(logprobs), likeliest, ids)
