"""Position of a rank in the layout: which rows it computes, and which part of them."""

import math
from dataclasses import dataclass

import torch

from dagger_operator.api import Training
from dagger_operator.training.batches import Limits
from dagger_operator.training.flex import ROW_MULTIPLE
from dagger_operator.training.rows import Share


@dataclass(frozen=True)
class Rank:
    """This process's rank; `rows_shared_by` consecutive ranks share each row."""

    index: int
    of: int
    device: torch.device
    rows_shared_by: int = 1

    @property
    def group(self) -> int:
        """Index of the rows that this rank computes, among the groups."""
        return self.index // self.rows_shared_by

    @property
    def groups(self) -> int:
        return self.of // self.rows_shared_by

    @property
    def share(self) -> Share:
        """Which part of the rows is this rank's."""
        return Share(self.index % self.rows_shared_by, self.rows_shared_by)

    def limits(self, training: Training, targets_at_once: int) -> Limits:
        """Return the limits of a pass. Sequences share a row up to `microBatchTokens`, or the smallest row; trees are split at that too."""
        compiled = self.device.type == "cuda"
        multiple = math.lcm(ROW_MULTIPLE if compiled else 1, self.rows_shared_by)
        tokens = max(multiple, training.micro_batch_tokens - training.micro_batch_tokens % multiple)
        longest = training.max_sequence_tokens + -training.max_sequence_tokens % multiple
        return Limits(tokens, targets_at_once, multiple, few_lengths=compiled, longest=longest)
