"""Gradients of every loss in float32, as a run computes them, against float64 from the same inputs.

The other tests of a formula run in float64, where a difference of two large numbers still has digits to lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dasd_megatron.losses import (
    DIVERGENCES,
    importance_weights,
    kl_k3,
    linear_token_stats,
    policy_surrogate,
    routed_divergence,
    vocab_parallel_token_stats,
)
from tests.support.token_stats_reference import dense

TOKENS = 4000
# Sizes of the difference between two log-probs or logits: equal but for the last digit, up to far apart.
GAPS = (1e-6, 1e-4, 1e-2, 1.0, 10.0, 100.0)


@pytest.fixture
def seed() -> int:
    value = torch.seed() % 2**31
    torch.manual_seed(value)
    return value


def some_gaps() -> Tensor:
    """Return differences of both signs whose magnitudes are spread evenly from 1e-8 to 30, and some extreme ones."""
    size = 10.0 ** (torch.rand(TOKENS) * (math.log10(30.0) + 8.0) - 8.0)
    extreme = torch.tensor([0.0, 0.1, -0.1, 10.0, -10.0, 200.0, -200.0, 1e4, -1e4])
    return torch.cat([size * torch.randn(TOKENS).sign(), extreme])


def gradients(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum of ``loss`` at float32 ``inputs``, in float32 and in float64 arithmetic."""
    found = []
    for dtype in (torch.float32, torch.float64):
        own = inputs.detach().to(dtype, copy=True).requires_grad_()
        loss(own).sum().backward()
        assert own.grad is not None
        found.append(own.grad.double())
    return found[0], found[1]


def test_k3(seed: int) -> None:
    reference = -torch.rand(TOKENS + 9)
    log_prob = reference - some_gaps()
    got, _ = gradients(lambda x: kl_k3(x, reference.to(x.dtype)), log_prob)
    gap = (reference.double() - log_prob.double()).clamp(max=10.0)
    torch.testing.assert_close(got, -torch.expm1(gap), rtol=5e-6, atol=0, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_surrogate(seed: int, dual_clip: float | None) -> None:
    old, gap, advantage = -torch.rand(TOKENS + 9), some_gaps(), torch.randn(TOKENS + 9)
    log_prob = old + gap
    ratio = (log_prob.double() - old.double()).clamp(-20.0, 20.0).exp()
    # Which side of a corner a token is on may differ in the last digit.
    corners = torch.tensor([0.8, 1.28, 3.0, math.exp(20.0)], dtype=torch.float64)
    clear = ((ratio[:, None] / corners - 1.0).abs() > 1e-5).all(-1) | (gap.abs() > 25.0)

    def loss(x: Tensor) -> Tensor:
        surrogate, _ = policy_surrogate(
            x, old.to(x.dtype), advantage.to(x.dtype), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
        )
        return surrogate[clear]

    got, want = gradients(loss, log_prob)
    assert clear.sum() > TOKENS * 0.99 and (want != 0).sum() > TOKENS / 2
    torch.testing.assert_close(got, want, rtol=5e-6, atol=0, msg=lambda m: f"seed {seed}: {m}")


def test_routed_divergence(seed: int) -> None:
    omega = torch.rand(TOKENS + 9) * 2 - 1
    got, want = gradients(lambda x: routed_divergence(x, omega.to(x.dtype), cap=2.0)[0], some_gaps().abs())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_of_long_rollouts(seed: int, level: str) -> None:
    """A weight multiplies the gradient of its token, so its digits are the gradient's."""
    lengths = torch.tensor([1, 20_000, 60_000])
    trainer = torch.randn(int(lengths.sum())) * 0.3 - 1.0
    engine = trainer - torch.randn(len(trainer)) * 0.05
    got, _ = importance_weights(trainer, engine, lengths, level=level, cap=1e30)
    want, _ = importance_weights(trainer.double(), engine.double(), lengths, level=level, cap=1e30)
    # An exponential multiplies the relative error of its argument by the argument.
    bound = 2e-7 * (1.0 + want.log().abs()) * want
    # What float32 rounds off each of the differences adds up, too.
    drift = 3e-8 * lengths.double().sqrt().repeat_interleave(lengths) * want if level == "sequence" else 0.0
    assert ((got.double() - want).abs() <= bound + drift).all(), f"seed {seed}"


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("output", ["log_prob", "entropy", *DIVERGENCES])
def test_token_statistics(seed: int, output: str, gap: float) -> None:
    """Every statistic alone, from logits and from hidden states, for a student and a teacher that differ by ``gap``."""
    divergence = output if output in DIVERGENCES else "reverse_kl"
    name = "divergence" if output in DIVERGENCES else output
    hidden, head = torch.randn(12, 16), torch.randn(300, 16)
    logits = hidden @ head.t()
    teacher = logits + torch.randn_like(logits) * gap
    targets = torch.randint(0, 300, (12,))
    common = {"divergence": divergence, "temperature": 0.7, "jsd_weight": 0.3}

    exact = logits.double().requires_grad_()
    statistics = dense(exact, targets, teacher.double(), divergence, 0.7, 300, 0.3)
    (want,) = torch.autograd.grad(getattr(statistics, name).sum(), exact)
    own = logits.clone().requires_grad_()
    stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, **common)
    (got,) = torch.autograd.grad(getattr(stats, name).sum(), own)
    # The reverse KL's gradient is a difference of two numbers of about its own size.
    nats = 1.0 + float(statistics.divergence.detach().max()) if output == "reverse_kl" else 1.0
    check_rows(got, want, size=nats, message=f"seed {seed}")

    # The teacher's logits are those of its own head, so its states are the rows of the unit matrix.
    own_hidden, own_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    stats = linear_token_stats(
        own_hidden, own_head, targets, teacher_hidden=torch.eye(12), teacher_weight=teacher.t().contiguous(),
        vocab_chunk_size=128, chunk_size=5, **common,
    )  # fmt: skip
    got_hidden, got_head = torch.autograd.grad(getattr(stats, name).sum(), (own_hidden, own_head))
    exact_logits = (hidden.double() @ head.double().t()).requires_grad_()
    statistics = dense(exact_logits, targets, teacher.double(), divergence, 0.7, 300, 0.3)
    (want,) = torch.autograd.grad(getattr(statistics, name).sum(), exact_logits)
    # The logits themselves are rounded here, to 1e-6 of the largest.
    size = nats * float(logits.abs().max())
    check_rows(got_hidden, want @ head.double(), size=size, message=f"seed {seed} hidden")
    check_rows(got_head, want.t() @ hidden.double(), size=size, message=f"seed {seed} head")


def check_rows(got: Tensor, want: Tensor, *, size: float, message: str) -> None:
    """Compare with 1e-5 of a row's largest entry, and with what float32 keeps of the logarithms that nearly cancel
    where student and teacher are nearly the same: 1e-6 times the ``size`` of what cancels."""
    bound = 1e-5 * want.abs().amax(-1, keepdim=True) + 1e-6 * size
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{message}: off by {error.max():.2e}, {(error / bound).max():.2f} of the bound"
