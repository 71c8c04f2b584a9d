"""Tree attention on any device: one call of torch's public attention per chain.

A trunk is plain causal attention. A branch attends to its prefix, which is gathered from elsewhere and prepended, and causally to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dagger_operator.training.tree import Chains, Span, paths


@dataclass(frozen=True, eq=False)
class Segment:
    start: int
    end: int
    prefix: tuple[Span, ...]
    mask: Tensor | None
    """Shape (own tokens, prefix and own tokens), true where seen; None for plain causal attention."""


def segments(chains: Chains, device: torch.device) -> list[Segment]:
    made = []
    for chain, prefix in zip(chains, paths(chains), strict=True):
        before = sum(end - start for start, end in prefix)
        mask = None
        if before:
            mask = torch.ones(len(chain), before + len(chain), dtype=torch.bool, device=device).tril(before)
        made.append(Segment(chain.start, chain.end, tuple(prefix), mask))
    return made


def attend(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Segment], scaling: float) -> Tensor:
    """Attend: query (1, heads, tokens, size), key and value with as many heads or a divisor of it; returns (1, tokens, heads, size)."""
    grouped = query.shape[1] != key.shape[1]
    out = []
    for part in parts:
        spans = [*part.prefix, (part.start, part.end)]
        keys, values = (
            torch.cat([whole[:, :, a:b] for a, b in spans], dim=2) if part.prefix else whole[:, :, part.start : part.end]
            for whole in (key, value)
        )
        out.append(
            scaled_dot_product_attention(
                query[:, :, part.start : part.end],
                keys,
                values,
                attn_mask=part.mask,
                is_causal=part.mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()
