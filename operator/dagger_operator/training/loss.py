"""Cross-entropy or divergence from the teacher on labelled positions only, summed: the caller divides by the step's total weight."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.attention import Tree, refuse_unsuited
from dagger_operator.training.divergence import forward_kl


class Objective(torch.nn.Module):
    """The policy and its loss as one module, so that whatever shards or casts weights does so around one forward pass."""

    def __init__(self, policy: Any) -> None:
        """`policy` is a causal language model of transformers, whose methods are not typed."""
        super().__init__()
        self.policy = policy
        refuse_unsuited(policy.config)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(policy.config, name, None) not in (None, 1.0):
                raise StageFailure(
                    "UnsupportedStudent",
                    f"student.model: {type(policy).__name__} changes its logits after the head (config.{name}), which training does "
                    "not: take a student with a plain head, such as Qwen3",
                )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree: Tree,
        prev: Tensor,
        targets: Tensor,
        weights: Tensor,
        soft_ids: Tensor | None = None,
        soft_logprobs: Tensor | None = None,
        pieces: int = 1,
    ) -> Tensor:
        """Return the sum over k targets of weight times negative log-likelihood, or times divergence from the teacher's distribution; a
        scalar in FP32.

        `input_ids`, `position_ids`: (1, tokens), this rank's part of the row; `tree` describes the whole row.
        `prev`, `targets`, `weights`: (k,); target i is predicted at [0, prev[i]].
        `soft_ids`, `soft_logprobs`: (k, listed), the teacher's listed tokens for each target, if any (`divergence.forward_kl`).
        `pieces`: the targets are split into this many parts, and logits exist for one at a time. Ranks must agree on it: if the head is
        sharded, each piece gathers it.
        """
        decoder = self.policy.get_decoder()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, tree=tree).last_hidden_state
        known = (targets,) if soft_ids is None or soft_logprobs is None else (soft_ids, soft_logprobs)
        tensors = (hidden[0, prev], weights, *known)
        if pieces == 1:
            return self._loss(*tensors)
        parts = zip(*(torch.tensor_split(tensor, pieces) for tensor in tensors), strict=True)
        return torch.stack([checkpoint(self._loss, *part, use_reentrant=False) for part in parts]).sum()

    def _loss(self, hidden: Tensor, weights: Tensor, *known: Tensor) -> Tensor:
        """`known`: the targets alone, or the teacher's listed ids and log-probabilities for them."""
        head = self.policy.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head(hidden.to(head.weight.dtype)).float()
            each = functional.cross_entropy(logits, *known, reduction="none") if len(known) == 1 else forward_kl(logits, *known)
            return (each * weights).sum()
