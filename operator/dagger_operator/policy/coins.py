"""Reproducible draws for mixing and sampling, from `[purpose, seed, round, task, rollout, ...]` (`store.draws`)."""

from dagger_operator.store.draws import draw


def coin(seed: int, round_number: int, task: str, rollout: str, turn: int) -> float:
    """Return the coin of a turn (counted from 0), uniform in [0, 1) with 53 bits: the teacher acts if it is below beta."""
    return float(draw("coin", seed, round_number, task, rollout, turn) >> 11) / 2.0**53


def kappa(seed: int, round_number: int, task: str, rollout: str, t_max: int) -> int:
    """StudentPrefix: return the number of turns that the student takes first, uniform in 0..t_max."""
    if t_max < 0:
        raise ValueError(f"t_max counts turns, so it is 0 or more, got {t_max}")
    return (draw("kappa", seed, round_number, task, rollout) * (t_max + 1)) >> 64


def request_seed(seed: int, round_number: int, task: str, rollout: str, turn: int, role: str) -> int:
    """Return the sampling seed of a request to a served policy, uniform in 0..2**32 - 1. A turn's action and label differ by role."""
    return draw("sample", seed, round_number, task, rollout, turn, role) >> 32
