"""Who acts: by the spec, by the coin, and again the same."""

import math

from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Mixing, MixingStrategy, Role, Schedule, ScheduleType
from dagger_operator.policy.mixing import Mixer


def per_turn(beta: float) -> Mixing:
    return Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=beta))


def prefix(t_max: int) -> Mixing:
    return Mixing(strategy=MixingStrategy.STUDENT_PREFIX, max_prefix_turns=Schedule(type=ScheduleType.CONSTANT, value=t_max))


@given(st.floats(0, 1), st.integers(0, 2**63 - 1), st.text(max_size=10), st.integers(0, 500))
def test_the_teacher_acts_where_the_coin_is_below_beta(beta, seed, rollout, turn):
    decision = Mixer(per_turn(beta), seed, 1, "t", rollout).decide(turn)
    assert decision.beta == beta
    assert (decision.actor is Role.TEACHER) == (decision.coin < beta)
    assert decision == Mixer(per_turn(beta), seed, 1, "t", rollout).decide(turn)


def test_beta_one_is_the_teacher_alone_and_beta_zero_the_student_alone():
    for turn in range(2000):
        assert Mixer(per_turn(1.0), 0, 1, "t", "00000").decide(turn).actor is Role.TEACHER
        assert Mixer(per_turn(0.0), 0, 1, "t", "00000").decide(turn).actor is Role.STUDENT


def test_the_delivered_share_of_turns_is_beta():
    """512 rollouts of 40 turns at the paper's betas: within 5 standard errors."""
    for round_number, beta in enumerate((1.0, 0.8, 0.6, 0.6, 0.6), start=1):
        mixers = [Mixer(Mixing(), 17, round_number, f"task-{i}", f"{i:05}") for i in range(512)]
        turns = [mixer.decide(turn) for mixer in mixers for turn in range(40)]
        share = sum(turn.actor is Role.TEACHER for turn in turns) / len(turns)
        assert {turn.beta for turn in turns} == {beta}
        assert abs(share - beta) <= 5 * math.sqrt(beta * (1 - beta) / len(turns))


@given(st.integers(0, 60), st.integers(0, 2**63 - 1), st.text(max_size=10))
def test_the_student_takes_the_first_kappa_turns_and_the_teacher_finishes(t_max, seed, rollout):
    mixer = Mixer(prefix(t_max), seed, 1, "t", rollout)
    assert mixer.kappa is not None
    actors = [mixer.decide(turn).actor for turn in range(t_max + 5)]
    assert actors == [Role.STUDENT] * mixer.kappa + [Role.TEACHER] * (t_max + 5 - mixer.kappa)
    assert {mixer.decide(turn).beta for turn in range(t_max + 5)} <= {0.0, 1.0}


def test_evaluation_is_the_student_alone():
    mixer = Mixer(None, 0, 1, "t", "00000")
    assert mixer.kappa is None
    assert all(mixer.decide(turn).actor is Role.STUDENT and mixer.decide(turn).beta == 0.0 for turn in range(200))
