"""A trajectory and all its labels in one pass: the loss and every gradient of one sequence for each label, whatever the trie."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dagger_operator.training.batches import Limits
from dagger_operator.training.packing import pack
from dagger_operator.training.samples import Sample
from dagger_operator.training.soft import Soft
from training.drawn import VOCABULARY, batches, sample

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


def told(batch: Sequence[Sample], seed: int) -> list[Sample]:
    """The same labels as a teacher told of most of them, each with as many tokens as it listed."""
    dice = np.random.default_rng(seed)

    def of(targets: int) -> Soft:
        k = int(dice.integers(1, 6))
        ids = np.stack([dice.permutation(VOCABULARY)[:k] for _ in range(targets)]).astype(np.int32)
        p = dice.dirichlet(np.ones(k + 1), targets)[:, :k]
        return Soft(ids, np.log(p).astype(np.float32))

    return [replace(one, soft=of(len(one.targets))) if len(one.targets) and dice.random() < 0.7 else one for one in batch]


@pytest.fixture(scope="module")
def policies() -> tuple[Any, Any]:
    """The same weights twice: under transformers' own attention, and as the trainer has them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from dagger_operator.training import attention
    from dagger_operator.training.loss import Objective

    attention.register()
    torch.manual_seed(3)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    plain = Qwen3ForCausalLM(copy.deepcopy(config))
    ours = Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME)
    ours.load_state_dict(plain.state_dict())
    return plain.train(), Objective(ours).train()


def recomputes(policy: Any, recompute: bool) -> None:
    """Whether it does is said before every use: tests share policies."""
    if recompute:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        policy.gradient_checkpointing_disable()


def gradients(policy: Any) -> list[Any]:
    found = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    return found


def one_by_one(policy: Any, batch: Sequence[Sample]) -> tuple[float, list[Any]]:
    """By transformers' own forward pass."""
    import torch
    from torch.nn.functional import cross_entropy

    total = 0.0
    for one in batch:
        ids = torch.tensor(one.tokens, dtype=torch.long, device=policy.device)
        if len(one.targets):
            logits = policy(input_ids=ids[None]).logits[0, one.prompt - 1 : -1]
            if one.soft is None:
                loss = cross_entropy(logits, ids[one.prompt :], reduction="sum") * one.weight
            else:
                loss = plain_divergence(logits, one.soft) * one.weight
            loss.backward()
            total += loss.item()
    return total, gradients(policy)


def plain_divergence(logits: Any, soft: Soft) -> Any:
    """Token by token, in FP64."""
    import torch

    total = torch.zeros((), dtype=torch.float64)
    for row, ids, logprobs in zip(logits.double().log_softmax(-1), soft.ids.tolist(), soft.logprobs.tolist(), strict=True):
        p_tail = 1 - sum(map(math.exp, logprobs))
        rest = [token for token in range(VOCABULARY) if token not in ids]
        total = total + sum(math.exp(log_p) * (log_p - row[token]) for token, log_p in zip(ids, logprobs, strict=True))
        total = total + p_tail * (math.log(p_tail) - row[rest].logsumexp(0))
    return total


def in_trees(objective: Any, batch: Sequence[Sample], most_tokens: int, pieces: int) -> tuple[float, list[Any]]:
    from dagger_operator.training.flex import ROW_MULTIPLE
    from dagger_operator.training.rows import Share, collate

    device = objective.policy.device
    total, limits = 0.0, Limits(most_tokens, 4096, ROW_MULTIPLE if device.type == "cuda" else 8, few_lengths=True)
    packs = pack(batch, most_tokens)
    for rows in (packs[::2], packs[1::2]):
        loss = objective(**collate(rows, limits, Share(), device), pieces=pieces)
        loss.backward()
        total += loss.item()
    return total, gradients(objective.policy)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(batches(), st.sampled_from([24, 4096]), st.sampled_from([1, 3]), st.booleans(), st.none() | st.integers(0, 2**31))
@example([sample([1, 2, 3], 2)], 4096, 1, False, None)
@example([sample([1, 2, 3, 4], 2), sample([1, 2, 3, 4], 2), sample([1, 2], 2)], 4096, 1, True, None)
@example([sample([1, 2, 3, 4], 2), sample([1, 2, 3, 4], 2), sample([1, 2, 5], 2)], 4096, 3, True, 1)
def test_loss_and_every_gradient_are_those_of_one_sequence_for_each_label(
    policies: tuple[Any, Any], batch: list[Sample], most_tokens: int, pieces: int, recompute: bool, seed: int | None
) -> None:
    """With a seed, most of the labels are soft targets."""
    plain, objective = policies
    recomputes(objective.policy, recompute)
    if seed is not None:
        batch = told(batch, seed)
    right, expected = one_by_one(plain, batch)
    loss, found = in_trees(objective, batch, most_tokens, pieces)
    # A divergence near zero is a difference of numbers near one, which FP32 holds to seven digits.
    assert loss == pytest.approx(right, rel=1e-5, abs=1e-6)
    scale = sum(float(gradient.norm()) ** 2 for gradient in expected) ** 0.5
    for mine, wanted in zip(found, expected, strict=True):
        # Where a gradient all but vanishes (one token attends to itself alone), what is left is rounding of the terms that cancel.
        assert float((mine - wanted).norm()) <= 1e-5 * max(float(wanted.norm()), 0.05 * scale)


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(batches())
def test_one_kernel_on_cuda_gives_them_too(policies: tuple[Any, Any], pieces: int, recompute: bool, batch: list[Sample]) -> None:
    plain, objective = (copy.deepcopy(policy).to("cuda") for policy in policies)
    recomputes(objective.policy, recompute)
    right, expected = one_by_one(plain, batch)
    loss, found = in_trees(objective, batch, 4096, pieces)
    assert loss == pytest.approx(right, rel=1e-3), "TF32 rounds to three digits"
    scale = sum(float(gradient.norm()) ** 2 for gradient in expected) ** 0.5
    for mine, wanted in zip(found, expected, strict=True):
        assert float((mine - wanted).norm()) <= 1e-2 * max(float(wanted.norm()), 0.05 * scale)


def test_a_model_whose_layers_do_not_see_all_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    from dagger_operator.store.stage import StageFailure
    from dagger_operator.training.attention import refuse_unsuited

    refuse_unsuited(Qwen3Config())
    with pytest.raises(StageFailure, match="sliding_attention"):
        refuse_unsuited(Qwen3Config(use_sliding_window=True, sliding_window=128, max_window_layers=1, num_hidden_layers=3))
    linear = Qwen3Config(num_hidden_layers=2)
    linear.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(StageFailure, match="linear_attention"):
        refuse_unsuited(linear)
    with pytest.raises(StageFailure, match="attention_dropout"):
        refuse_unsuited(Qwen3Config(attention_dropout=0.1))
