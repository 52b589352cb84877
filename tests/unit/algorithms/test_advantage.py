"""Group-relative and per-token advantages, and the statistics of a batch's credit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dasd_megatron.algorithms import (
    CreditStatistics,
    MethodSettings,
    credit_metrics,
    credit_statistics,
    direction_adaptive_credit,
    group_relative_advantage,
    token_advantages,
)

SETTINGS = MethodSettings(
    verifier_weight=1.0, beta=0.3, rho=0.2, quantile_side="upper", scale_floor=0.5, gate=True, rlsd_clip=0.2
)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    lengths = torch.tensor([4, 0, 1, 9])
    return {
        "rewards_advantage": torch.tensor([0.8, -0.5, -1.2, 0.0]),
        "entropy": torch.rand(14, generator=generator) * 3,
        "delta": torch.randn(14, generator=generator),
        "lengths": lengths,
    }


def test_group_advantage_is_centred_and_scaled() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25, 0.5, 1.0, 0.25])
    got = group_relative_advantage(rewards, samples_per_group=4)
    for group in (slice(0, 4), slice(4, 8)):
        want = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-6)
        torch.testing.assert_close(got[group], want)
    centred = group_relative_advantage(rewards, samples_per_group=4, normalize_std=False)
    torch.testing.assert_close(centred[4:], rewards[4:] - 0.5)


def test_group_ids_in_any_order_agree_with_consecutive_groups() -> None:
    rewards = torch.rand(12)
    order = torch.randperm(12)
    ids = torch.tensor([70, -3, 12]).repeat_interleave(4)
    got = group_relative_advantage(rewards[order], group_ids=ids[order])
    torch.testing.assert_close(got, group_relative_advantage(rewards, samples_per_group=4)[order])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_give_exactly_zero(normalize_std: bool) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    assert group_relative_advantage(rewards, samples_per_group=3, normalize_std=normalize_std).tolist() == [0.0] * 6
    assert group_relative_advantage(rewards, samples_per_group=1, normalize_std=normalize_std).tolist() == [0.0] * 6
    assert group_relative_advantage(torch.zeros(0), samples_per_group=3).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either samples_per_group or group_ids"),
        (
            {"samples_per_group": 2, "group_ids": torch.zeros(4, dtype=torch.int64)},
            "either samples_per_group or group_ids",
        ),
        ({"samples_per_group": 3}, "do not split"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, "group_ids is"),
        ({"group_ids": torch.zeros(4)}, "group_ids is torch.float32"),
        ({"samples_per_group": 2, "rewards": torch.tensor([0.0, 1.0, math.nan, 1.0])}, r"rewards\[2\] is not finite"),
        ({"samples_per_group": 2, "rewards": torch.zeros(2, 2)}, r"shape \(2, 2\)"),
    ],
)
def test_group_advantage_refusals(arguments: dict, message: str) -> None:
    arguments = {"rewards": torch.zeros(4)} | arguments
    with pytest.raises(ValueError, match=message):
        group_relative_advantage(arguments.pop("rewards"), **arguments)


def test_dasd_is_verifier_plus_credit() -> None:
    data = batch()
    advantage, credit = token_advantages("dasd", replace(SETTINGS, verifier_weight=0.7), **data)
    reference = direction_adaptive_credit(data["entropy"], data["delta"], data["lengths"], beta=0.3, scale_floor=0.5)
    for got, want in zip(credit, reference, strict=True):
        assert torch.equal(got, want)
    per_token = data["rewards_advantage"].repeat_interleave(data["lengths"])
    torch.testing.assert_close(advantage, 0.7 * per_token + reference.advantage_term)


@pytest.mark.parametrize("gate", [True, False])
def test_the_algorithms_differ_in_direction_alone(gate: bool) -> None:
    data = batch()
    names = ("dasd", "grpo", "opsd", "reversed", "rlsd")
    results = {name: token_advantages(name, replace(SETTINGS, gate=gate), **data) for name in names}
    per_token = data["rewards_advantage"].repeat_interleave(data["lengths"])
    reliability = torch.sigmoid(results["dasd"][1].delta_bar.abs() - 1) if gate else torch.ones(14)
    for name, (advantage, credit) in results.items():
        for field in ("delta_bar", "tau", "sigma"):
            assert torch.equal(getattr(credit, field), getattr(results["dasd"][1], field)), (name, field)
        torch.testing.assert_close(advantage, per_token + credit.advantage_term)
    for name, direction in (("opsd", 1.0), ("reversed", -1.0), ("grpo", 0.0)):
        credit = results[name][1]
        torch.testing.assert_close(credit.omega, direction * reliability)
        torch.testing.assert_close(credit.advantage_term, 0.3 * credit.omega * credit.delta_bar)
    assert torch.equal(results["grpo"][0], per_token)


def test_rlsd_scales_the_verifier_and_never_turns_it() -> None:
    data = batch()
    data["delta"][:3] = torch.tensor([-math.inf, 0.05, -0.05])
    advantage, credit = token_advantages("rlsd", SETTINGS, **data)
    per_token = data["rewards_advantage"].repeat_interleave(data["lengths"])
    want = per_token * (per_token.sign() * data["delta"]).exp().clamp(0.8, 1.2)
    torch.testing.assert_close(advantage, want)
    assert torch.equal(advantage.sign(), per_token.sign()) and credit.omega.abs().sum() == 0
    assert (credit.advantage_term.abs() <= 0.2 * per_token.abs() + 1e-6).all()


def test_without_the_verifier_the_teacher_remains() -> None:
    data = batch()
    advantage, credit = token_advantages("opsd", replace(SETTINGS, verifier_weight=0.0), **data)
    assert torch.equal(advantage, credit.advantage_term) and advantage.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "settings", "data", "message"),
    [
        ("ppo", {}, {}, "algorithm 'ppo' is unknown"),
        ("dasd", {}, {"rewards_advantage": torch.zeros(14)}, "one entry per rollout"),
        ("dasd", {"rlsd_clip": 1.5}, {}, "rlsd_clip is 1.5; expected 0 to 1"),
        ("rlsd", {"rlsd_lambda": -0.1}, {}, "rlsd_lambda is -0.1; expected 0 to 1"),
        ("pw_opsd", {"position_s": 0.0}, {}, "position_s is 0.0; expected above 0"),
        ("pw_opsd", {"position_w_min": 2.0}, {}, "position_w_min is 2.0; expected 0 to 1"),
        ("srpo", {"srpo_beta": math.nan}, {}, "srpo_beta is nan; expected at least 0"),
        ("srpo", {}, {}, "'srpo' acts on wrong rollouts alone; give facts"),
        ("rlrt", {}, {}, "'rlrt' acts on right rollouts alone; give facts"),
        ("dasd", {"rho": -0.1}, {}, "rho is -0.1"),
    ],
)
def test_token_advantage_refusals(name: str, settings: dict[str, Any], data: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_advantages(name, replace(SETTINGS, **settings), **batch() | data)


def test_metrics_are_what_they_say() -> None:
    data = batch()
    advantage, credit = token_advantages("dasd", SETTINGS, **data)
    metrics = credit_metrics(credit_statistics(credit, data["entropy"], data["delta"], advantage))
    entropy, omega, delta = data["entropy"], credit.omega, data["delta"]
    expected = {
        "entropy/mean": entropy.mean(),
        "entropy/pushed": entropy[omega < 0].mean(),
        "entropy/pulled": entropy[omega > 0].mean(),
        "credit/pushed_share": (omega < 0).float().mean(),
        "credit/pushed_delta_mean": (omega * delta)[omega < 0].sum() / omega[omega < 0].sum(),
        "credit/omega_mean": omega.mean(),
        "credit/omega_std": omega.std(correction=0),
        "credit/omega_min": omega.min(),
        "credit/omega_max": omega.max(),
        "credit/delta_mean": delta.mean(),
        "credit/delta_abs_mean": delta.abs().mean(),
        "credit/delta_bar_abs_mean": credit.delta_bar.abs().mean(),
        "credit/tau_mean": credit.tau.mean(),
        "credit/sigma_mean": credit.sigma.mean(),
        "credit/advantage_abs_mean": advantage.abs().mean(),
    }
    assert metrics == {name: pytest.approx(value.item(), rel=1e-5, abs=1e-6) for name, value in expected.items()}
    assert all(type(value) is float for value in metrics.values())


def test_gaps_of_tokens_without_a_teacher_are_not_counted() -> None:
    data = batch()
    advantage, credit = token_advantages("opsd", SETTINGS, **data)
    taught = torch.tensor([True] * 5 + [False] * 9)
    metrics = credit_metrics(credit_statistics(credit, data["entropy"], data["delta"], advantage, taught))
    assert metrics["credit/delta_mean"] == pytest.approx(data["delta"][:5].mean().item(), rel=1e-5)
    assert metrics["credit/delta_abs_mean"] == pytest.approx(data["delta"][:5].abs().mean().item(), rel=1e-5)
    assert metrics["credit/delta_bar_abs_mean"] == pytest.approx(credit.delta_bar[:5].abs().mean().item(), rel=1e-5)
    assert metrics["entropy/mean"] == pytest.approx(data["entropy"].mean().item(), rel=1e-5)
    none = credit_metrics(credit_statistics(credit, data["entropy"], data["delta"], advantage, ~taught & taught))
    assert {name for name in metrics if "delta" in name} == metrics.keys() - none.keys()
    with pytest.raises(ValueError, match=r"taught has shape \(3,\)"):
        credit_statistics(credit, data["entropy"], data["delta"], advantage, taught[:3])


def test_statistics_add_up_over_ranks() -> None:
    parts, whole = [], []
    for _ in range(3):
        data = batch()
        advantage, credit = token_advantages("dasd", SETTINGS, **data)
        parts.append(credit_statistics(credit, data["entropy"], data["delta"], advantage))
        whole.append((credit, data["entropy"], data["delta"], advantage))
    reduced = CreditStatistics(sum(part.sums for part in parts), torch.stack([part.maxima for part in parts]).amax(0))
    credits, *columns = zip(*whole, strict=True)
    joined = type(credits[0])(*(torch.cat(values) for values in zip(*credits, strict=True)))
    together = credit_statistics(joined, *(torch.cat(column) for column in columns))
    assert credit_metrics(reduced) == pytest.approx(credit_metrics(together), rel=1e-9, abs=1e-12)


def test_statistics_of_nothing_and_of_one_direction() -> None:
    empty = torch.zeros(0)
    credit = direction_adaptive_credit(empty, empty, torch.tensor([0]))
    none = credit_statistics(credit, empty, empty, empty)
    assert credit_metrics(none) == {}
    data = batch()
    advantage, credit = token_advantages("opsd", SETTINGS, **data)
    some = credit_statistics(credit, data["entropy"], data["delta"], advantage)
    metrics = credit_metrics(CreditStatistics(some.sums + none.sums, torch.maximum(some.maxima, none.maxima)))
    assert "entropy/pushed" not in metrics and metrics["credit/pushed_share"] == 0 and metrics["credit/omega_min"] > 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_an_infinite_gap_leaves_the_metrics_finite() -> None:
    data = batch()
    data["delta"][3] = -math.inf
    advantage, credit = token_advantages("dasd", SETTINGS, **data)
    metrics = credit_metrics(credit_statistics(credit, data["entropy"], data["delta"], advantage))
    assert all(math.isfinite(value) for value in metrics.values())
    with pytest.raises(ValueError, match=r"entropy has shape \(13,\)"):
        credit_statistics(credit, data["entropy"][:13], data["delta"], advantage)
