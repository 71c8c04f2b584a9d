"""Packing changes what a step costs, never what it learns."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.training.packing import Pack, pack, token_ratio
from dagger_operator.training.samples import Sample


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """States that grow as a dialogue does, or stray from it: over three tokens, prefixes meet by chance too."""
    token = st.integers(0, 2)
    made = []
    for trajectory in range(draw(st.integers(1, 3))):
        trunk = draw(st.lists(token, min_size=4, max_size=24))
        for turn in range(draw(st.integers(1, 6))):
            cut = draw(st.integers(1, len(trunk) - 1))
            label = draw(st.one_of(st.just(trunk[cut : cut + 4]), st.lists(token, min_size=1, max_size=4)))
            made.append(Sample(f"0001/{trajectory:05d}", turn, np.array(trunk[:cut] + label, dtype=np.int32), cut))
    return made


def lessons(packs: list[Pack]) -> Counter[tuple[tuple[int, ...], int]]:
    """Every target with all that causal attention lets it be predicted from."""
    seen: Counter[tuple[tuple[int, ...], int]] = Counter()
    for one in packs:
        assert one.position_ids.tolist() == list(range(len(one)))
        for prev, target, weight in zip(one.prev, one.targets, one.weights, strict=True):
            assert weight == 1
            seen[(tuple(one.input_ids[: prev + 1].tolist()), int(target))] += 1
    return seen


@given(samples())
def test_packs_teach_every_label_from_its_own_state_and_nothing_else(made: list[Sample]) -> None:
    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    for sample in made:
        for position in range(sample.prompt, len(sample.tokens)):
            expected[(tuple(sample.tokens[:position].tolist()), int(sample.tokens[position]))] += 1
    packs = pack(made)
    assert lessons(packs) == expected
    assert sum(one.labels for one in packs) == len(made)
    assert token_ratio(made, packs) >= 1


def test_a_run_of_the_teachers_turns_costs_one_sequence() -> None:
    dialogue = np.arange(100, dtype=np.int32)
    turns = [Sample("0001/00000", turn, dialogue[: 20 * turn + 20], 20 * turn + 10) for turn in range(5)]
    packs = pack(turns)
    assert len(packs) == 1
    assert len(packs[0]) == 99
    assert token_ratio(turns, packs) == sum(20 * turn + 19 for turn in range(5)) / 99


def test_a_label_that_the_student_did_not_follow_costs_a_sequence_of_its_own() -> None:
    followed = Sample("0001/00000", 1, np.array([1, 2, 3, 4, 5, 6], dtype=np.int32), 4)
    strayed = Sample("0001/00000", 0, np.array([1, 2, 9, 9], dtype=np.int32), 2)
    elsewhere = Sample("0001/00001", 0, np.array([1, 2, 3], dtype=np.int32), 2)
    assert sorted(len(one) for one in pack([followed, strayed, elsewhere])) == [2, 3, 5]
