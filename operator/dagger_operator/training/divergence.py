"""Forward Kullback-Leibler divergence from the teacher's distribution, of which only the likeliest tokens are known.

All tokens that are not listed are one event, the tail: what is left of 1 for the teacher, and for the student. Without it the student
would be driven to give what the teacher lists all of its own probability (arXiv 2503.16870).
"""

import torch
from torch import Tensor


def forward_kl(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Of each of n targets, shape (n,), in FP32: sum over what is listed, and the tail, of p (log p - log q).

    `logits`: (n, vocabulary). `ids`, `logprobs`: (n, k), as `soft.Soft` has them. With all of p on one token it is the cross-entropy.
    """
    listed = logprobs.isfinite()
    p = logprobs.exp()
    whole = logits.logsumexp(dim=1)
    log_q = logits.gather(1, ids) - whole[:, None]
    known = (p * (logprobs.masked_fill(~listed, 0.0) - log_q)).sum(dim=1)
    # By what is left over and not by 1 - sum(q), of which nothing is left where the student is sure.
    log_q_tail = logits.scatter(1, ids, float("-inf")).logsumexp(dim=1) - whole
    p_tail = (1 - p.sum(dim=1)).clamp(min=0.0)
    tail = (p_tail > 0) & log_q_tail.isfinite()
    return known + torch.where(tail, p_tail * (p_tail.clamp(min=1e-30).log() - log_q_tail), 0.0)
