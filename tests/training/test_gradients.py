"""However a step is packed, cut, accumulated, sharded and spread over ranks, its gradient is that of a plain loop over labels."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.training.samples import Sample
from training.steps import BASE, SETTINGS, SHARED, Plain, made, plain, under_deepspeed

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def expected(policy_folder: Path, samples: list[Sample]) -> Callable[[float], Plain]:
    """What a plain loop makes, by the norm at which it clips: all else that layouts differ in is none of its business."""
    return cache(lambda clip: plain(policy_folder, samples, Training.model_validate({**BASE, "gradientClip": clip})))


@pytest.mark.parametrize(("ranks", "layouts"), [(1, SETTINGS), (2, SETTINGS), (2, SHARED)], ids=["one rank", "two ranks", "shared rows"])
def test_every_layout_takes_the_steps_of_a_plain_loop(
    ranks: int,
    layouts: dict[str, dict[str, Any]],
    expected: Callable[[float], Plain],
    policy_folder: Path,
    samples: list[Sample],
    tmp_path: Path,
) -> None:
    found = under_deepspeed(ranks, layouts, policy_folder, samples, tmp_path)
    for name, settings in layouts.items():
        right = expected(settings.get("gradientClip", BASE["gradientClip"]))
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(right.losses, rel=2e-2 if low_precision else 1e-5), name
        assert right.missed_by(made(tmp_path / name / "policy")) < (5e-2 if low_precision else 1e-5), name
