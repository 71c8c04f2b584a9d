"""What a rank is given to compute stays within what the resource says, and what was estimated."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Training
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.samples import Sample

pytestmark = pytest.mark.heavy


@given(st.integers(64, 200_000), st.integers(64, 200_000), st.sampled_from([1, 2, 3, 8]), st.data())
def test_rows_on_gpus_hold_no_more_than_their_bound_with_padding_and_a_long_sequence_little_more_than_itself(
    micro_batch: int, longest: int, shared_by: int, data: st.DataObject
) -> None:
    import torch

    from dagger_operator.training.flex import ROW_MULTIPLE
    from dagger_operator.training.layout import Rank

    training = Training.model_validate({"microBatchTokens": micro_batch, "maxSequenceTokens": longest})
    limits = Rank(0, 24, torch.device("cuda"), shared_by).limits(training, 4096)
    step = limits.multiple
    assert step % ROW_MULTIPLE == step % shared_by == 0
    assert limits.tokens <= max(micro_batch, step), "trees are parted at it"
    shared = data.draw(st.integers(1, limits.tokens))
    assert shared + limits.padding(shared) <= max(micro_batch, step)
    alone = data.draw(st.integers(1, longest))
    assert alone + limits.padding(alone) < max(micro_batch, longest) + step
    assert (alone + limits.padding(alone)) % step == 0


@pytest.fixture
def alone() -> Iterator[None]:
    import torch.distributed as ranks

    ranks.init_process_group("gloo", store=ranks.HashStore(), rank=0, world_size=1)
    yield
    ranks.destroy_process_group()


async def test_a_step_passes_no_row_of_more_than_micro_batch_tokens_with_padding(
    alone: None, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight ranks share a row, which so has a multiple of eight tokens. A tree of 386 would fit unpadded, and is parted."""
    import torch

    from dagger_operator.training import loop
    from dagger_operator.training.agreement import Agreement
    from dagger_operator.training.checkpoints import Tally
    from dagger_operator.training.layout import Rank

    rows: list[int] = []

    class Engine:
        optimizer, backward, step = SimpleNamespace(param_groups=[]), Mock(), Mock()
        zero_optimization_stage, was_step_applied, get_global_grad_norm = Mock(return_value=1), Mock(), Mock(return_value=None)

        def __call__(self, tree: Any, **given: Any) -> torch.Tensor:
            rows.append(tree.chains[-1].end)
            return torch.tensor(1.0)

    monkeypatch.setattr(loop, "check_agreement", Mock(return_value=Agreement(0, 0, 0, 0)))
    training = Training.model_validate({"batchSize": 9, "batchUnit": "Labels", "microBatchTokens": 389, "epochs": 1})
    curriculum, rank = Curriculum(samples, training, seed=1, round_number=1), Rank(0, 8, torch.device("cpu"), 8)
    kept = Mock(due=Mock(return_value=False))
    await loop.train(Engine(), samples, curriculum, training, rank, kept, Tally(), 1, Mock(return_value=False), AsyncMock())
    assert 366 < max(rows) <= 384
