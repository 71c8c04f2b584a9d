"""Parameters follow from a model's shape, and are those of the published checkpoints."""

import pytest

from dagger_operator.estimate import KNOWN, UnknownShape, shape_of
from dagger_operator.estimate.published import prime_rl_flops

CHECKPOINTS = {
    # Bytes of all weights in BF16, `metadata.total_size` of each checkpoint's `model.safetensors.index.json`.
    "Qwen/Qwen3-4B-Instruct-2507": 8_044_936_192,
    "Qwen/Qwen3-8B": 16_381_470_720,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 61_064_245_248,
}


@pytest.mark.parametrize(("model", "size"), CHECKPOINTS.items())
def test_parameters_are_those_of_the_published_checkpoint(model: str, size: int) -> None:
    assert 2 * KNOWN[model].parameters == size


def test_a_token_meets_only_the_experts_that_it_visits() -> None:
    """The model's card: 30.5 billion in total, 3.3 billion activated."""
    coder = KNOWN["Qwen/Qwen3-Coder-30B-A3B-Instruct"]
    assert coder.parameters == pytest.approx(30.5e9, rel=0.005)
    assert coder.body + 2 * coder.head == pytest.approx(3.3e9, rel=0.02)


def test_kv_cache_of_a_token() -> None:
    assert KNOWN["Qwen/Qwen3-4B-Instruct-2507"].kv_bytes == KNOWN["Qwen/Qwen3-8B"].kv_bytes == 144 * 1024
    assert KNOWN["Qwen/Qwen3-Coder-30B-A3B-Instruct"].kv_bytes == 96 * 1024


def test_parameters_and_flops_of_a_token_are_those_that_prime_rl_tests_its_own_counter_with() -> None:
    small = KNOWN["Qwen/Qwen3-0.6B"]
    assert small.body + small.head == 595_984_384
    assert prime_rl_flops(small, 1024) == 3_928_227_840


CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}


def test_a_config_says_the_same_as_the_table() -> None:
    assert shape_of(CONFIG, "{% if enable_thinking is false %}") == KNOWN["Qwen/Qwen3-8B"]


def test_a_config_of_experts_says_the_same_as_the_table() -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4, "max_position_embeddings": 262144}
    assert shape_of({**CONFIG, **experts, **sizes}) == KNOWN["Qwen/Qwen3-Coder-30B-A3B-Instruct"]


@pytest.mark.parametrize("broken", [{"hidden_size": None}, {"num_hidden_layers": 0}, {"vocab_size": "many"}])
def test_a_config_without_its_numbers_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(UnknownShape, match=next(iter(broken))):
        shape_of({**CONFIG, **broken})


def test_layers_that_are_no_plain_attention_are_refused() -> None:
    with pytest.raises(UnknownShape, match="linear_attention"):
        shape_of({**CONFIG, "layer_types": ["full_attention", "linear_attention"]})
