"""How long a context a model has, and whether `maxModelLen` asks for more: for the estimate, and for the stages that fetch models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagger_operator.api.policies import Serving

_SCALED = {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Kinds of rope scaling whose result `max_position_embeddings` holds; for any other vLLM multiplies it by `factor`."""


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest context in which vLLM serves a model with that `config.json` (`vllm/config/model.py`, 0.32). None where it
    does not say."""
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
    """Whether a server asks for more than its model has. `--hf-overrides` count, unless the model is `trained`: training reads
    `config.json` alone, and would learn from positions that the server has not."""
    overrides = serving.hf_overrides
    longest = longest_context(config if trained else {**config, **overrides})
    if longest is None or serving.max_model_len <= longest:
        return None
    remedy = f'write {longest} or less, or take a longer model ("Longer contexts" in docs/training.md)'
    if trained and overrides:
        remedy += "; --hf-overrides reach servers and not training"
    return TooLong(longest, remedy)
