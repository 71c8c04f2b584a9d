"""What the trainer tells Prometheus before there is anything to tell."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dagger_operator.api import Storage
from dagger_operator.store.objects import Store
from dagger_operator.training.metrics import Step
from dagger_operator.training.rank import _Observer

OF_A_STEP = ("dagger_training_loss", "dagger_training_learning_rate", "dagger_training_gradient_norm")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def observer(tmp_path: Path, registry: CollectorRegistry) -> Any:
    """Of a round of 100 steps."""
    stage: Any = SimpleNamespace(store=Store.open(Storage(url=f"file://{tmp_path}/store")), round=1)
    return _Observer(stage, 0, 100, registry)


def _tally(steps: int) -> Any:
    return SimpleNamespace(steps=steps, seconds=float(steps), losses=(1.0,) * steps, tokens=steps)


async def test_a_resumed_training_shows_how_far_it_is_and_no_step_that_it_has_not_taken(observer: Any, registry: CollectorRegistry) -> None:
    await observer.begin(_tally(90))
    assert registry.get_sample_value("dagger_training_progress_ratio") == 0.9
    assert [math.isnan(registry.get_sample_value(name) or 0.0) for name in OF_A_STEP] == [True] * 3


async def test_a_norm_that_is_not_kept_has_no_value(observer: Any, registry: CollectorRegistry) -> None:
    await observer.begin(_tally(0))
    step = Step(loss=0.5, labels=1, tokens=1, padding=0, unpacked=1, learning_rate=3e-6, gradient_norm=None, seconds=1.0)
    await observer.observe(_tally(1), step)
    loss, rate, norm = (registry.get_sample_value(name) for name in OF_A_STEP)
    assert (loss, rate) == (0.5, 3e-6)
    assert norm is not None and math.isnan(norm)
