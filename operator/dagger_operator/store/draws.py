"""Draws that a rerun repeats: each is a hash of its purpose.

A draw is the first 8 bytes, big-endian, of BLAKE2b (16-byte digest) over the ASCII JSON array `[purpose, ...]` of its key, without
spaces. Nothing else enters, so any program can verify a recorded coin. This must never change: finished rounds were mixed with it.
"""

import json
from hashlib import blake2b


def draw(purpose: str, *key: str | int) -> int:
    """Return a uniform integer in 0..2**64 - 1."""
    encoded = json.dumps([purpose, *key], separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return int.from_bytes(blake2b(encoded, digest_size=16).digest()[:8], "big")
