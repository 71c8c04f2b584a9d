"""Cross-entropy on labelled positions only, summed: who calls it knows how many targets the whole step has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.packing import Pack

Batch = dict[str, Tensor]


class Objective(torch.nn.Module):
    """The policy and its loss as one module, so that whatever shards or casts weights does it around one forward pass."""

    def __init__(self, policy: Any) -> None:
        """`policy` is a causal language model of transformers, whose methods are not typed."""
        super().__init__()
        self.policy = policy
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(policy.config, name, None) not in (None, 1.0):
                raise StageFailure(
                    "UnsupportedStudent",
                    f"student.model: {type(policy).__name__} changes its logits after the head (config.{name}), which training does "
                    "not: take a student with a plain head, such as Qwen3",
                )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, rows: Tensor, prev: Tensor, targets: Tensor, weights: Tensor, pieces: int = 1
    ) -> Tensor:
        """Sum over k targets of weight times negative log-likelihood; a scalar in FP32.

        `input_ids`, `position_ids`: (sequences, tokens), padded on the right, where causal attention lets nothing look.
        `rows`, `prev`, `targets`, `weights`: (k,); target i is predicted at [rows[i], prev[i]].
        `pieces`: logits exist for one of so many parts of the targets at a time. Ranks must agree on it: where the head is sharded,
        each piece gathers it.
        """
        hidden = self.policy.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        wanted = hidden[rows, prev]
        if pieces == 1:
            return self._nll(wanted, targets, weights)
        parts = zip(*(torch.tensor_split(tensor, pieces) for tensor in (wanted, targets, weights)), strict=True)
        return torch.stack([checkpoint(self._nll, *part, use_reentrant=False) for part in parts]).sum()

    def _nll(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        head = self.policy.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head(hidden.to(head.weight.dtype)).float()
            return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


def collate(packs: Sequence[Pack], device: torch.device) -> Batch:
    """One micro-batch. Of no packs it is one token whose target weighs nothing: the same collectives, no gradient."""
    if not packs:
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return {"input_ids": zero[None], "position_ids": zero[None], "rows": zero, "prev": zero, "targets": zero, "weights": zero.float()}
    width = max(map(len, packs))
    # Positions of the padding go on counting: a jump would look like another sequence packed into the row.
    ids = np.stack([np.pad(pack.input_ids, (0, width - len(pack))) for pack in packs])
    positions = np.stack([np.concatenate([pack.position_ids, np.arange(width - len(pack)) + len(pack)]) for pack in packs])
    arrays = {
        "input_ids": ids,
        "position_ids": positions,
        "rows": np.repeat(np.arange(len(packs)), [len(pack.targets) for pack in packs]),
        "prev": np.concatenate([pack.prev for pack in packs]),
        "targets": np.concatenate([pack.targets for pack in packs]),
        "weights": np.concatenate([pack.weights for pack in packs]),
    }
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
