"""Packing changes what a step costs, never what it learns."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api.training import Packing
from dagger_operator.training.packing import Pack, pack
from dagger_operator.training.samples import Sample
from dagger_operator.training.strand import Strand
from dagger_operator.training.tree import visits


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
            made.append(Sample(f"0001/{trajectory:05d}", turn, Strand(np.array(trunk[:cut] + label, dtype=np.int32)), cut))
    return made


def lessons(packs: list[Pack]) -> Counter[tuple[tuple[int, ...], int, float]]:
    """Every target with its weight and all that it may be predicted from."""
    taught: Counter[tuple[tuple[int, ...], int, float]] = Counter()
    for one in packs:
        first, last = visits(one.chains)
        for prev, target, weight in zip(one.prev, one.targets, one.weights, strict=True):
            seen = np.flatnonzero((first <= first[prev]) & (first[prev] < last))
            seen = seen[np.argsort(one.position_ids[seen])]
            assert one.position_ids[seen].tolist() == list(range(len(seen)))
            taught[tuple(one.input_ids[seen].tolist()), int(target), float(weight)] += 1
    return taught


def token_ratio(made: list[Sample], packs: list[Pack]) -> float:
    """Tokens that one sequence per sample would cost, by tokens that the packs cost."""
    return sum(len(sample.strand) - 1 for sample in made) / sum(map(len, packs))


@given(samples(), st.integers(1, 60), st.sampled_from(Packing))
def test_packs_teach_every_label_from_its_own_state_and_nothing_else(made: list[Sample], most_tokens: int, packing: Packing) -> None:
    expected: Counter[tuple[tuple[int, ...], int, float]] = Counter()
    for sample in made:
        for position in range(sample.prompt, len(sample.tokens)):
            expected[tuple(sample.tokens[:position].tolist()), int(sample.tokens[position]), sample.weight] += 1
    packs = pack(made, most_tokens, packing)
    assert lessons(packs) == expected
    assert sum(one.labels for one in packs) == len(made)
    assert token_ratio(made, packs) >= 1


@given(samples(), st.integers(1, 60))
def test_a_pack_keeps_to_the_bound_unless_a_single_sequence_is_longer(made: list[Sample], most_tokens: int) -> None:
    for one in pack(made, most_tokens):
        assert len(one) <= most_tokens or len(one) == 1 + int(one.position_ids.max())


@given(samples())
def test_what_a_trajectorys_labels_share_costs_once(made: list[Sample]) -> None:
    beginnings = {(sample.trajectory, tuple(sample.tokens[:end].tolist())) for sample in made for end in range(1, len(sample.tokens))}
    assert sum(map(len, pack(made, 10**6))) == len(beginnings)


def test_a_run_of_the_teachers_turns_costs_one_sequence() -> None:
    dialogue = np.arange(100, dtype=np.int32)
    turns = [Sample("0001/00000", turn, Strand(dialogue[: 20 * turn + 20]), 20 * turn + 10) for turn in range(5)]
    packs = pack(turns, 1000)
    assert [len(one) for one in packs] == [99]
    assert token_ratio(turns, packs) == sum(20 * turn + 19 for turn in range(5)) / 99


def test_a_label_that_the_student_did_not_follow_costs_its_own_tokens_alone() -> None:
    followed = Sample("0001/00000", 1, Strand(np.array([1, 2, 3, 4, 5, 6], dtype=np.int32)), 4)
    strayed = Sample("0001/00000", 0, Strand(np.array([1, 2, 9, 9], dtype=np.int32)), 2)
    elsewhere = Sample("0001/00001", 0, Strand(np.array([1, 2, 3], dtype=np.int32)), 2)
    assert sorted(len(one) for one in pack([followed, strayed, elsewhere], 1000)) == [2, 6]


def test_the_first_token_of_a_branch_is_predicted_from_the_trunk() -> None:
    trunk = Sample("0001/00000", 1, Strand(np.array([1, 2, 3, 4, 5, 6], dtype=np.int32)), 4)
    branch = Sample("0001/00000", 0, Strand(np.array([1, 2, 8, 9], dtype=np.int32)), 2)
    (one,) = pack([trunk, branch], 1000)
    assert one.input_ids.tolist() == [1, 2, 3, 4, 5, 8]
    assert one.position_ids.tolist() == [0, 1, 2, 3, 4, 2]
    assert dict(zip(one.targets.tolist(), one.prev.tolist(), strict=True)) == {5: 3, 6: 4, 8: 1, 9: 5}


def test_a_tree_above_the_bound_is_parted_so_that_late_turns_share_the_long_trunk() -> None:
    dialogue = np.arange(400, dtype=np.int32)
    turns = [
        Sample("0001/00000", turn, Strand(np.concatenate([dialogue[:end], np.full(11, 1000 + turn, dtype=np.int32)])), end)
        for turn, end in enumerate(range(40, 401, 40))
    ]
    assert [len(one) for one in pack(turns, 10**6)] == [400 + 10 * 10]
    parted = pack(turns, 440)
    assert [one.labels for one in parted] == [4, 6]
    assert [len(one) for one in parted] == [400 + 4 * 10, 240 + 6 * 10]
    assert token_ratio(turns, parted) == pytest.approx((40 * 55 + 100) / 740)
