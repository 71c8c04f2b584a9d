"""Tree attention on CUDA: torch's FlexAttention, whose kernel skips every block of the mask that is empty."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dagger_operator.training.tree import Chains, visits

ROW_MULTIPLE = 1024
"""Rows are padded to a multiple of so many tokens at least: each new length compiles a kernel (`Limits.few_lengths`)."""
_BLOCK = 128
"""Tokens on each side of a block, the size that torch takes where it is not told another."""
_MOST_KERNELS = 256
"""For every length of rows and whether gradients are wanted. Where torch stops compiling, after eight by its default, it goes on with
every score of a row in memory, 256 GiB at 64K tokens and 32 heads: rather end with an error."""


def block_mask(chains: Chains, device: torch.device) -> BlockMask:
    """Torch's `create_block_mask` for one row, which would hold ten bytes for every pair of its tokens, 40 GiB at 64K, to count them.

    Made outside any compiled region: within one it has been seen to break the backward pass.
    """
    first, last = (torch.from_numpy(numbers).to(device) for numbers in visits(chains))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= first[query]) & (first[query] < last[key])

    pairs = torch.from_numpy(_pairs(chains)).to(device)[None, None]
    full = pairs == _BLOCK * _BLOCK
    blocks = (*_listed((pairs > 0) & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(len(first), len(first)))


def _pairs(chains: Chains) -> NDArray[np.float32]:
    """How many pairs of a query and a key that it sees lie in each block, shape (blocks of queries, blocks of keys).

    Exact: no number is larger than a block.
    """
    edges = np.arange(-(-chains[-1].end // _BLOCK) + 1) * _BLOCK
    own = np.zeros((len(chains), len(edges) - 1), dtype=np.float32)
    before = np.zeros_like(own)
    for index, chain in enumerate(chains):  # its tokens in each block, and those that they all see before their own
        own[index] = np.diff(edges.clip(chain.start, chain.end))
        if chain.parent >= 0:
            start = chains[chain.parent].start
            before[index] = before[chain.parent] + np.diff(edges.clip(start, start + chain.at))
    pairs: NDArray[np.float32] = own.T @ before + np.tril(own.T @ own, -1) + np.diag((own * (own + 1) / 2).sum(axis=0))
    return pairs


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, how many columns are chosen, and all of them, the chosen first: as torch wants its blocks."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Tensor:
    """Query (1, heads, tokens, size), key and value of as many heads or a divisor of it; gives (1, tokens, heads, size)."""
    # Under autocast a norm may have left query and key wider than value, which the kernel refuses.
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _kernel(query.device.type)(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiled where it is used in earnest; as it is, it materialises the whole mask."""
    kernel: Any = compiled() if device == "cuda" else flex_attention
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here


def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """The kernel, compiled anew for each length of rows and never given up on: whole or not at all, in whichever thread. What torch's
    configuration says holds for the thread that says it, and checkpoints are computed again in autograd's own."""
    kernel: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True, recompile_limit=_MOST_KERNELS, backend=backend)  # type: ignore[call-overload]  # its overloads lack the limit
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here
