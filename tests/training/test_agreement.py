"""Before it trains, a trainer finds out whether attention over trees is right on its own device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dagger_operator.api import Training
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.samples import Sample
from dagger_operator.training.tree import Chain, Chains, Span, TreeBuilder, paths
from training.drawn import sample
from training.test_trees_gradients import policies

if TYPE_CHECKING:
    from dagger_operator.training.agreement import Agreement

__all__ = ["policies"]
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

BATCH = [sample([*range(1, 30)], 20), sample([1, 2, 3, 4, 30, 31], 4), sample([*range(1, 12), 33], 11)]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    import torch.distributed as ranks

    ranks.init_process_group("gloo", store=ranks.HashStore(), rank=0, world_size=1)
    yield
    ranks.destroy_process_group()


def check(policy: Any, batch: Sequence[Sample] = BATCH, device: Any = "cpu", **settings: Any) -> Agreement:
    import torch

    from dagger_operator.training.agreement import check_agreement
    from dagger_operator.training.layout import Rank

    training, rank = Training.model_validate({"precision": "FP32", **settings}), Rank(0, 1, torch.device(device))
    return check_agreement(policy, batch, training, rank, rank.limits(training, 4096))


@pytest.mark.parametrize("recompute", [False, True])
def test_right_attention_agrees_and_what_is_measured_is_told(policies: tuple[Any, Any], alone: None, recompute: bool) -> None:
    measured = check(policies[1], activationCheckpointing=recompute)
    assert 0 < measured.attention < 1e-5 < measured.attention_allowed
    assert measured.loss is not None and measured.loss < 1e-5 < measured.loss_allowed


@pytest.mark.parametrize("packing", ["Trees", "Labels"])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_right_attention_agrees_where_nothing_branches_too(policies: tuple[Any, Any], alone: None, packing: str, precision: str) -> None:
    assert check(policies[1], BATCH[:1], packing=packing, precision=precision).loss is None


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_so_it_does_on_cuda_and_a_wrong_mask_does_not(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch, precision: str, recompute: bool
) -> None:
    import torch

    from dagger_operator.training import flex

    policy, cuda = copy.deepcopy(policies[1]).to("cuda"), torch.device("cuda", 0)
    settings = {"precision": precision, "activationCheckpointing": recompute}
    assert check(policy, device=cuda, **settings).loss is not None
    right = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda chains, device: right((Chain(0, chains[-1].end),), device))
    with pytest.raises(StageFailure, match="TreesDisagree: attention over trees"):
        check(policy, device=cuda, **settings)


def whole_trunk(chains: Chains) -> list[list[Span]]:
    """Branches see all of what they branch off."""
    return [[(chains[one.parent].start, chains[one.parent].end)] if one.parent >= 0 else [] for one in chains]


def neighbour(chains: Chains) -> list[list[Span]]:
    """Trees see the last token that comes before them in their row."""
    return [[(one.start - 1, one.start)] if one.parent < 0 and one.start else path for one, path in zip(chains, paths(chains), strict=True)]


WRONG: dict[str, Callable[[Chains], list[list[Span]]]] = {
    "prefix unseen": lambda chains: [[] for _ in chains],
    "whole trunk": whole_trunk,
    "neighbour": neighbour,
}


@pytest.mark.parametrize("precision", ["FP32", "BF16"])
@pytest.mark.parametrize("batch", [BATCH, BATCH[:1]], ids=["branches", "no branch"])
@pytest.mark.parametrize("wrong", WRONG)
def test_tokens_that_see_what_they_should_not_end_the_training(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch, wrong: str, batch: list[Sample], precision: str
) -> None:
    """Whatever the first batch is: those that come later may branch, and any row may hold several trees."""
    from dagger_operator.training import joined

    monkeypatch.setattr(joined, "paths", WRONG[wrong])
    with pytest.raises(StageFailure, match=r"TreesDisagree: .*training.packing: Labels"):
        check(policies[1], batch, precision=precision)


@pytest.mark.parametrize("packing", ["Trees", "Labels"])
@pytest.mark.parametrize("which", range(3))
def test_a_wrong_gradient_ends_the_training(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch, which: int, packing: str
) -> None:
    """Of query, key or value, with the right output."""
    from dagger_operator.training import joined

    right = joined._Joined.backward

    def backward(context: Any, *gradients: Any) -> tuple[Any, ...]:
        found = list(right(context, *gradients))
        found[which] = found[which].roll(1, dims=2)
        return tuple(found)

    monkeypatch.setattr(joined._Joined, "backward", staticmethod(backward))
    with pytest.raises(StageFailure, match=r"TreesDisagree: .*outputs by 0.0%"):
        check(policies[1], packing=packing)


def test_attention_that_is_wrong_when_it_is_computed_again_ends_the_training(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As activation checkpointing has it done, in a thread of autograd's: its outputs are right."""
    from dagger_operator.training import joined

    right, calls = joined.attend, itertools.count()

    def attend(query: Any, key: Any, value: Any, tree: Any, scaling: float) -> Any:
        return right(query, key.roll(next(calls) % 2, dims=2), value, tree, scaling)

    monkeypatch.setattr(joined, "attend", attend)
    with pytest.raises(StageFailure, match=r"TreesDisagree: .*outputs by 0.0%"):
        check(policies[1], activationCheckpointing=True)


def test_without_branches_only_rows_of_several_labels_are_in_question(
    policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other failures advise goes on where only branches are wrong."""
    from dagger_operator.training import joined

    monkeypatch.setattr(joined, "paths", whole_trunk)
    check(policies[1], packing="Labels")
    monkeypatch.setattr(joined, "paths", neighbour)
    with pytest.raises(StageFailure, match=r"TreesDisagree: attention over a row of several .*another device"):
        check(policies[1], packing="Labels")


def test_branches_that_stand_elsewhere_end_the_training(policies: tuple[Any, Any], alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is right here: what is not shows only in the loss."""
    monkeypatch.setattr(TreeBuilder, "positions", lambda tree: np.arange(tree.length))
    with pytest.raises(StageFailure, match=r"TreesDisagree: the labels of rollout 0001/00000 .*training.packing: Labels"):
        check(policies[1])


def test_a_tree_is_compared_with_few_labels_each_in_a_row_of_its_own(policies: tuple[Any, Any], alone: None) -> None:
    """Labels that share a row are told apart by the mask that is to be checked."""
    rows: list[Chains] = []

    class Watched:
        policy = policies[1].policy

        def __call__(self, tree: Any, **given: Any) -> Any:
            rows.append(tree.chains)
            return policies[1](tree=tree, **given)

    turns = [sample([*range(1, 2 * turn), 38, 39], 2 * turn - 1) for turn in range(2, 12)]
    assert check(Watched(), [sample([*range(1, 30)], 20), *turns]).loss is not None
    together, *apart = rows
    assert len(together) == 4 and [len(row) for row in apart] == [1] * 4


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
    assert check(learned).loss is not None
