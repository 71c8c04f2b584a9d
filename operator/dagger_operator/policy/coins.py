"""Coins that a rerun throws again: every draw is a hash of what it is for.

A draw is the first 8 bytes, big-endian, of BLAKE2b (16-byte digest) over the ASCII JSON array `[purpose, seed, round, task,
rollout, ...]` without spaces. Nothing else enters, so any program can check a recorded coin. This never changes: finished
rounds were mixed by it.
"""

import json
from hashlib import blake2b


def _draw(purpose: str, *key: str | int) -> int:
    """Uniform in 0..2**64 - 1."""
    encoded = json.dumps([purpose, *key], separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return int.from_bytes(blake2b(encoded, digest_size=16).digest()[:8], "big")


def coin(seed: int, round_number: int, task: str, rollout: str, turn: int) -> float:
    """The coin of one turn (from 0), uniform in [0, 1) with 53 bits: the teacher acts where it is below beta."""
    return float(_draw("coin", seed, round_number, task, rollout, turn) >> 11) / 2.0**53


def kappa(seed: int, round_number: int, task: str, rollout: str, t_max: int) -> int:
    """StudentPrefix: the turns that the student takes first, uniform in 0..t_max."""
    if t_max < 0:
        raise ValueError(f"t_max counts turns, so it is 0 or more, got {t_max}")
    return (_draw("kappa", seed, round_number, task, rollout) * (t_max + 1)) >> 64


def request_seed(seed: int, round_number: int, task: str, rollout: str, turn: int, role: str) -> int:
    """Sampling seed of one request to a served policy, uniform in 0..2**32 - 1; the turn's acting and label calls differ by role."""
    return _draw("sample", seed, round_number, task, rollout, turn, role) >> 32
