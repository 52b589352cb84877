"""One step of gradient descent on a toy distribution: routing means what it says, under both objectives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dasd_megatron.algorithms import MethodSettings, direction_adaptive_credit, token_advantages
from dasd_megatron.losses import (
    DIVERGENCES,
    linear_token_stats,
    policy_surrogate,
    routed_divergence,
    vocab_parallel_token_stats,
)

STEP = 1e-2
# Without a floor of the entropy a rollout of one token has omega 0, whatever its entropy is.
SETTINGS = dict(rho=0.2, quantile_side="upper", scale_floor=0.0, entropy_floor=0.0)


@pytest.fixture
def rollouts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher ``[T, V]`` with entropies from sharp to flat, sampled tokens, and lengths of three
    rollouts."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")
    # In float64, so that the sign of every small change can be told from rounding.
    sharpness = torch.rand(60, 1, dtype=torch.float64) * 4
    student = torch.randn(60, 12, dtype=torch.float64) * sharpness
    teacher = student + torch.randn(60, 12, dtype=torch.float64)
    targets = torch.distributions.Categorical(logits=student).sample()
    return student, teacher, targets, torch.tensor([25, 1, 34])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distributional_moves_toward_the_teacher_exactly_where_omega_is_positive(
    rollouts: tuple[Tensor, Tensor, Tensor, Tensor], divergence: str
) -> None:
    student, teacher, targets, lengths = rollouts
    own = student.clone().requires_grad_()
    stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, divergence=divergence)
    omega = direction_adaptive_credit(stats.entropy, stats.teacher_log_prob - stats.log_prob, lengths, **SETTINGS).omega
    assert (omega > 0).any() and (omega < 0).any()
    # Half of the pushed tokens are at or beyond this cap.
    cap = float(stats.divergence.detach()[omega < 0].median())
    term, capped = routed_divergence(stats.divergence, omega, cap=cap)
    term.sum().backward()
    after = vocab_parallel_token_stats(
        student - STEP * own.grad, targets, teacher_logits=teacher, divergence=divergence
    ).divergence
    change = after - stats.divergence.detach()
    pushed = (omega < 0) & ~capped
    assert (change[omega > 0] < 0).all() and (change[pushed] > 0).all() and pushed.any()
    # Nothing moves at the cap or without a direction, as in a rollout of one token.
    assert capped.any() and (own.grad[capped] == 0).all() and (own.grad[omega == 0] == 0).all() and (omega == 0).any()


def test_sampled_raises_the_log_prob_exactly_where_the_term_is_positive(
    rollouts: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    student, teacher, targets, lengths = rollouts
    own = student.clone().requires_grad_()
    stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher)
    beta = 0.3
    advantage, credit = token_advantages(
        "dasd",
        MethodSettings(verifier_weight=1.0, beta=beta, gate=True, rlsd_clip=0.2, **SETTINGS),
        rewards_advantage=torch.zeros(3),
        entropy=stats.entropy,
        delta=stats.teacher_log_prob - stats.log_prob,
        lengths=lengths,
    )
    torch.testing.assert_close(advantage, beta * credit.omega * credit.delta_bar)
    loss, _ = policy_surrogate(stats.log_prob, stats.log_prob.detach(), advantage, clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    change = vocab_parallel_token_stats(student - STEP * own.grad, targets).log_prob - stats.log_prob.detach()
    # A token of probability 1 can rise no further.
    visible = advantage.abs() * (1 - stats.log_prob.detach().exp()) > 1e-9
    assert visible.sum() > 40
    assert torch.equal(change[visible] > 0, advantage[visible] > 0)


def test_both_terms_in_one_backward_are_the_sum_of_each_alone() -> None:
    """The surrogate of the sampled token and the full divergence share one pass over the hidden states."""
    hidden, head, teacher = torch.randn(20, 6), torch.randn(30, 6), torch.randn(20, 6)
    targets, omega, advantage = torch.randint(0, 30, (20,)), torch.rand(20) * 2 - 1, torch.randn(20)

    def gradient(surrogate_weight: float, divergence_weight: float) -> Tensor:
        own = hidden.clone().requires_grad_()
        stats = linear_token_stats(own, head, targets, teacher_hidden=teacher)
        surrogate, _ = policy_surrogate(stats.log_prob, stats.log_prob.detach(), advantage, clip_low=0.2, clip_high=0.2)
        term, _ = routed_divergence(stats.divergence, omega, cap=100.0)
        (surrogate_weight * surrogate.sum() + divergence_weight * term.sum()).backward()
        return own.grad

    torch.testing.assert_close(gradient(1.0, 0.3), gradient(1.0, 0.0) + gradient(0.0, 0.3), rtol=1e-4, atol=1e-6)


def test_distributional_objective_leaves_the_advantage_to_the_verifier() -> None:
    data = {
        "entropy": torch.rand(10),
        "delta": torch.randn(10),
        "rewards_advantage": torch.tensor([0.7, -0.7]),
        "lengths": torch.tensor([4, 6]),
    }
    sampled = MethodSettings(verifier_weight=0.5, beta=1.0, gate=True, rlsd_clip=0.2, **SETTINGS)
    advantage, credit = token_advantages("dasd", replace(sampled, objective="distributional"), **data)
    assert advantage.tolist() == pytest.approx([0.35] * 4 + [-0.35] * 6) and (credit.advantage_term == 0).all()
    assert torch.equal(credit.omega, token_advantages("dasd", sampled, **data)[1].omega) and (credit.omega != 0).any()
    with pytest.raises(ValueError, match="objective is 'both'"):
        token_advantages("dasd", replace(sampled, objective="both"), **data)
