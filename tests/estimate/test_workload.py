"""Tokens of a trajectory with all its labels, as trees and one by one."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Mixing, MixingStrategy, Schedule, ScheduleType
from dagger_operator.estimate.workload import Conversation, teacher_share
from dagger_operator.training.template import StudentTemplate

TEMPLATES = Path(__file__).resolve().parents[1] / "training/templates"
WHOLE = float("inf")


@pytest.mark.parametrize(
    ("turns", "growth", "label", "ratio"),
    [(25, 1500, 300, 11.7), (50, 1200, 300, 21.7), (100, 600, 200, 40.6)],
)
def test_trees_of_a_student_that_always_acts_take_so_many_times_fewer_tokens(turns: int, growth: int, label: int, ratio: float) -> None:
    """Worked by hand before there was code: 25 turns to 41K tokens, 50 and 100 turns to 64K; their first 4,000 tokens, growth and labels
    are read back from the ratios."""
    talk = Conversation(turns, first=4000, growth=growth, label=label)
    assert talk.per_label().tokens / talk.trees(0.0, WHOLE).tokens == pytest.approx(ratio, abs=0.06)


def test_a_teacher_that_always_acts_leaves_one_sequence() -> None:
    talk = Conversation(50, first=4000, growth=1200, label=300)
    trees = talk.trees(1.0, WHOLE)
    assert (trees.tokens, trees.sequences, trees.targets) == (talk.state(50) + 300, 1, 50 * 300)


class Characters:
    """A tokenizer that has a token for each character."""

    eos_token = "<|im_end|>"
    added_tokens_encoder: dict[str, int] = {}

    def __init__(self, template: str) -> None:
        self._template = jinja2.Environment(autoescape=False).from_string((TEMPLATES / f"{template}.jinja").read_text())

    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool, **variables: Any) -> str:
        return self._template.render(messages=conversation, **variables)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@pytest.mark.parametrize(
    ("template", "options", "on_the_trunk"),
    [("qwen3_instruct", {}, True), ("qwen3_hybrid", {}, False), ("qwen3_hybrid", {"enable_thinking": False}, False)],
    ids=["plain", "hybrid", "hybrid, told not to think"],
)
def test_a_hybrid_models_label_is_never_the_same_turn_in_history(template: str, options: dict[str, Any], on_the_trunk: bool) -> None:
    """Where the teacher acted: so every label of such a model is a branch."""
    student = StudentTemplate(Characters(template), options)
    state, turn, seen = (
        [{"role": "user", "content": "repair"}],
        {"role": "assistant", "content": "ls"},
        {"role": "user", "content": "geo.py"},
    )
    labelled = student.prompt(state, None) + student.label(state, None, turn)
    assert (student.prompt([*state, turn, seen], None)[: len(labelled)] == labelled) is on_the_trunk


def test_labels_that_always_branch_cost_the_same_whoever_acts() -> None:
    plain, hybrid = (Conversation(50, first=4000, growth=1200, label=300, labels_branch=branch) for branch in (False, True))
    assert hybrid.trees(0.0, WHOLE) == hybrid.trees(1.0, WHOLE) == plain.trees(0.0, WHOLE)


def test_a_tree_that_does_not_fit_is_parted_and_repeats_its_trunk() -> None:
    """Three states of 100, 200 and 300 tokens with labels of 10: 330 whole. Under 325 the first state has a tree of its own."""
    talk = Conversation(3, first=100, growth=100, label=10)
    assert talk.trees(0.0, WHOLE).tokens == 330
    parted = talk.trees(0.0, 325)
    assert (parted.tokens, parted.sequences) == (320 + 110, 2)


def test_steps_that_count_labels_cut_trajectories_and_repeat_the_trunk() -> None:
    talk = Conversation(4, first=100, growth=100, label=10)
    assert talk.trees(0.0, WHOLE, labels_of_a_step=2).tokens == (200 + 20) + (400 + 20)


def test_attended_pairs_of_a_small_tree() -> None:
    """A trunk of 4 and its label of 2 see 6 * 6 / 2; a branch of 2 after 2 tokens sees those, and itself."""
    assert Conversation(2, first=2, growth=2, label=2).trees(0.0, WHOLE).pairs == 18 + (2 * 2 + 2)


conversations = st.builds(
    lambda turns, first, label, observation, branch: Conversation(turns, first, label + observation, label, branch),
    st.integers(1, 60),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.integers(0, 2000),
    st.booleans(),
)
shares = st.floats(0, 1)


@given(conversations, shares, st.integers(64, 200_000), st.one_of(st.none(), st.integers(1, 70)))
def test_trees_never_take_more_than_one_sequence_for_each_label(talk: Conversation, share: float, most: int, labels: int | None) -> None:
    trees, single = talk.trees(share, most, labels), talk.per_label()
    assert trees.tokens <= single.tokens * (1 + 1e-9)
    assert trees.pairs <= single.pairs * (1 + 1e-9)
    assert trees.targets == pytest.approx(single.targets)
    assert trees.sequences <= single.sequences


@given(conversations, shares, st.integers(64, 200_000), st.integers(0, 100_000))
def test_more_room_never_costs_more_tokens(talk: Conversation, share: float, most: int, more: int) -> None:
    assert talk.trees(share, WHOLE).tokens <= talk.trees(share, most).tokens * (1 + 1e-9)
    if not talk.labels_branch and most >= talk.state(talk.turns) + talk.label:
        assert talk.trees(1.0, most).tokens <= talk.trees(share, WHOLE).tokens * (1 + 1e-9)


def test_the_teachers_share_follows_beta() -> None:
    assert [teacher_share(Mixing(), number, 50) for number in (1, 2, 3, 9)] == [1.0, 0.8, 0.6, 0.6]


def test_the_teachers_share_is_what_a_drawn_prefix_leaves() -> None:
    """Prefixes 0, 1 and 2 of 4 turns: one turn on average; of a rollout with 1 turn two thirds are the student's."""
    schedule = Schedule(type=ScheduleType.CONSTANT, value=2)
    mixing = Mixing(strategy=MixingStrategy.STUDENT_PREFIX, max_prefix_turns=schedule)
    assert teacher_share(mixing, 1, 4) == pytest.approx(3 / 4)
    assert teacher_share(mixing, 1, 1) == pytest.approx(1 / 3)
