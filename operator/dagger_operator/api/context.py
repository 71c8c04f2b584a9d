"""The longest context of a model, and whether `maxModelLen` exceeds it: for the estimate, and for the stages that fetch models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagger_operator.api.policies import Serving

_SCALED = {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Kinds of rope scaling whose result `max_position_embeddings` already includes; for any other, vLLM multiplies it by `factor`."""


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Return the longest context, in tokens, with which vLLM serves a model with this `config.json` (`vllm/config/model.py`, 0.32), or None
    if the config does not state one."""
    inner = config.get("text_config", config)
    positions = inner.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    rope = inner.get("rope_scaling") or inner.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) in _SCALED or "gemma3" in str(inner.get("model_type")):
        return positions
    return int(positions * (rope.get("factor") or 1))


@dataclass(frozen=True)
class TooLong:
    """A `maxModelLen` that vLLM refuses for a model."""

    longest: int
    remedy: str


def too_long(serving: Serving, config: Mapping[str, Any], *, trained: bool) -> TooLong | None:
    """Return by how much a server's `maxModelLen` exceeds its model's context and the remedy, or None if it fits. `--hf-overrides` count
    unless the model is `trained`: training reads only `config.json`, and would learn from positions that the server does not have."""
    overrides = serving.hf_overrides
    longest = longest_context(config if trained else {**config, **overrides})
    if longest is None or serving.max_model_len <= longest:
        return None
    remedy = f'write {longest} or less, or take a longer model ("Longer contexts" in docs/training.md)'
    if trained and overrides:
        remedy += "; --hf-overrides reach servers and not training"
    return TooLong(longest, remedy)
