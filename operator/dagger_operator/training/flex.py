"""Tree attention on CUDA: torch's FlexAttention, whose kernel skips every block of the mask that is empty."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dagger_operator.training.tree import Chains, visits

BUCKET = 1024
"""Rows are padded to a multiple of so many tokens at least: each new length compiles a kernel (`Limits.few_lengths`)."""
_MOST_KERNELS = 256
"""For every length of rows and whether gradients are wanted. Where torch stops compiling, after eight by its default, it goes on with
every score of a row in memory, 256 GiB at 64K tokens and 32 heads: rather end with an error."""


def block_mask(chains: Chains, device: torch.device) -> Any:
    """A `BlockMask` for one row. Made outside any compiled region: within one it has been seen to break the backward pass."""
    first, last = (torch.from_numpy(numbers).to(device) for numbers in visits(chains))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= first[query]) & (first[query] < last[key])

    tokens = len(first)
    return create_block_mask(sees, None, None, tokens, tokens, device=device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Tensor:
    """Query (1, heads, tokens, size), key and value of as many heads or a divisor of it; gives (1, tokens, heads, size)."""
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _kernel(query.device.type)(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compiled where it is used in earnest; as it is, it materialises the whole mask."""
    kernel: Any = compiled() if device == "cuda" else flex_attention
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here


def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """The kernel, compiled anew for each length of rows and never given up on."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = _MOST_KERNELS
    dynamo.fail_on_recompile_limit_hit = True
    kernel: Any = torch.compile(flex_attention, dynamic=False, backend=backend)
    return kernel  # type: ignore[no-any-return]  # torch's overloads are more than can be said here
