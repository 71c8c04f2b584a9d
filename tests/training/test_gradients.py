"""However a step is packed, cut, accumulated, sharded and spread over ranks, its gradient is that of a plain loop over labels."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.training.samples import Sample
from training.steps import BASE, SETTINGS, SHARED, Plain, ended_under_deepspeed, made, plain, under_deepspeed

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


TWO_GROUPS = {name: SHARED[name] for name in ("shared-zero0", "shared-zero2", "shared-zero3", "shared-bf16-zero1")}
SMALL_BUCKET = {"reduce_bucket_size": 5000}
"""Larger gradients, as of a large student's matrices, DeepSpeed reduces each by itself, where they lie: here the embedding's and the
MLPs'. The others fill it several times."""


@pytest.fixture(scope="module")
def expected(policy_folder: Path, varied: list[Sample]) -> Callable[[float], Plain]:
    """What a plain loop makes, by the norm at which it clips: all else that layouts differ in is none of its business."""
    return cache(lambda clip: plain(policy_folder, varied, Training.model_validate({**BASE, "gradientClip": clip})))


@pytest.mark.parametrize(
    ("ranks", "layouts", "zero"),
    [(1, SETTINGS, {}), (2, SETTINGS, SMALL_BUCKET), (2, SHARED, {}), (4, TWO_GROUPS, {})],
    ids=["one rank", "two ranks", "shared rows", "two groups that share rows"],
)
def test_every_layout_takes_the_steps_of_a_plain_loop(
    ranks: int,
    layouts: dict[str, dict[str, Any]],
    zero: dict[str, int],
    expected: Callable[[float], Plain],
    policy_folder: Path,
    varied: list[Sample],
    tmp_path: Path,
) -> None:
    found = under_deepspeed(ranks, layouts, policy_folder, varied, tmp_path, zero=zero)
    for name, settings in layouts.items():
        right = expected(settings.get("gradientClip", BASE["gradientClip"]))
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(right.losses, rel=2e-2 if low_precision else 1e-5), name
        worst, overall = right.missed_by(made(tmp_path / name / "policy"))
        assert worst < (1e-1 if low_precision else 1e-5), name
        assert overall < (5e-2 if low_precision else 1e-5), name


@pytest.mark.cuda
def test_so_it_does_on_cuda(expected: Callable[[float], Plain], policy_folder: Path, varied: list[Sample], tmp_path: Path) -> None:
    found = under_deepspeed(1, SETTINGS, policy_folder, varied, tmp_path, accelerator="cuda")
    for name, settings in SETTINGS.items():
        right = expected(settings.get("gradientClip", BASE["gradientClip"]))
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(right.losses, rel=2e-2 if low_precision else 1e-3), f"{name}: TF32 rounds to three digits"
        worst, overall = right.missed_by(made(tmp_path / name / "policy"))
        assert worst < (1e-1 if low_precision else 1e-2), name
        assert overall < (5e-2 if low_precision else 1e-2), name


def test_in_bf16_too_gradients_are_summed_between_ranks_as_one_rank_sums_them(
    policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Every label is a row of its own, so that the same gradients are summed: in FP32, where BF16 would drop all but eight bits."""
    import torch

    rows = {"packing": "Labels", "microBatchTokens": 64, "steps": {"type": "Constant", "value": 1}}
    layouts = {name: {**settings, **rows} for name, settings in SETTINGS.items() if name.startswith("bf16")}
    weights: list[dict[str, Any]] = []
    for ranks in (1, 2):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        under_deepspeed(ranks, layouts, policy_folder, samples, folder)
        weights.append({name: torch.cat([one.flatten() for one in made(folder / name / "policy").values()]) for name in layouts})
    before = torch.cat([one.flatten() for one in made(policy_folder).values()])
    for name in layouts:
        alone, together = (one[name] for one in weights)
        assert float((together - alone).norm() / (alone - before).norm()) < 1e-5, name


def test_gradients_of_one_rank_that_are_no_numbers_end_the_training_on_all(
    policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """The loss is a number, and DeepSpeed would go on without a word."""
    shared = {name: SHARED[name] for name in ("shared-zero0", "shared-bf16-zero1", "shared-zero3")}
    layouts = {**{name: settings for name, settings in SETTINGS.items() if "zero" in name}, **shared}
    layouts["bf16-zero0"] = layouts.pop("bf16-zero0")
    for ended in ended_under_deepspeed(2, layouts, policy_folder, samples, tmp_path, poisoned=True):
        reasons = {name: str(how).partition(":")[0] for name, how in ended.items()}
        assert reasons == dict.fromkeys(layouts, "GradientNotFinite")


@pytest.mark.parametrize("stage", range(4))
def test_on_gpus_reduction_overlaps_nothing_and_takes_the_memory_that_is_estimated(stage: int) -> None:
    """Overlapped, DeepSpeed frees a gradient above the bucket while it is still being reduced: no test without GPUs would see it."""
    import torch

    from dagger_operator.api.training import REDUCED_AT_ONCE
    from dagger_operator.training.engine import settings

    zero = settings(Training.model_validate({"deepspeed": {"zeroStage": stage}}), 8, torch.device("cuda"))["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (False, REDUCED_AT_ONCE)
