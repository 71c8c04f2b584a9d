"""Before it trains, a trainer finds out whether attention over trees is right on its own device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.store.stage import StageFailure
from training.test_trees_gradients import policies, sample

__all__ = ["policies"]
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

BATCH = [sample([*range(1, 30)], 20), sample([1, 2, 3, 4, 30, 31], 4), sample([*range(1, 12), 33], 11)]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    import torch.distributed as ranks

    ranks.init_process_group("gloo", store=ranks.HashStore(), rank=0, world_size=1)
    yield
    ranks.destroy_process_group()


def check(policy: Any) -> float | None:
    import torch

    from dagger_operator.training.agreement import check_agreement
    from dagger_operator.training.layout import Rank

    training, rank = Training(precision="FP32"), Rank(0, 1, torch.device("cpu"))
    return check_agreement(policy, BATCH, training, rank, rank.limits(training, 4096))


def test_right_attention_agrees(policies: tuple[Any, Any], alone: None) -> None:
    difference = check(policies[1])
    assert difference is not None and difference < 1e-5


def test_branches_that_do_not_see_their_prefix_end_the_training(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagger_operator.training import joined

    monkeypatch.setattr(joined, "paths", lambda chains: [[] for _ in chains])
    with pytest.raises(StageFailure, match=r"TreesDisagree: .*training.packing: Labels"):
        check(policies[1])


def test_a_student_that_knows_its_labels_by_heart_is_not_refused_for_rounding(policies: tuple[Any, Any], alone: None) -> None:
    import torch

    from dagger_operator.training.batches import Limits
    from dagger_operator.training.packing import pack
    from dagger_operator.training.rows import Share, collate

    learned = copy.deepcopy(policies[1])
    rows = collate(pack(BATCH, 4096), Limits(4096, 4096), Share(), torch.device("cpu"))
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2)
    for _ in range(150):
        loss = learned(**rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    assert check(learned) is not None
