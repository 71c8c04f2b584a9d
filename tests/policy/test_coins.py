"""Coins are the same for ever, and fair."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.policy.coins import coin, kappa, request_seed

ids = st.text(max_size=20)
numbers = st.integers(0, 2**63 - 1)

GOLDEN_COINS = [0.05840802960198355, 0.6598487810657939, 0.6871086910556868]
GOLDEN_KAPPAS = [18, 21, 0, 16, 25, 19]
GOLDEN_SEED = 2638048468


def test_coins_are_the_same_for_ever():
    """Recorded rounds depend on these numbers: a change of any of them is a change of the format."""
    assert coin(0, 1, "django__django-1", "00000", 0) == GOLDEN_COINS[0]
    assert coin(0, 1, "django__django-1", "00000", 1) == GOLDEN_COINS[1]
    assert coin(2**63 - 1, 5, "tâche", "00511", 99) == GOLDEN_COINS[2]
    assert [kappa(7, 2, "t", f"{i:05}", 30) for i in range(6)] == GOLDEN_KAPPAS
    assert request_seed(7, 2, "t", "00001", 3, "teacher") == GOLDEN_SEED


@given(numbers, numbers, ids, ids, numbers)
def test_a_coin_lies_in_its_interval_and_comes_out_again(seed, round_number, task, rollout, turn):
    drawn = coin(seed, round_number, task, rollout, turn)
    assert 0.0 <= drawn < 1.0
    assert drawn == coin(seed, round_number, task, rollout, turn)


@given(ids, ids, ids, ids)
def test_keys_do_not_run_into_each_other(task, rollout, other_task, other_rollout):
    if (task, rollout) != (other_task, other_rollout):
        assert coin(1, 1, task, rollout, 0) != coin(1, 1, other_task, other_rollout, 0)


def test_coins_are_uniform_over_turns_rollouts_and_seeds():
    """Chi-square over 100 bins, once for each part of the key; 99 degrees of freedom, so 180 is beyond 5 sigma."""
    families = (
        [coin(0, 1, "t", "00000", turn) for turn in range(20_000)],
        [coin(0, 1, "t", f"{rollout:05}", 0) for rollout in range(20_000)],
        [coin(seed, 1, "t", "00000", 0) for seed in range(20_000)],
    )
    for draws in families:
        bins = [0] * 100
        for draw in draws:
            bins[int(draw * 100)] += 1
        assert sum((count - 200) ** 2 / 200 for count in bins) < 180


def test_neighbouring_turns_are_uncorrelated():
    draws = [coin(3, 1, "t", "00000", turn) - 0.5 for turn in range(20_000)]
    correlation = 12 * sum(a * b for a, b in pairwise(draws)) / (len(draws) - 1)
    assert abs(correlation) < 5 / math.sqrt(len(draws))


@given(numbers, ids, st.integers(0, 200))
def test_kappa_lies_in_its_range(seed, rollout, t_max):
    assert 0 <= kappa(seed, 1, "t", rollout, t_max) <= t_max


def test_kappa_is_uniform_with_both_ends():
    counts = [0] * 11
    for rollout in range(11_000):
        counts[kappa(0, 1, "t", f"{rollout:05}", 10)] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 45  # 10 degrees of freedom, beyond 5 sigma


def test_a_negative_t_max_is_refused():
    with pytest.raises(ValueError, match="t_max counts turns"):
        kappa(0, 1, "t", "00000", -1)
