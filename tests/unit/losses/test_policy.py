"""Policy surrogate and KL penalty against the plain formulas, and their gradients by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.losses import kl_k3, policy_surrogate, response_means, routed_divergence


def plain_surrogate(
    log_prob: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> float:
    ratio = math.exp(log_prob - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@given(
    tokens=st.integers(0, 20),
    low=st.floats(0.0, 1.0),
    high=st.floats(0.0, 2.0),
    dual=st.one_of(st.none(), st.floats(1.01, 5.0)),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_surrogate_is_the_plain_formula(tokens: int, low: float, high: float, dual: float | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_prob, old, advantage = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    log_prob.requires_grad_()
    loss, clipped = policy_surrogate(log_prob, old, advantage, clip_low=low, clip_high=high, dual_clip=dual)
    rows = zip(log_prob.tolist(), old.tolist(), advantage.tolist(), strict=True)
    expected = torch.tensor([plain_surrogate(*row, low, high, dual) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected)
    assert clipped.dtype == torch.bool and clipped.shape == (tokens,)
    loss.sum().backward()
    # The gradient of what is not clipped is that of -A r, and there is none where the mask says so.
    free = -advantage * (log_prob - old).exp().detach()
    torch.testing.assert_close(log_prob.grad, torch.where(clipped, 0.0, free))


def test_surrogate_gradient_by_finite_differences() -> None:
    old, advantage = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_prob = (old + torch.linspace(-0.6, 0.6, 64, dtype=torch.float64)).requires_grad_()
    for dual in (None, 1.5):
        assert torch.autograd.gradcheck(
            lambda x, dual=dual: policy_surrogate(x, old, advantage, clip_low=0.2, clip_high=0.28, dual_clip=dual)[0],
            log_prob,
        )


def test_surrogate_at_the_corners() -> None:
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5, 1.5, 0.0, 0.5]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    loss, clipped = policy_surrogate(log_prob, torch.zeros(7), advantage, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([-1.28, math.exp(0.5), -math.exp(-0.5), 0.8, 3.0, -1.0, 0.0]))
    assert clipped.tolist() == [True, False, False, True, True, False, False]


def test_surrogate_bounds_an_absurd_ratio_and_widens_bf16() -> None:
    log_prob = torch.tensor([0.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    old = torch.tensor([-5000.0, 5000.0], dtype=torch.bfloat16)
    loss, _ = policy_surrogate(log_prob, old, torch.tensor([-1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all() and torch.isfinite(log_prob.grad).all()
    assert loss[0] > 1e8


def test_surrogate_gradient_reaches_log_prob_alone() -> None:
    log_prob, old, advantage = (torch.randn(5, requires_grad=True) for _ in range(3))
    policy_surrogate(log_prob, old, advantage, clip_low=0.2, clip_high=0.2)[0].sum().backward()
    assert log_prob.grad is not None and old.grad is None and advantage.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_low": 1.1}, "clip_low is 1.1"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"dual_clip": 2.0, "surrogate": "cispo"}, "dual_clip is 2.0"),
        ({"surrogate": "gspo"}, "gspo needs one"),
        ({"surrogate": "cispo", "response_log_ratio": torch.zeros(2)}, "cispo needs none"),
        ({"surrogate": "gspo", "response_log_ratio": torch.zeros(3)}, r"response_log_ratio \(3,\)"),
    ],
)
def test_surrogate_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2), **{"clip_low": 0.2, "clip_high": 0.2} | change)


def test_surrogates_have_bounds_of_their_own() -> None:
    """At a log-ratio of 0.1 PPO does not clip yet, GSPO does, and CISPO only bounds the weight at 5."""
    old, advantage = torch.zeros(3), torch.tensor([1.0, -1.0, 1.0])
    for name, want, slope in (
        ("ppo", [-math.exp(0.1), math.exp(0.1), -1.28], [-math.exp(0.1), math.exp(0.1), 0.0]),
        ("gspo", [-1.0004, math.exp(0.1), -1.0004], [0.0, math.exp(0.1), 0.0]),
        ("cispo", [-math.exp(0.1) * 0.1, math.exp(0.1) * 0.1, -10.0], [-math.exp(0.1), math.exp(0.1), -5.0]),
    ):
        log_prob = torch.tensor([0.1, 0.1, 2.0]).requires_grad_()
        means = log_prob.detach() if name == "gspo" else None
        loss, clipped = policy_surrogate(log_prob, old, advantage, surrogate=name, response_log_ratio=means)
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(want))
        torch.testing.assert_close(log_prob.grad, torch.tensor(slope))
        assert clipped.tolist() == {"ppo": [False, False, True], "gspo": [True, False, True]}.get(
            name, [False, False, True]
        )


@pytest.mark.parametrize("surrogate", ["gspo", "cispo"])
def test_an_absurd_ratio_has_a_finite_loss_and_gradient(surrogate: str) -> None:
    log_prob = torch.tensor([0.0, -5000.0], requires_grad=True)
    old, advantage = torch.tensor([-5000.0, 0.0]), torch.tensor([-1.0, -1.0])
    means = (log_prob - old).detach() if surrogate == "gspo" else None
    loss, _ = policy_surrogate(log_prob, old, advantage, surrogate=surrogate, response_log_ratio=means)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(log_prob.grad).all()


def test_one_response_of_one_advantage_has_the_gradient_of_gspo_itself() -> None:
    """Where all tokens of a response share their advantage, the form by token is GSPO's, whose ratio has the gradient
    of the mean over the response."""
    generator = torch.Generator().manual_seed(2)
    old, start = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    gradients = []
    for by_token in (True, False):
        log_prob = (old + 0.1 * start).requires_grad_()
        rollout, lengths = torch.zeros(9, dtype=torch.int64), torch.tensor([9])
        if by_token:
            means = response_means((log_prob - old).detach(), rollout, lengths)
            loss, _ = policy_surrogate(
                log_prob, old, torch.full((9,), -1.5), surrogate="gspo", clip_high=9.0, response_log_ratio=means
            )
            loss.mean().backward()
        else:
            (1.5 * (log_prob - old).mean().exp()).backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(*gradients)


def test_response_means_are_of_each_response() -> None:
    values, rollout = torch.tensor([1.0, 2.0, 6.0, 5.0], requires_grad=True), torch.tensor([2, 0, 2, 2])
    means = response_means(values, rollout, torch.tensor([1, 4, 3]))
    assert means.tolist() == [4.0, 2.0, 4.0, 4.0] and not means.requires_grad
    assert response_means(torch.zeros(0), rollout[:0], torch.tensor([1, 4, 3])).shape == (0,)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"advantage \(3,\)"):
        policy_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(3), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ValueError, match=r"ref_log_prob \(1, 2\)"):
        kl_k3(torch.zeros(2), torch.zeros(1, 2))


def test_k3_is_the_plain_formula_in_float64() -> None:
    gap = torch.cat([torch.linspace(-30, 9.9, 400), torch.linspace(-0.2, 0.2, 401)]).double()
    torch.testing.assert_close(kl_k3(-gap, torch.zeros_like(gap)), torch.expm1(gap) - gap, rtol=1e-9, atol=1e-13)


def test_k3_keeps_its_digits_near_zero_in_float32() -> None:
    gap = 10.0 ** torch.linspace(-8, 1, 400)
    for sign in (1.0, -1.0):
        x = (sign * gap).double()
        exact = torch.where(x.abs() < 1e-3, x**2 / 2 + x**3 / 6 + x**4 / 24, torch.expm1(x) - x)
        got = kl_k3(-sign * gap, torch.zeros_like(gap))
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=0)


def test_k3_gradient_is_one_minus_the_ratio() -> None:
    log_prob = torch.linspace(-9.7, 9.7, 195, dtype=torch.float64).requires_grad_()
    reference = torch.zeros(195, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, reference.detach()), log_prob)
    kl_k3(log_prob, reference).sum().backward()
    torch.testing.assert_close(log_prob.grad, 1 - (-log_prob.detach()).exp(), rtol=1e-6, atol=1e-9)
    assert reference.grad is None


def test_k3_far_away_is_finite_convex_and_pulls_back() -> None:
    log_prob = torch.tensor([-9.0, -10.0, -11.0, -50.0, -5000.0]).requires_grad_()
    value = kl_k3(log_prob, torch.zeros(5))
    value.sum().backward()
    assert torch.isfinite(value).all() and (value.diff() > 0).all()
    assert torch.isfinite(log_prob.grad).all() and (log_prob.grad < -8000).all() and (log_prob.grad.diff() <= 0).all()


def test_routed_divergence_pulls_without_bound_and_pushes_up_to_the_cap() -> None:
    divergence = torch.tensor([0.5, 3.0, 0.5, 1.9, 2.0, 3.0, math.inf, math.inf]).requires_grad_()
    omega = torch.tensor([0.4, 0.4, -0.3, -0.3, -0.3, -0.3, 0.4, -0.3], requires_grad=True)
    term, capped = routed_divergence(divergence, omega, cap=2.0)
    term.sum().backward()
    torch.testing.assert_close(term.detach(), torch.tensor([0.2, 1.2, -0.15, -0.57, -0.6, -0.6, 0.0, -0.6]))
    assert capped.tolist() == [False, False, False, False, True, True, False, True]
    torch.testing.assert_close(divergence.grad, torch.tensor([0.4, 0.4, -0.3, -0.3, 0.0, 0.0, 0.0, 0.0]))
    assert omega.grad is None


def test_routed_divergence_caps_the_pull_as_it_caps_the_push() -> None:
    divergence = torch.tensor([0.5, 0.9, 1.0, 3.0, math.inf, 0.5, 1.5, 3.0, 3.0]).requires_grad_()
    omega = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.4, -0.3, -0.3, -0.3, 0.0])
    term, capped = routed_divergence(divergence, omega, cap=2.0, pull_cap=1.0)
    term.sum().backward()
    torch.testing.assert_close(term.detach(), torch.tensor([0.2, 0.36, 0.4, 0.4, 0.4, -0.15, -0.45, -0.6, 0.0]))
    assert capped.tolist() == [False, False, True, True, True, False, False, True, False]
    torch.testing.assert_close(divergence.grad, torch.tensor([0.4, 0.4, 0.0, 0.0, 0.0, -0.3, -0.3, 0.0, 0.0]))


def test_routed_divergence_refusals() -> None:
    with pytest.raises(ValueError, match="pull_cap is 0.0"):
        routed_divergence(torch.zeros(2), torch.zeros(2), cap=1.0, pull_cap=0.0)
    with pytest.raises(ValueError, match=r"omega \(3,\)"):
        routed_divergence(torch.zeros(2), torch.zeros(3), cap=1.0)
    with pytest.raises(ValueError, match="cap is -1.0"):
        routed_divergence(torch.zeros(2), torch.zeros(2), cap=-1.0)
