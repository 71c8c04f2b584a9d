"""However a step is packed, cut, accumulated, sharded and spread over ranks, its gradient is that of a plain loop over labels."""

from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.training.samples import Sample
from training.steps import BASE, SETTINGS, SHARED, plain_steps, under_deepspeed

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("ranks", "layouts"), [(1, SETTINGS), (2, SETTINGS), (2, SHARED)], ids=["one rank", "two ranks", "shared rows"])
def test_every_layout_takes_the_steps_of_a_plain_loop(
    ranks: int, layouts: dict[str, dict[str, Any]], policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).named_parameters())
    found = under_deepspeed(ranks, layouts, policy_folder, samples, tmp_path)
    for name, settings in layouts.items():
        plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
        losses = plain_steps(plain, plain.parameters(), samples, Training.model_validate({**BASE, **settings}))
        weights = dict(plain.named_parameters())
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(losses, rel=2e-2 if low_precision else 1e-5), name
        trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / name / "policy", dtype=torch.float32).named_parameters())
        assert trained.keys() == weights.keys()
        moved = torch.cat([(weights[key] - before[key]).flatten() for key in weights])
        missed = torch.cat([(trained[key] - weights[key]).flatten() for key in weights])
        assert moved.norm() > 0.01
        assert missed.norm() / moved.norm() < (5e-2 if low_precision else 1e-5), name
