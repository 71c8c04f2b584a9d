"""Statistics of resolved rates: an interval for one policy, and paired comparisons of two on the same tasks. Pure."""

import random
from collections.abc import Sequence
from fractions import Fraction
from math import comb, sqrt
from statistics import NormalDist, fmean

from pydantic import BaseModel, ConfigDict

from dagger_operator.store.results import EvaluationResult


class Comparison(BaseModel):
    """Comparison of a policy, the candidate, with another, the reference, on the tasks on which both were graded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: int
    """Number of tasks on which both were graded."""
    candidate_rate: float
    reference_rate: float
    difference: float
    """`candidate_rate - reference_rate`: above 0 the candidate is better."""
    interval: tuple[float, float]
    """Percentile interval of the difference, by paired bootstrap over tasks."""
    confidence: float
    only_candidate: int
    """Tasks that only the candidate resolved."""
    only_reference: int
    """Tasks that only the reference resolved."""
    p_value: float
    """McNemar's exact test, two-sided."""


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion; (0, 1) without trials (Wilson 1927; Newcombe 1998, method 3)."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes {successes} do not lie in 0..trials {trials}")
    z = _z(confidence)
    if trials == 0:
        return 0.0, 1.0
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    # At 0 and 1 the interval touches the bound; rounding must not leave a gap.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: under the null both policies resolve a discordant task equally often."""
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts of tasks are not negative: {only_first}, {only_second}")
    discordant = only_first + only_second
    tail = sum(comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def paired_bootstrap(
    differences: Sequence[float], confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean of per-task differences, resampling tasks. The same seed gives the same interval."""
    _z(confidence)
    if not differences:
        raise ValueError("no differences: a paired comparison needs at least one task that both policies were graded on")
    rng, count = random.Random(seed), len(differences)  # noqa: S311 - statistics, not secrets
    means = sorted(fmean(rng.choices(differences, k=count)) for _ in range(resamples))
    tail = int(resamples * (1 - confidence) / 2)
    return means[tail], means[resamples - 1 - tail]


def compare(candidate: EvaluationResult, reference: EvaluationResult, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two evaluations on their common tasks. Raises `ValueError` if they have none."""
    by_candidate, by_reference = set(candidate.resolved_tasks), set(reference.resolved_tasks)
    common = sorted((by_candidate | set(candidate.unresolved_tasks)) & (by_reference | set(reference.unresolved_tasks)))
    differences = [float(task in by_candidate) - float(task in by_reference) for task in common]
    interval = paired_bootstrap(differences, confidence, seed=seed)
    only_candidate, only_reference = differences.count(1.0), differences.count(-1.0)
    return Comparison(
        tasks=len(common),
        candidate_rate=len(by_candidate.intersection(common)) / len(common),
        reference_rate=len(by_reference.intersection(common)) / len(common),
        difference=(only_candidate - only_reference) / len(common),
        interval=interval,
        confidence=confidence,
        only_candidate=only_candidate,
        only_reference=only_reference,
        p_value=mcnemar(only_candidate, only_reference),
    )


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} does not lie between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
