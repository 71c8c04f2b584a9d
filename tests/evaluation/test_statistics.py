"""Intervals and tests agree with published numbers, and hold where their definitions say so."""

from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagger_operator.api import EvaluationSummary
from dagger_operator.evaluation.statistics import compare, mcnemar, paired_bootstrap, wilson
from dagger_operator.store.results import EvaluationResult


def evaluated(resolved: set[str], unresolved: set[str]) -> EvaluationResult:
    summary = EvaluationSummary(
        policy="r001-abc",
        tasks=len(resolved) + len(unresolved),
        resolved=len(resolved),
        resolved_rate=0.0,
        interval=[0.0, 1.0],
        false_submits=0,
        seconds=1.0,
    )
    return EvaluationResult(summary=summary, resolved_tasks=tuple(sorted(resolved)), unresolved_tasks=tuple(sorted(unresolved)))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_holds_the_rate_and_mirrors_when_successes_and_failures_trade_places(counts: tuple[int, int], confidence: float) -> None:
    successes, trials = counts
    low, high = wilson(successes, trials, confidence)
    assert 0.0 <= low <= high <= 1.0
    if trials:
        assert low <= successes / trials <= high
    mirrored = wilson(trials - successes, trials, confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


@given(st.integers(0, 300), st.integers(1, 300))
def test_more_confidence_is_a_wider_interval(successes: int, failures: int) -> None:
    narrow, wide = wilson(successes, successes + failures, 0.8), wilson(successes, successes + failures, 0.99)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 8, 20 / 512),  # (1 + 9) / 2^9, doubled
        # Agresti, Categorical Data Analysis, approval ratings: 86 against 150 discordant pairs, z = -4.17.
        (86, 150, 3.7e-5),
    ],
)
def test_mcnemar_gives_the_exact_binomial_p_value(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=0.03)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)


def test_mcnemar_stays_finite_where_powers_of_two_overflow_a_float() -> None:
    assert 0.0 < mcnemar(1400, 1500) < 0.1


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_counts_every_outcome_at_least_as_extreme(first: int, second: int) -> None:
    n, extreme = first + second, abs(first - second)
    brute = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= extreme) / 2**n
    assert mcnemar(first, second) == pytest.approx(brute)


def test_bootstrap_agrees_with_the_normal_interval_on_many_tasks() -> None:
    differences = [1.0] * 60 + [-1.0] * 40 + [0.0] * 300
    mean, second_moment = 20 / 400, 100 / 400
    half = 1.96 * ((second_moment - mean**2) / 400) ** 0.5
    low, high = paired_bootstrap(differences, 0.95, resamples=4000)
    assert (low, high) == (pytest.approx(mean - half, abs=0.006), pytest.approx(mean + half, abs=0.006))


def test_bootstrap_of_one_seed_is_one_interval() -> None:
    differences = [1.0, 0.0, -1.0, 0.0, 1.0, 1.0]
    assert paired_bootstrap(differences, seed=3) == paired_bootstrap(differences, seed=3)
    assert paired_bootstrap([1.0] * 5) == (1.0, 1.0)


def test_comparison_rests_on_common_tasks_alone() -> None:
    candidate = evaluated({"b", "c", "d", "only-in-candidate"}, {"a"})
    reference = evaluated({"a", "b"}, {"c", "d", "only-in-reference"})
    found = compare(candidate, reference)
    assert (found.tasks, found.candidate_rate, found.reference_rate, found.difference) == (4, 0.75, 0.5, 0.25)
    assert (found.only_candidate, found.only_reference, found.p_value) == (2, 1, 1.0)
    assert found.interval[0] < 0 < found.interval[1]


@settings(max_examples=25)  # each compares twice by ten thousand resamples
@given(st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_comparing_the_other_way_round_turns_the_sign(outcomes: dict[str, tuple[bool, bool]]) -> None:
    first, second = (evaluated({t for t, o in outcomes.items() if o[i]}, {t for t, o in outcomes.items() if not o[i]}) for i in (0, 1))
    there, back = compare(first, second), compare(second, first)
    assert there.difference == pytest.approx(there.candidate_rate - there.reference_rate)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert -1.0 <= there.interval[0] <= there.interval[1] <= 1.0


def test_nothing_in_common_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="no differences"):
        compare(evaluated({"a"}, set()), evaluated({"b"}, set()))
