"""Tree attention on CUDA: torch's FlexAttention, whose kernel skips every empty block of the mask."""

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
"""Rows are padded to a multiple of at least this many tokens: each new length compiles a kernel (`Limits.few_lengths`)."""
_BLOCK = 128
"""Tokens on each side of a block: torch's default."""
_MOST_KERNELS = 256
"""One for each row length, with and without gradients. When torch stops compiling, by default after eight, it continues with every score
of a row in memory, 256 GiB at 64K tokens and 32 heads: an error is better."""


def block_mask(chains: Chains, device: torch.device) -> BlockMask:
    """Return torch's `create_block_mask` of one row, which itself would take ten bytes per pair of tokens to count them, 40 GiB at 64K.

    Call it outside any compiled region: inside one it has been seen to break the backward pass.
    """
    first, last = (torch.from_numpy(numbers).to(device) for numbers in visits(chains))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= first[query]) & (first[query] < last[key])

    pairs = torch.from_numpy(_pairs(chains)).to(device)[None, None]
    full = pairs == _BLOCK * _BLOCK
    blocks = (*_listed((pairs > 0) & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(len(first), len(first)))


def _pairs(chains: Chains) -> NDArray[np.float32]:
    """Return how many pairs of a query and a key that it sees lie in each block, shape (blocks of queries, blocks of keys).

    Exact in FP32: no number is larger than a block.
    """
    edges = np.arange(-(-chains[-1].end // _BLOCK) + 1) * _BLOCK
    own = np.zeros((len(chains), len(edges) - 1), dtype=np.float32)
    before = np.zeros_like(own)
    for index, chain in enumerate(chains):  # its tokens in each block, and the earlier ones that they all see
        own[index] = np.diff(edges.clip(chain.start, chain.end))
        if chain.parent >= 0:
            start = chains[chain.parent].start
            before[index] = before[chain.parent] + np.diff(edges.clip(start, start + chain.at))
    pairs: NDArray[np.float32] = own.T @ before + np.tril(own.T @ own, -1) + np.diag((own * (own + 1) / 2).sum(axis=0))
    return pairs


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the number of chosen columns, and all columns with the chosen ones first: torch's format for blocks."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Tensor:
    """Attend: query (1, heads, tokens, size), key and value with as many heads or a divisor of it; returns (1, tokens, heads, size)."""
    # Under autocast a norm may have left query and key in a wider dtype than value, which the kernel refuses.
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _kernel(query.device.type)(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Return the compiled kernel on CUDA; uncompiled, it materialises the whole mask."""
    kernel: Any = compiled() if device == "cuda" else flex_attention
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here


def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """Return the kernel, compiled for each row length, as a whole or not at all, in whichever thread. Torch's configuration applies only to
    the thread that sets it, and activation checkpoints are recomputed in autograd's own."""
    kernel: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True, recompile_limit=_MOST_KERNELS, backend=backend)  # type: ignore[call-overload]  # its overloads lack the limit
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here
