"""A label is a soft target where what the teacher told is of the very tokens that the student would say."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Training
from dagger_operator.store.logprobs import TopLogprobs
from dagger_operator.store.records import Trajectory, labelled_states
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.packing import pack
from dagger_operator.training.samples import Tokenised, tokenise
from dagger_operator.training.samples import joined as together
from dagger_operator.training.soft import Soft, hard, joined, soft
from dagger_operator.training.template import StudentTemplate

END = 2
LABEL = [11, 12, END]


def told(tokens: list[int], k: int = 2) -> TopLogprobs:
    """Of each token itself and the ids after it."""
    ids = [token + more for token in tokens for more in range(k)]
    return TopLogprobs(token_ids=tokens, top_ids=ids, top_logprobs=[math.log(0.5 / (more + 1)) for _ in tokens for more in range(k)])


def listed(soft: Soft) -> list[dict[int, float]]:
    rows = zip(soft.ids.tolist(), soft.logprobs.tolist(), strict=True)
    return [{token: round(math.exp(value), 4) for token, value in zip(*row, strict=True) if value > -math.inf} for row in rows]


def test_what_was_told_of_the_same_tokens_is_kept() -> None:
    found = soft(LABEL, told(LABEL), 100)
    assert found is not None and (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert listed(found) == [{11: 0.5, 12: 0.25}, {12: 0.5, 13: 0.25}, {2: 0.5, 3: 0.25}]


@pytest.mark.parametrize("tokens", [LABEL[:2], [11, 12, 99]])
def test_the_token_that_ends_a_turn_may_be_another_one_or_not_be_told_and_is_hard_then(tokens: list[int]) -> None:
    found = soft(LABEL, told(tokens), 100)
    assert found is not None and listed(found) == [{11: 0.5, 12: 0.25}, {12: 0.5, 13: 0.25}, {END: 1.0}]
    assert found.ids[2].tolist() == [END, END]


@pytest.mark.parametrize("tokens", [[], [11], [11, END], [12, 11, END], [11, 12, 13, END], [END, 11, 12], [11, 12, 99, END]])
def test_what_was_told_of_other_tokens_is_not(tokens: list[int]) -> None:
    assert soft(LABEL, told(tokens), 100) is None


def test_ids_that_the_student_has_not_go_to_the_tail() -> None:
    found = soft(LABEL, told(LABEL), 13)
    assert found is not None and listed(found)[1] == {12: 0.5}
    assert found.ids[1].tolist() == [12, 12]
    assert soft(LABEL, told(LABEL), 12) is None  # nothing is left of the second
    assert soft(LABEL, told(LABEL, k=0), 100) is None


def test_an_empty_label_has_its_end_alone() -> None:
    assert (found := soft([END], told([END]), 100)) is not None and listed(found) == [{2: 0.5, 3: 0.25}]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_joined_rows_are_as_wide_as_the_widest_and_say_the_same(widths: list[int]) -> None:
    parts = [some for k in widths if (some := soft(LABEL, told(LABEL, k), 100)) is not None] + [hard([7])]
    whole = joined(parts)
    assert whole.ids.shape == whole.logprobs.shape == (3 * len(widths) + 1, max(widths))
    assert listed(whole) == [row for part in parts for row in listed(part)]
    for ids, row in zip(whole.ids.tolist(), listed(whole), strict=True):
        assert set(ids) == set(row)  # what fills up masks nothing else


SOFT = Training.model_validate({"loss": "ForwardKL"})


def told_of(trajectory: Trajectory, template: StudentTemplate, shift: int = 0) -> Trajectory:
    """With what a teacher tells of its labels whose ids are the student's, or others."""
    turns = list(trajectory.turns)
    for state in labelled_states(trajectory):
        tokens = [token + shift for token in template.label(state.messages, state.tools, state.label)]
        label = turns[state.turn].label
        assert label is not None
        turns[state.turn] = turns[state.turn].model_copy(update={"label": label.model_copy(update={"logprobs": told(tokens)})})
    return trajectory.model_copy(update={"turns": tuple(turns)})


@pytest.mark.heavy
def test_labels_of_which_nothing_or_something_else_was_told_are_counted_and_hard(
    tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]
) -> None:
    template = StudentTemplate(tokenizer_with("qwen3_instruct"))
    given = [told_of(trajectories[0], template), trajectories[1], told_of(trajectories[2], template, 1), *trajectories[3:]]
    parts = [tokenise(some, template, 4096, soft_below=400) for some in (given[:2], given[2:])]
    whole = together(parts, SOFT)
    assert (whole.untold, whole.foreign) == (sum(len(trajectories[i].turns) for i in (1, 3, 4, 5)), 2)
    assert whole.hard_labels == whole.untold + whole.foreign == len(whole.samples) - 5
    for sample in whole.samples:
        assert (sample.soft is not None) == (sample.trajectory == "0001/00000")
        if sample.soft is not None:
            assert [next(iter(row)) for row in listed(sample.soft)] == sample.targets.tolist()
    packs = pack(whole.samples, 4096)
    assert [one.soft is not None for one in packs] == [True] + 5 * [False]
    by_entropy = tokenise(given, template, 4096)
    assert by_entropy.hard_labels == 0 and all(sample.soft is None for sample in by_entropy.samples)


def test_a_round_without_a_soft_target_says_why() -> None:
    from dagger_operator.training.samples import Sample
    from dagger_operator.training.strand import Strand

    samples = tuple(Sample("0001/00000", turn, Strand(np.arange(4, dtype=np.int32)), 2) for turn in range(3))
    with pytest.raises(
        StageFailure, match=r"of 2 the teacher told no.*of 1 those of other tokens.*labels\.topLogprobs for the rounds"
    ) as failed:
        together([Tokenised(samples, 0, untold=2, foreign=1)], SOFT)
    assert (failed.value.reason, failed.value.permanent) == ("NoSoftTargets", True)
    assert together([Tokenised(samples, 0, untold=1, foreign=1)], SOFT).hard_labels == 2
