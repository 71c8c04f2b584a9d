"""Of the trainings of one round, only the one that began last may go on."""

import asyncio

import pytest

from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.terms import begin_term, read_term, require_term


async def test_of_trainings_that_begin_at_once_the_last_one_goes_on_and_the_others_are_told(store: Store) -> None:
    terms = await asyncio.gather(*(begin_term(store, 1, 0) for _ in range(4)))
    last = max(terms, key=lambda term: term.number)
    assert sorted(term.number for term in terms) == [1, 2, 3, 4]
    await require_term(store, 1, last)
    for term in terms:
        if term != last:
            with pytest.raises(StageFailure, match=f"training 4 of this round began after this one, training {term.number}"):
                await require_term(store, 1, term)


async def test_the_term_of_a_round_says_nothing_about_another_round(store: Store) -> None:
    mine = await begin_term(store, 1, 0)
    await begin_term(store, 2, 0)
    await require_term(store, 1, mine)


async def test_a_term_is_not_held_again_by_one_that_has_its_number(store: Store) -> None:
    """As where the object was deleted by hand in between."""
    mine = await begin_term(store, 1, 0)
    await store.delete(layout.term(1))
    again = await begin_term(store, 1, 0)
    assert again.number == mine.number
    with pytest.raises(StageFailure, match="TrainingReplaced"):
        await require_term(store, 1, mine)


async def test_a_garbled_term_is_nobodys_and_the_next_training_replaces_it(store: Store) -> None:
    mine = await begin_term(store, 1, 0)
    await store.put(layout.term(1), b"{")
    with pytest.raises(DamagedObject, match="delete it"):
        await read_term(store, 1)
    with pytest.raises(StageFailure, match="TrainingReplaced"):
        await require_term(store, 1, mine)
    next_one = await begin_term(store, 1, 7)
    assert next_one.number == 8 and await read_term(store, 1) == next_one
