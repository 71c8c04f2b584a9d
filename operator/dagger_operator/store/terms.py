"""Fences trainings of one round off from each other: only the one that began last may go on writing.

A trainer whose node lost the API server but not the storage is a second one beside its replacement, perhaps for hours. Each begins a term
by compare-and-swap, and asks whether it still holds before it stores anything that others rely on. A training may be replaced between the
answer and its next write; so what it writes then must have names of its own: those of its term.
"""

import uuid

from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import SMALL_BYTES, DamagedObject, Object, Store
from dagger_operator.store.records import Record
from dagger_operator.store.stage import StageFailure


class Term(Record):
    """The object that says which training of a round began last."""

    number: int
    """Counts the trainings that began; from 1."""
    token: str
    """Drawn at random, so that no two terms are the same even if the object was deleted in between."""

    @property
    def name(self) -> str:
        """Sorts by number."""
        return f"{self.number:04d}-{self.token}"


async def begin_term(store: Store, round_number: int, above: int) -> Term:
    """Begin a term with a number higher than `above` and than that of every term of this round that the store knows of."""
    key = layout.term(round_number)
    while True:
        there = await store.get(key, SMALL_BYTES)
        known = _parse(there)
        mine = Term(number=max(above, known.number if known else 0) + 1, token=uuid.uuid4().hex[:8])
        if await store.swap(key, mine.model_dump_json().encode(), there) is not None:
            return mine


async def require_term(store: Store, round_number: int, mine: Term) -> None:
    """Raise `StageFailure("TrainingReplaced")`, not permanent, if another training of this round began or finished since ours did."""
    current = _parse(await store.get(layout.term(round_number), SMALL_BYTES))
    if current != mine:
        what = f"training {current.number} of this round began after this one" if current else "another training of this round finished"
        raise StageFailure(
            "TrainingReplaced",
            f"{what}, training {mine.number}, which therefore stores and deletes nothing more. A training that was taken for lost with its "
            "node ends so; if its pod was not, find out what started the stage twice",
            permanent=False,
        )


async def read_term(store: Store, round_number: int) -> Term | None:
    """Return the current term, or None if no training is under way. Raises `DamagedObject` if it cannot be read."""
    there = await store.get(layout.term(round_number), SMALL_BYTES)
    term = _parse(there)
    if there is not None and term is None:
        raise DamagedObject(layout.term(round_number), "is no training's term", "delete it: the training restarts from its checkpoint")
    return term


def _parse(there: Object | None) -> Term | None:
    """Return None also for an object that was corrupted, by hand or by a bug: the next training replaces it."""
    try:
        return Term.model_validate_json(there.data) if there else None
    except ValidationError:
        return None
