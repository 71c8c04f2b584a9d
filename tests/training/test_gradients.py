"""However a step is packed, cut, accumulated, sharded and spread over ranks, its gradient is that of a plain loop over labels."""

from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.training.samples import Sample
from training.steps import BASE, SETTINGS, SHARED, made, plain, under_deepspeed

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("ranks", "layouts"), [(1, SETTINGS), (2, SETTINGS), (2, SHARED)], ids=["one rank", "two ranks", "shared rows"])
def test_every_layout_takes_the_steps_of_a_plain_loop(
    ranks: int, layouts: dict[str, dict[str, Any]], policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    found = under_deepspeed(ranks, layouts, policy_folder, samples, tmp_path)
    for name, settings in layouts.items():
        expected = plain(policy_folder, samples, Training.model_validate({**BASE, **settings}))
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(expected.losses, rel=2e-2 if low_precision else 1e-5), name
        assert expected.missed_by(made(tmp_path / name / "policy")) < (5e-2 if low_precision else 1e-5), name
