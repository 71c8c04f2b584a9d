"""Forward KL is what it says: held against the plain sum in FP64, value and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dagger_operator.training.divergence import forward_kl

pytestmark = pytest.mark.heavy

thorough = settings(deadline=None, max_examples=60)


def plain(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """The same, one target and one token at a time, in FP64."""
    found = []
    for row in range(len(logits)):
        log_q = logits[row].double().log_softmax(-1)
        listed = {int(token): float(value) for token, value in zip(ids[row], logprobs[row], strict=True) if value > -math.inf}
        total = torch.zeros((), dtype=torch.float64)
        for token, log_p in listed.items():
            if (p := math.exp(log_p)) > 0:
                total = total + p * (log_p - log_q[token])
        p_tail = 1 - math.fsum(math.exp(log_p) for log_p in listed.values())
        rest = [token for token in range(logits.shape[1]) if token not in listed]
        if p_tail > 0 and rest:
            total = total + p_tail * (math.log(p_tail) - log_q[rest].logsumexp(0))
        found.append(total)
    return torch.stack(found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and what a teacher told: ties, sure and unsure ones, tokens without probability, places that list nothing."""
    targets, vocabulary = draw(st.integers(1, 4)), draw(st.integers(3, 12))
    k = draw(st.integers(1, vocabulary - 1))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharp_q, sharp_p = (draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])) for _ in range(2))
    logits = sharp_q * torch.randn(targets, vocabulary, generator=dice)
    teacher = (sharp_p * torch.randn(targets, vocabulary, generator=dice)).log_softmax(-1)
    ids = torch.stack([torch.randperm(vocabulary, generator=dice)[:k] for _ in range(targets)])
    logprobs = teacher.gather(1, ids)
    if draw(st.booleans()):
        logprobs[:, -1] = -9999.0  # what vLLM says of a token that cannot be
    if k > 1 and draw(st.booleans()):
        ids[:, -1], logprobs[:, -1] = ids[:, 0], -math.inf
    return logits, ids, logprobs


@thorough
@given(cases())
def test_value_and_gradient_are_those_of_the_plain_sum(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, logprobs = case
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.rand(len(logits)) + 0.5
    value, expected = forward_kl(ours, ids, logprobs), plain(theirs, ids, logprobs)
    assert value.double().tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=2e-5)
    assert min(expected.tolist()) > -1e-6
    (value * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    # Logits in the hundreds are rounded in the fifth place after the point, and probabilities with them.
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=3e-5)


@thorough
@given(st.integers(1, 5), st.integers(2, 50), st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 60.0]))
def test_a_hard_target_is_the_cross_entropy(targets: int, vocabulary: int, seed: int, sharp: float) -> None:
    torch.manual_seed(seed)
    logits = (sharp * torch.randn(targets, vocabulary)).requires_grad_()
    tokens = torch.randint(vocabulary, (targets,))
    # As `soft.joined` widens them.
    ids, logprobs = tokens[:, None].expand(-1, 3), torch.tensor([[0.0, -math.inf, -math.inf]]).expand(targets, -1)
    value, expected = forward_kl(logits, ids, logprobs), functional.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=3e-5)
    (mine,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=3e-5)


def test_a_student_that_is_as_the_teacher_has_nothing_to_learn_and_any_other_has() -> None:
    logits = torch.randn(1, 40)
    teacher = logits.log_softmax(-1)
    logprobs, ids = teacher.topk(8)
    same = logits.clone().requires_grad_()
    value = forward_kl(same, ids, logprobs)
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert value.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max().item() < 1e-6
    # All that the teacher lists is right, and the rest of the probability has gone to it: only the tail can tell.
    greedy = torch.full_like(logits, -30.0).scatter(1, ids, logprobs).requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(greedy, ids, logprobs).sum(), greedy)
    rest = torch.ones(40, dtype=torch.bool).index_fill(0, ids[0], False)
    assert (gradient[0, rest] < 0).all() and (gradient[0, ids[0]] > 0).all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_a_student_that_is_very_sure_has_a_finite_gradient(scale: float) -> None:
    logits = (scale * torch.eye(3, 30)).requires_grad_()
    ids, logprobs = torch.tensor([[0, 1], [0, 1], [5, 6]]), torch.tensor([[-0.1, -5.0], [-0.7, -0.7], [-0.2, -3.0]])
    value = forward_kl(logits, ids, logprobs)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(value.double(), plain(logits.double(), ids, logprobs), rtol=1e-4, atol=1e-4)


def test_where_every_token_is_listed_there_is_no_tail() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    ids = torch.arange(3).expand(2, 3)
    logprobs = torch.tensor([[0.5, 0.3, 0.1999999]]).log().expand(2, 3)
    value = forward_kl(logits, ids, logprobs)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and gradient.isfinite().all()
