"""Tree attention on the CPU without copies: each chain attends to every span of its path in place.

Torch's flash attention returns, besides the output, the logarithm of the sum by which the softmax was divided. With it, the results of a
chain for several spans combine into one softmax over all of them; and from the combined values the backward pass computes each span's
gradients separately, as in ring attention (arXiv 2310.01889). The CPU operators are called by name: torch's public function does not
return the logarithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dagger_operator.training.tree import Chains, paths


@dataclass(frozen=True)
class Part:
    own: slice
    """A chain's tokens."""
    before: tuple[slice, ...]
    """Earlier spans that all of them see."""


def parts(chains: Chains) -> list[Part]:
    return [
        Part(slice(chain.start, chain.end), tuple(slice(*span) for span in path)) for chain, path in zip(chains, paths(chains), strict=True)
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, tree: Sequence[Part], scaling: float) -> Tensor:
    """Attend: query (1, heads, tokens, size), key and value with as many heads or a divisor of it; returns (1, tokens, heads, size)."""
    # Like torch's own function under autocast, where a norm may have left query and key in a wider dtype than value.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out: Tensor = _Joined.apply(query, key, value, tree, scaling)  # type: ignore[no-untyped-call]  # torch does not type it
    return out.transpose(1, 2)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Sequence[Part], scaling: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # Tokens before heads in memory, so that the projection that follows needs no copy.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for part in tree:
            mine = query[:, :, part.own]
            joined, total = flash(mine, key[:, :, part.own], value[:, :, part.own], 0.0, True, scale=scaling)
            for span in part.before:
                more, its = flash(mine, key[:, :, span], value[:, :, span], 0.0, False, scale=scaling)
                both = torch.logaddexp(total, its)
                joined = joined * (total - both).exp()[..., None] + more * (its - both).exp()[..., None]
                total = both
            out[:, :, part.own], sums[:, :, part.own] = joined, total
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.tree, ctx.scaling = tree, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        (gradient,) = gradients
        query, key, value, out, sums = ctx.saved_tensors
        exact = sums.dtype  # many spans add to the same gradient
        by_query, by_key, by_value = (torch.zeros_like(tensor, dtype=exact) for tensor in (query, key, value))
        for part in ctx.tree:
            mine = (gradient[:, :, part.own], query[:, :, part.own])
            found = (out[:, :, part.own], sums[:, :, part.own])
            for span in (part.own, *part.before):
                causal = span is part.own
                given = flash_backward(*mine, key[:, :, span], value[:, :, span], *found, 0.0, causal, scale=ctx.scaling)
                by_query[:, :, part.own] += given[0]
                by_key[:, :, span] += given[1]
                by_value[:, :, span] += given[2]
        return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), None, None
