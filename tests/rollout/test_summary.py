"""A round's numbers say what was delivered, and what infrastructure broke is in none of them."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Role, Scaffold
from dagger_operator.rollout.actions import action_reader
from dagger_operator.rollout.summary import Tally
from dagger_operator.store.records import Completion, Failure, LabelFlaw, Outcome, Timings, Trajectory, Turn

READER = action_reader(Scaffold(action_regex="(?s)(.+)"))


def tally_of(trajectories: Iterable[Trajectory]) -> Tally:
    tally = Tally(READER)
    for one in trajectories:
        tally.add(one)
    return tally


def said(content: str, tokens: int = 1, ended: str = "stop") -> Completion:
    return Completion(message={"role": "assistant", "content": content}, policy="p", finish_reason=ended, completion_tokens=tokens)


def turn(actor: Role, action: str, label: str | None, *, tokens: int = 1, flaw: LabelFlaw | None = None, ended: str = "length") -> Turn:
    """`ended`: as what its label did, where that was cut off."""
    return Turn(
        index=0,
        actor=actor,
        beta=0.5,
        coin=0.1,
        kept=0,
        messages=(),
        action=said(action, tokens),
        label=said(label, ended=ended if flaw is LabelFlaw.TRUNCATED else "stop") if label is not None else None,
        label_flaw=flaw,
    )


def trajectory(*turns: Turn, outcome: Outcome = Outcome.RESOLVED, start: float = 0.0, failure: Failure | None = None) -> Trajectory:
    return Trajectory(
        run="r",
        round=1,
        rollout_id="t",
        task_id="t",
        student="s",
        turns=turns,
        outcome=outcome,
        failure=failure,
        timings=Timings(started_at=start, total=10.0),
    )


def test_a_round_is_counted_by_hand() -> None:
    tally = tally_of(
        [
            trajectory(turn(Role.TEACHER, "a", "a", tokens=30), turn(Role.STUDENT, "b", "c", tokens=5), start=100.0),
            trajectory(
                turn(Role.STUDENT, "b", "b", tokens=5),
                turn(Role.STUDENT, "b", None, tokens=0, flaw=LabelFlaw.REQUEST_FAILED),
                turn(Role.TEACHER, "cut", "cut", tokens=20, flaw=LabelFlaw.TRUNCATED),
                outcome=Outcome.LIMIT_REACHED,
                start=150.0,
            ),
            trajectory(outcome=Outcome.INFRASTRUCTURE_FAILURE, failure=Failure(reason="Unreachable", message="m"), start=90.0),
        ],
    )
    found = tally.summary(nominal_beta=0.5, data_digest="d")
    assert found.outcomes == {"Resolved": 1, "LimitReached": 1, "InfrastructureFailure": 1}
    assert (found.rollouts, found.turns, found.labels, found.label_coverage) == (3, 5, 3, 0.6)
    assert (found.teacher_turn_share, found.teacher_token_share) == (0.4, 50 / 60)
    assert found.agreement == 0.5  # of two student turns with a label that trains
    assert found.seconds == 70.0
    assert tally.excluded == {"Unreachable": 1}
    assert tally.flaws == {LabelFlaw.REQUEST_FAILED: 1, LabelFlaw.TRUNCATED: 1}
    assert tally.valid_fraction == pytest.approx(2 / 3)


def test_nothing_to_compare_is_no_agreement_rather_than_none_at_all() -> None:
    tally = tally_of([trajectory(turn(Role.TEACHER, "a", "a"))])
    assert tally.summary(nominal_beta=1.0, data_digest="d").agreement is None


KINDS = st.tuples(st.sampled_from(Role), st.booleans(), st.booleans())


@given(st.lists(st.lists(KINDS, max_size=5), max_size=6), st.integers(0, 5))
def test_broken_rollouts_move_no_share(shapes: list[list[tuple[Role, bool, bool]]], broken: int) -> None:
    whole = [
        trajectory(
            *(turn(actor, "a", "a" if same else "b", flaw=LabelFlaw.UNPARSABLE if flawed else None) for actor, same, flawed in shape)
        )
        for shape in shapes
    ]
    lost = [trajectory(turn(Role.TEACHER, "x", "x"), outcome=Outcome.INFRASTRUCTURE_FAILURE)] * broken
    there, without = (tally_of(t).summary(nominal_beta=None, data_digest="d") for t in (whole + lost, whole))
    assert there.rollouts == without.rollouts + broken
    same = {"rollouts", "outcomes", "seconds"}  # seconds are of the whole stage
    assert there.model_dump(exclude=same) == without.model_dump(exclude=same)


def test_only_what_an_edit_may_mend_is_worth_another_try() -> None:
    def of(rollout: str, *flaws: LabelFlaw | None) -> Trajectory:
        turns = (turn(Role.STUDENT, "a", "b", flaw=flaw) for flaw in flaws)
        return trajectory(*turns).model_copy(update={"rollout_id": rollout})

    tally = tally_of([of(flaw.value, None, flaw) for flaw in LabelFlaw] + [of("whole", None), of("no turn")])
    assert tally.mendable == ["Truncated", "Refused", "RequestFailed", "no turn"]


@pytest.mark.parametrize(("ended", "mendable"), [("length", True), ("tool_calls", True), ("content_filter", False)])
def test_a_label_that_its_endpoint_ended_with_tokens_left_is_told_apart_and_not_paid_for_again(ended: str, mendable: bool) -> None:
    cut = turn(Role.STUDENT, "a", "b", flaw=LabelFlaw.TRUNCATED, ended=ended)
    tally = tally_of([trajectory(turn(Role.STUDENT, "a", "b"), cut)])
    assert (tally.turns, tally.labels, bool(tally.mendable)) == (2, 1, mendable)
    assert (tally.flaws, tally.stopped) == (({LabelFlaw.TRUNCATED: 1}, {}) if mendable else ({}, {ended: 1}))
