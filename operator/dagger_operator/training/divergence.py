"""Forward Kullback-Leibler divergence from the teacher's distribution, of which only the most likely tokens are known.

All unlisted tokens are one event, the tail: the rest of the probability, of the teacher and of the student. Without it the student would
be driven to put all of its own probability on the tokens that the teacher lists (arXiv 2503.16870).
"""

import torch
from torch import Tensor


def forward_kl(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Return the divergence of each of n targets, shape (n,), in FP32: the sum of p (log p - log q) over the listed tokens and the tail.

    `logits`: (n, vocabulary). `ids`, `logprobs`: (n, k), as in `soft.Soft`. With all of p on one token it is the cross-entropy.
    """
    listed = logprobs.isfinite()
    p = logprobs.exp()
    whole = logits.logsumexp(dim=1)
    log_q = logits.gather(1, ids) - whole[:, None]
    known = (p * (logprobs.masked_fill(~listed, 0.0) - log_q)).sum(dim=1)
    # From the unlisted logits and not as 1 - sum(q), which rounds to nothing where the student is certain.
    log_q_tail = logits.scatter(1, ids, float("-inf")).logsumexp(dim=1) - whole
    p_tail = (1 - p.sum(dim=1)).clamp(min=0.0)
    tail = (p_tail > 0) & log_q_tail.isfinite()
    return known + torch.where(tail, p_tail * (p_tail.clamp(min=1e-30).log() - log_q_tail), 0.0)
