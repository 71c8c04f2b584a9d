"""Soft targets: the teacher's reported distribution at each token of a label, in the form that the loss takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dagger_operator.store.logprobs import TopLogprobs

_NOT_LISTED = -np.inf


@dataclass(frozen=True)
class Soft:
    """The listed tokens at each target, at most k. The rest of the probability is the tail: all tokens that are not listed."""

    ids: NDArray[np.int32]
    """Shape (targets, k). An unused entry repeats a listed token of its row."""
    logprobs: NDArray[np.float32]
    """Shape (targets, k): log-probabilities; -inf in unused entries."""


def hard(targets: Sequence[int] | NDArray[np.integer[Any]]) -> Soft:
    """Return targets of which only the token is known: it has all of the probability."""
    ids = np.asarray(targets, dtype=np.int32)[:, None]
    return Soft(ids, np.zeros(ids.shape, dtype=np.float32))


def soft(label: Sequence[int], told: TopLogprobs, vocabulary: int) -> Soft | None:
    """Return the teacher's log-probabilities for a label, given as the student's tokens; None if they are for other tokens: another
    tokenizer's, or those of a text that is split differently or has another form.

    Only the token that ends the turn may differ or be missing: it is then a hard target. Ids from `vocabulary` on are not the student's:
    their probability goes to the tail.
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
    """Concatenate targets, all padded to the largest k."""
    k = max(part.ids.shape[1] for part in parts)
    logprobs = np.concatenate([_widened(part.logprobs, k, _NOT_LISTED) for part in parts])
    return Soft(_filled(np.concatenate([_widened(part.ids, k, 0) for part in parts]), logprobs), logprobs)


def _widened(array: NDArray[np.generic], k: int, value: float) -> NDArray[np.generic]:
    return np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)


def _filled(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> NDArray[np.int32]:
    """Fill every unused entry with the most likely token of its row."""
    likeliest = np.take_along_axis(ids, logprobs.argmax(axis=1)[:, None], axis=1)
    return np.where(np.isneginf(logprobs), likeliest, ids)
