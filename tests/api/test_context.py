"""How long a context a model has, as vLLM counts it: the estimate and `prepare` ask the same function."""

import json
from typing import Any

import pytest

from dagger_operator.api import Serving
from dagger_operator.api.context import longest_context, too_long
from dagger_operator.estimate import shape_of

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 512}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960),
        ({"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 40960),
        ({"max_position_embeddings": 65536, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 65536),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 2048, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 2048),
        ({"model_type": "gemma3_text", "max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 131072),
        ({"text_config": {"max_position_embeddings": 2048}}, 2048),
    ],
)
def test_the_longest_context_is_the_one_that_vllm_serves(config: dict[str, Any], longest: int | None) -> None:
    assert longest_context(config) == longest
    if "text_config" not in config:
        assert shape_of({**SIZES, **config}).positions == longest


@pytest.mark.parametrize("written", [["--hf-overrides", "{}"], ["--hf-overrides={}"]])
@pytest.mark.parametrize("trained", [True, False])
def test_overrides_that_change_no_context_change_nothing(written: list[str], trained: bool) -> None:
    serving = Serving(max_model_len=4096, extra_args=written)
    found = too_long(serving, {"max_position_embeddings": 2048}, trained=trained)
    assert found is not None and found.longest == 2048 and "hf-overrides" not in found.remedy


def test_of_an_argument_that_is_given_twice_the_last_counts() -> None:
    first, last = ({"max_position_embeddings": tokens, "note": "a=b"} for tokens in (1, 2))
    serving = Serving(extra_args=["--hf-overrides", json.dumps(first), "--enforce-eager", f"--hf-overrides={json.dumps(last)}"])
    assert serving.hf_overrides == last
    assert Serving(extra_args=["--hf-overrides", "config.yaml"]).hf_overrides == {}
