"""Attention over trees, registered with transformers' attention interface under a name of its own.

The tree is passed to the attention of every layer as an argument of the forward pass, and nothing else ever builds a mask: whatever
drops or replaces masks on the way (DeepSpeed's sequence parallelism does both) cannot affect it.

Three implementations with the same result: `flex`, on CUDA, is one kernel with a block mask that is built once per pass (torch's
FlexAttention has no backward pass on the CPU); `joined`, on the CPU, combines what each chain gets from the spans of its path;
`segments`, on any other device, calls torch's public attention once per chain.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dagger_operator.store.stage import StageFailure
from dagger_operator.training import flex, joined, segments
from dagger_operator.training.tree import Chains

NAME = "dagger_tree"


@dataclass(frozen=True, eq=False)
class Tree:
    """Which tokens of a row see which, and what the attention caches of it from layer to layer."""

    chains: Chains
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.chains[-1].end

    @cached_property
    def segments(self) -> "list[segments.Segment]":
        return segments.segments(self.chains, self.device)

    @cached_property
    def parts(self) -> "list[joined.Part]":
        return joined.parts(self.chains)

    @cached_property
    def block_mask(self) -> Any:
        return flex.block_mask(self.chains, self.device)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Called by transformers with query (1, heads, tokens, size), key and value of fewer heads; returns (1, tokens, heads, size)."""
    if attention_mask is not None or dropout or query.shape[0] != 1 or query.shape[2] != tree.tokens:
        raise ValueError(
            f"tree attention takes one row of {tree.tokens} tokens without mask and dropout, not {tuple(query.shape)}, {dropout=}"
        )
    match query.device.type:
        case "cuda":
            return flex.attend(query, key, value, tree.block_mask, scaling), None
        case "cpu":
            return joined.attend(query, key, value, tree.parts, scaling), None
        case _:
            return segments.attend(query, key, value, tree.segments, scaling), None


def register() -> None:
    """Register the name with transformers. Another function may replace this one under it: see `sequence`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def refuse_unsuited(config: Any) -> None:
    """Raise `StageFailure` if a model's layers do anything but attend to all tokens before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        raise StageFailure(
            "UnsupportedStudent",
            f"student.model: layers of kind {', '.join(sorted(kinds - {'full_attention'}))} carry state from token to token or do not see "
            "all of it, and labels that branch off a conversation need full attention: take a student such as Qwen3",
        )
    if getattr(config, "attention_dropout", 0.0):
        raise StageFailure("UnsupportedStudent", "student.model: config.attention_dropout must be 0: write 0 into its config.json")
