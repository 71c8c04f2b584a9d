"""Soft targets in whatever layout and precision, of all weights or of an adapter's: the steps of a plain loop over plain sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.store.records import Trajectory
from dagger_operator.training.samples import Sample, tokenise
from dagger_operator.training.template import StudentTemplate
from training.steps import BASE, LORA, SETTINGS, SHARED, cross_entropy, made, plain, under_deepspeed
from training.test_divergence import plain as plain_sum
from training.test_soft import told_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

WHOLE = {name: SETTINGS[name] for name in ("zero0", "parted-trees", "recompute-zero3", "bf16-zero2", "bf16-zero3")}
ADAPTED = {f"adapted-{name}": {**SETTINGS[name], "lora": LORA} for name in ("zero0", "recompute-zero3", "bf16-zero2")}
SHARED_WHOLE = {name: SHARED[name] for name in ("shared-zero2", "shared-zero3", "shared-bf16-zero2")}
SHARED_ADAPTED = {"adapted-shared-zero3": {**SHARED["shared-zero3"], "lora": LORA}}


@pytest.fixture(scope="module")
def soft_samples(tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]) -> list[Sample]:
    """One trajectory has no soft targets: its labels are learned as they are."""
    template = StudentTemplate(tokenizer_with("qwen3_instruct"))
    given = [told_of(trajectory, template) if number != 3 else trajectory for number, trajectory in enumerate(trajectories)]
    samples = list(tokenise(given, template, 4096, soft_below=400).samples)
    assert {sample.soft is None for sample in samples} == {True, False}
    return samples


def forward_kl(policy: Any, sample: Sample) -> Any:
    import torch

    if sample.soft is None:
        return cross_entropy(policy, sample)
    logits = policy(input_ids=torch.tensor(sample.tokens, dtype=torch.long)[None]).logits[0, sample.prompt - 1 : -1]
    return plain_sum(logits, torch.from_numpy(sample.soft.ids), torch.from_numpy(sample.soft.logprobs)).sum().float()


@pytest.mark.parametrize(("whole", "adapted"), [(WHOLE, ADAPTED), (SHARED_WHOLE, SHARED_ADAPTED)], ids=["two ranks", "shared rows"])
def test_soft_targets_take_the_steps_of_a_plain_loop_in_every_layout(
    whole: dict[str, Any], adapted: dict[str, Any], policy_folder: Path, parent: Path, soft_samples: list[Sample], tmp_path: Path
) -> None:
    layouts = {name: {**settings, "loss": "ForwardKL"} for name, settings in {**whole, **adapted}.items()}
    found = under_deepspeed(2, layouts, policy_folder, soft_samples, tmp_path, adapter=parent)
    for names, adapter in ((whole, None), (adapted, parent)):
        expected = plain(policy_folder, soft_samples, Training.model_validate(BASE), adapter, forward_kl)
        for name in names:
            low_precision = "bf16" in name
            assert found[name] == pytest.approx(expected.losses, rel=2e-2 if low_precision else 1e-5), name
            weights = made(tmp_path / name / "policy", adapted=adapter is not None)
            worst, overall = expected.missed_by(weights)
            assert worst < (1e-1 if low_precision else 1e-5), name
            assert overall < (5e-2 if low_precision else 1e-5), name
