"""Whatever computes it, attention over a tree is softmax over what a token sees."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.training.tree import Chain, Chains, TreeBuilder, forest

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def forests(draw: st.DrawFn) -> Chains:
    """Up to three trees with branches on several levels."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        lists = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=7))
        tree = TreeBuilder()
        for tokens in sorted(lists, key=len, reverse=True):
            tree.add(np.array(tokens))
        parts.append(tuple(tree.chains))
    return forest(parts)


def dense(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float) -> Tensor:
    """Softmax under a whole mask that is built token by token, from the definition of a chain."""
    import torch

    tokens = query.shape[2]
    sees = torch.zeros(tokens, tokens, dtype=torch.bool, device=query.device)
    for chain in chains:
        for token in range(chain.start, chain.end):
            before = token - 1 if token > chain.start else chains[chain.parent].start + chain.at - 1 if chain.parent >= 0 else None
            if before is not None:
                sees[token] = sees[before]
            sees[token, token] = True
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs(tokens: int, heads: int, kv_heads: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    import torch

    made = torch.Generator().manual_seed(tokens)
    shapes = [(1, count, tokens, 32) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=made, dtype=torch.float32).to(device).requires_grad_() for shape in shapes)
    return query, key, value


def results(attend: Callable[..., Tensor], chains: Chains, how: Any, heads: int, kv_heads: int, device: str = "cpu") -> list[Tensor]:
    """Output, and gradients with regard to query, key and value."""
    given = inputs(chains[-1].end, heads, kv_heads, device)
    out = attend(*given, how, 0.2)
    (out * out.detach().cos()).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in given if tensor.grad is not None)]


def on_the_cpu(way: str, chains: Chains) -> tuple[Callable[..., Tensor], Any]:
    """An attention, and what it wants to know of a tree."""
    import torch

    from dagger_operator.training import joined, segments

    if way == "joined":
        return joined.attend, joined.parts(chains)
    return segments.attend, segments.segments(chains, torch.device("cpu"))


@pytest.mark.parametrize("way", ["joined", "segments"])
@quick
@given(forests(), st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_outputs_and_gradients_are_those_of_the_whole_mask(way: str, chains: Chains, heads: tuple[int, int]) -> None:
    attend, tree = on_the_cpu(way, chains)
    expected = results(dense, chains, chains, *heads)
    found = results(attend, chains, tree, *heads)
    assert len(found) == 4
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).abs().max() <= 2e-5 * max(1.0, float(right.abs().max()))


@settings(quick, max_examples=5)
@given(forests())
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_gives_the_outputs_of_the_whole_mask(chains: Chains) -> None:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    import torch

    from dagger_operator.training import flex

    query, key, value = (tensor.detach() for tensor in inputs(chains[-1].end, 4, 2))
    with torch.no_grad():
        found = flex.attend(query, key, value, flex.block_mask(chains, torch.device("cpu")), 0.2)
        expected = dense(query, key, value, chains, 0.2)
    assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("way", ["flex", "joined"])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_query_and_key_that_a_norm_left_in_fp32_are_taken_in_the_type_of_value(way: str) -> None:
    """As without ZeRO in BF16, where autocast leaves the weights of norms in FP32."""
    import torch

    from dagger_operator.training import flex, joined

    chains = long_forest(1024)
    query, key, value = (tensor.detach() for tensor in inputs(1024, 4, 2))
    given = (query, key, value.bfloat16())
    with torch.no_grad():
        expected = dense(query, key, value, chains, 0.2)
        if way == "flex":
            found = flex.attend(*given, flex.block_mask(chains, torch.device("cpu")), 0.2)
        else:
            found = joined.attend(*given, joined.parts(chains), 0.2)
    assert found.dtype is torch.bfloat16
    assert (found - expected).norm() <= 2e-2 * expected.norm()


def long_forest(tokens: int) -> Chains:
    """A conversation of half that many tokens with labels of 60 tokens, and padding."""
    branches = tokens // 120 - 1
    trunk = [Chain(0, tokens // 2)]
    made = [Chain(tokens // 2 + 60 * turn, tokens // 2 + 60 * (turn + 1), 0, 1 + turn * 55) for turn in range(branches)]
    end = made[-1].end
    return (*trunk, *made, Chain(end, tokens))


def same_as_torchs(chains: Chains) -> None:
    """The mask has the blocks of the one that torch makes of all pairs."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    from dagger_operator.training import flex

    mine = flex.block_mask(chains, torch.device("cpu"))
    right = create_block_mask(mine.mask_mod, None, None, chains[-1].end, chains[-1].end, device="cpu")
    assert (mine.BLOCK_SIZE, mine.shape) == (right.BLOCK_SIZE, right.shape)
    assert torch.equal(mine.to_dense(), right.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, columns = (getattr(right, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert counts.dtype == columns.dtype == getattr(mine, f"{kind}_num_blocks").dtype == getattr(mine, f"{kind}_indices").dtype
        assert torch.equal(getattr(mine, f"{kind}_num_blocks"), counts)
        listed = torch.arange(columns.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(mine, f"{kind}_indices")[listed], columns[listed])


@quick
@given(forests(), st.integers(1, 10))
def test_a_block_mask_made_of_chains_is_the_one_that_is_made_of_all_pairs(chains: Chains, times: int) -> None:
    """Of blocks of every kind, once chains are a hundred tokens long; few rows end where a block does."""
    same_as_torchs(tuple(Chain(chain.start * times, chain.end * times, chain.parent, chain.at * times) for chain in chains))


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1024, 2048])
def test_so_it_is_for_conversations_of_any_length(tokens: int) -> None:
    same_as_torchs(long_forest(tokens) if tokens >= 1024 else (Chain(0, tokens),))


def test_a_block_mask_needs_no_memory_for_every_pair_of_tokens() -> None:
    """Only for blocks: of a byte a pair this row would take 256 MiB, and torch takes ten bytes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from dagger_operator.training import flex

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [one for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, torch.Tensor)]
            self.size = max(self.size, *(one.nbytes for one in made), 0)
            return out

    chains = long_forest(16_384)
    tracemalloc.start()  # numpy's arrays; torch's are seen by their operators
    try:
        with Largest() as torchs:
            flex.block_mask(chains, torch.device("cpu"))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert 0 < torchs.size < 1 << 20


@pytest.mark.cuda
@pytest.mark.parametrize("buckets", range(1, 11))
def test_flex_attention_on_cuda_gives_outputs_and_gradients_of_the_whole_mask(buckets: int) -> None:
    import torch

    from dagger_operator.training import flex

    chains = long_forest(buckets * flex.ROW_MULTIPLE)
    expected = results(dense, chains, chains, 4, 2, "cuda")
    found = results(flex.attend, chains, flex.block_mask(chains, torch.device("cuda")), 4, 2, "cuda")
    assert len(found) == 4
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).norm() <= 2e-3 * right.norm(), "TF32 rounds to three digits"


def test_flex_attention_is_compiled_for_more_lengths_than_torch_would_by_itself_in_every_thread() -> None:
    import torch
    from torch._dynamo.testing import CompileCounter

    from dagger_operator.training import flex

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # torch gives it no types
    compilations = CompileCounter()
    kernel = flex.compiled(compilations)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch gives it no types
    def attend_rows_of(lengths: range) -> None:
        for tokens in lengths:
            query, key, value = (tensor.detach() for tensor in inputs(tokens, 2, 1))
            kernel(query, key, value, block_mask=flex.block_mask((Chain(0, tokens),), torch.device("cpu")), enable_gqa=True)

    attend_rows_of(range(128, 128 * 13, 128))
    with ThreadPoolExecutor(1) as autograd:
        autograd.submit(attend_rows_of, range(128 * 13, 128 * 25, 128)).result()
    assert compilations.frame_count == 24


@pytest.mark.parametrize("way", ["joined", "segments"])
def test_a_long_conversation_is_exact_too(way: str) -> None:
    chains = long_forest(2048)
    attend, tree = on_the_cpu(way, chains)
    expected = results(dense, chains, chains, 2, 1)
    for mine, right in zip(results(attend, chains, tree, 2, 1), expected, strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()


def test_a_row_that_is_not_the_trees_or_a_mask_is_refused() -> None:
    import torch

    from dagger_operator.training.attention import Tree, tree_attention

    query, key, value = inputs(5, 2, 2)
    tree = Tree((Chain(0, 4),), torch.device("cpu"))
    with pytest.raises(ValueError, match="one row of 4 tokens"):
        tree_attention(torch.nn.Identity(), query, key, value, None, tree=tree, scaling=1.0)
    tree = Tree((Chain(0, 5),), torch.device("cpu"))
    with pytest.raises(ValueError, match="without mask"):
        tree_attention(torch.nn.Identity(), query, key, value, torch.ones(5, 5), tree=tree, scaling=1.0)
