"""Floating-point operations of a pass through a model."""

from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.workload import Tokens


def forward(shape: Shape, tokens: float, pairs: float, head_rows: float) -> float:
    """Return the FLOP of a forward pass: two per parameter that a token meets (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and
    four per attended pair and unit of query width: scores, then their sum over values (FlashAttention-2, arXiv 2307.08691, section 4).

    `pairs` are those that the mask allows; `head_rows` the positions whose logits are computed.
    """
    return 2 * (shape.body * tokens + shape.head * head_rows) + 4 * shape.layers * shape.q_width * pairs


def training(shape: Shape, work: Tokens, checkpointing: bool) -> float:
    """Return the FLOP of forward and backward: the backward pass costs two forward passes, recomputing activations one more (Korthikanti
    et al. 2022, arXiv 2205.05198). Logits are computed at targets only."""
    return (4 if checkpointing else 3) * forward(shape, work.tokens, work.pairs, work.targets)
