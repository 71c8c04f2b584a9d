"""What a conversation's states share is kept once, and each is itself to the last token."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.store.records import Trajectory
from dagger_operator.training.samples import tokenise
from dagger_operator.training.strand import Strand, Tokens, following
from dagger_operator.training.template import StudentTemplate
from dagger_operator.training.tree import alike


@st.composite
def sequences(draw: st.DrawFn) -> list[Tokens]:
    """Each goes on from some place of any before it, as where a template renders history another way; over two tokens they meet by
    chance too."""
    made: list[list[int]] = [[]]
    for _ in range(draw(st.integers(1, 8))):
        of = draw(st.sampled_from(made))
        made.append(of[: draw(st.integers(0, len(of)))] + draw(st.lists(st.integers(0, 1), max_size=8)))
    return [np.array(tokens, dtype=np.int32) for tokens in made]


def strands(made: list[Tokens]) -> list[Strand]:
    found: list[Strand] = []
    for tokens in made:
        found.append(following(tokens, found[-1] if found else None))
    return found


@given(sequences(), st.integers(0, 20))
def test_whatever_sequences_follow_each_other_each_is_kept_exactly(made: list[Tokens], start: int) -> None:
    for tokens, strand in zip(made, strands(made), strict=True):
        assert len(strand) == len(tokens)
        assert strand.tokens().tolist() == tokens.tolist()
        assert strand.tokens(start).tolist() == tokens[start:].tolist()
        assert strand.tokens().dtype == np.int32


@given(sequences())
def test_a_sequence_keeps_only_what_the_one_before_it_has_not(made: list[Tokens]) -> None:
    kept = strands(made)
    before = [np.zeros(0, dtype=np.int32), *made]
    assert [len(strand.own) for strand in kept] == [len(one) - alike(last, one) for last, one in zip(before, made, strict=False)]
    assert all(strand.own.base is None for strand in kept), "none holds the whole sequence in memory"


def test_a_conversation_of_any_length_goes_to_another_process_at_the_size_of_what_is_new_in_each_turn() -> None:
    turns = 3000
    dialogue = np.arange(4 * turns, dtype=np.int32)
    kept = strands([dialogue[: 4 * turn + 4] for turn in range(turns)])
    sent = pickle.dumps(kept)
    assert len(sent) < 300 * turns
    assert [strand.tokens().tolist() for strand in pickle.loads(sent)[::500]] == [strand.tokens().tolist() for strand in kept[::500]]


def test_of_a_trajectory_training_keeps_what_its_labels_do_not_share(
    tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]
) -> None:
    samples = tokenise(trajectories, StudentTemplate(tokenizer_with("qwen3_instruct")), 4096).samples
    beginnings = {
        (sample.trajectory, tuple(sample.tokens[:end].tolist())) for sample in samples for end in range(1, len(sample.tokens) + 1)
    }
    assert sum(len(sample.strand.own) for sample in samples) == len(beginnings)
