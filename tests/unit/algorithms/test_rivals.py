"""Each published method's advantage against its formula in plain loops, and what its settings may not change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dasd_megatron.algorithms import GAP_LIMIT, METHODS, MethodSettings, RolloutFacts, token_advantages

SETTINGS = MethodSettings(
    verifier_weight=0.8,
    beta=0.7,
    rho=0.2,
    quantile_side="upper",
    scale_floor=0.5,
    gate=True,
    rlsd_clip=0.3,
    rlsd_lambda=0.6,
    srpo_beta=1.3,
    position_w_min=0.2,
    position_tau=0.4,
    position_s=0.15,
)
LENGTHS = [4, 1, 0, 9, 6, 3, 5]
COUNT = sum(LENGTHS)


def batch() -> tuple[dict[str, Any], RolloutFacts]:
    """Return fresh random rollouts: right and wrong ones with and without a teacher, one of one token, one of none, one
    of equal entropies, and gaps that are infinite."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    delta = 6 * draw(COUNT) - 3
    delta[[2, 7]] = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    entropy = 3 * draw(COUNT)
    entropy[14:20] = 1.7
    data = {
        "rewards_advantage": torch.tensor([1.2, -0.7, 0.4, 0.9, -1.1, -0.3, 0.0]).double(),
        "entropy": entropy,
        "delta": delta,
        "lengths": torch.tensor(LENGTHS),
    }
    facts = RolloutFacts(
        has_teacher=torch.tensor([True, True, True, False, True, False, True]),
        is_right=torch.tensor([True, False, True, True, False, False, True]),
        solve_rate=torch.full((7,), 4 / 7),
        teacher_entropy=2 * draw(COUNT),
    )
    return data, facts


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def reference(name: str, settings: MethodSettings, data: dict[str, Any], facts: RolloutFacts) -> list[float]:
    """Return the advantage of each token, written from the formula for one token after the other."""
    weights: list[float] = []
    token = 0
    for rollout, length in enumerate(LENGTHS):
        for _ in range(length):
            if facts.has_teacher[rollout] and not facts.is_right[rollout]:
                weights.append(math.exp(-settings.srpo_beta * facts.teacher_entropy[token].item()))
            token += 1
    mean_weight = sum(weights) / len(weights) if weights else 1.0

    advantages = []
    token = 0
    for rollout, length in enumerate(LENGTHS):
        verifier = settings.verifier_weight * data["rewards_advantage"][rollout].item()
        sign = (verifier > 0) - (verifier < 0)
        taught, right = bool(facts.has_teacher[rollout]), bool(facts.is_right[rollout])
        for place in range(1, length + 1):
            gap = clip(data["delta"][token].item(), -GAP_LIMIT, GAP_LIMIT)
            advantage = verifier
            if name == "sdpo" and taught:
                advantage = verifier + settings.beta * gap
            elif name == "srpo" and taught and not right:
                weight = math.exp(-settings.srpo_beta * facts.teacher_entropy[token].item()) / mean_weight
                advantage = settings.beta * weight * gap
            elif name == "rlsd" and taught:
                weight = clip(math.exp(sign * gap), 1 - settings.rlsd_clip, 1 + settings.rlsd_clip)
                advantage = verifier * ((1 - settings.rlsd_lambda) + settings.rlsd_lambda * weight)
            elif name == "rlrt" and taught and right:
                weight = clip(math.exp(-sign * gap), 1 - settings.rlsd_clip, 1 + settings.rlsd_clip)
                advantage = verifier * ((1 - settings.rlsd_lambda) + settings.rlsd_lambda * weight)
            elif name == "pw_opsd" and taught:
                share = (place - 0.5) / length
                rise = 1 / (1 + math.exp(-(share - settings.position_tau) / settings.position_s))
                weight = settings.position_w_min + (1 - settings.position_w_min) * rise
                advantage = verifier + settings.beta * weight * gap
            elif name == "antisd" and taught:
                advantage = verifier - settings.beta * (math.log(1 + math.exp(gap)) - math.log(2)) / 2
            advantages.append(advantage)
            token += 1
    return advantages


RIVALS = ("sdpo", "srpo", "rlsd", "rlrt", "antisd", "pw_opsd")


@pytest.mark.parametrize("name", RIVALS)
def test_advantages_follow_the_formula(name: str) -> None:
    data, facts = batch()
    advantage, credit = token_advantages(name, SETTINGS, **data, facts=facts)
    want = torch.tensor(reference(name, SETTINGS, data, facts), dtype=torch.float64)
    torch.testing.assert_close(advantage, want, rtol=1e-10, atol=1e-10)
    verifier = 0.8 * data["rewards_advantage"].repeat_interleave(data["lengths"])
    torch.testing.assert_close(credit.advantage_term, want - verifier, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RIVALS)
def test_float32_inputs_give_the_same_numbers(name: str) -> None:
    data, facts = batch()
    single = {key: value if key == "lengths" else value.float() for key, value in data.items()}
    advantage, credit = token_advantages(name, SETTINGS, **single, facts=facts)
    assert advantage.dtype == credit.omega.dtype == torch.float32
    want = token_advantages(name, SETTINGS, **data, facts=facts)[0].float()
    torch.testing.assert_close(advantage, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RIVALS)
def test_without_beta_and_lambda_the_verifier_remains_where_the_teacher_does_not_replace_it(name: str) -> None:
    data, facts = batch()
    advantage, _ = token_advantages(name, replace(SETTINGS, beta=0.0, rlsd_lambda=0.0), **data, facts=facts)
    verifier = 0.8 * data["rewards_advantage"].repeat_interleave(data["lengths"])
    replaced = (facts.has_teacher & ~facts.is_right).repeat_interleave(data["lengths"])
    assert torch.equal(advantage, torch.where(replaced, 0.0, verifier) if name == "srpo" else verifier)


def test_the_distributional_objective_leaves_routing_to_the_verifier_factor() -> None:
    data, facts = batch()
    settings = replace(SETTINGS, objective="distributional")
    advantage, credit = token_advantages("srpo", settings, **data, facts=facts)
    taught = (facts.has_teacher & ~facts.is_right).repeat_interleave(data["lengths"])
    verifier = 0.8 * data["rewards_advantage"].repeat_interleave(data["lengths"])
    assert torch.equal(advantage, torch.where(taught, 0.0, verifier))
    assert torch.equal(credit.omega, token_advantages("srpo", SETTINGS, **data, facts=facts)[1].omega)
    assert (credit.omega[~taught] == 0).all()


def test_srpo_weights_have_a_mean_of_one_over_all_replicas() -> None:
    data, facts = batch()
    whole = token_advantages("srpo", SETTINGS, **data, facts=facts)[1].omega
    taught = (facts.has_teacher & ~facts.is_right).repeat_interleave(data["lengths"])
    assert whole[taught].mean().item() == pytest.approx(1.0)

    parts, totals = [], []
    for rollouts, tokens in ((slice(0, 4), slice(0, 14)), (slice(4, 7), slice(14, COUNT))):
        part = {key: data[key][rollouts] for key in ("rewards_advantage", "lengths")}
        part |= {key: data[key][tokens] for key in ("entropy", "delta")}
        known = RolloutFacts(*(fact[rollouts] for fact in facts[:3]), facts.teacher_entropy[tokens])
        parts.append((part, known))

    def collect(sums: torch.Tensor) -> torch.Tensor:
        totals.append(sums)
        return sums

    for part, known in parts:
        token_advantages("srpo", SETTINGS, **part, facts=known, sum_over_replicas=collect)
    total = sum(totals)
    omegas = [
        token_advantages("srpo", SETTINGS, **part, facts=known, sum_over_replicas=lambda _: total)[1].omega
        for part, known in parts
    ]
    torch.testing.assert_close(torch.cat(omegas), whole)


def test_srpo_without_a_wrong_rollout_is_grpo() -> None:
    data, facts = batch()
    facts = facts._replace(is_right=torch.ones(7, dtype=torch.bool))
    advantage, credit = token_advantages("srpo", SETTINGS, **data, facts=facts)
    assert torch.equal(advantage, token_advantages("grpo", SETTINGS, **data)[0]) and not credit.omega.any()


def test_antisd_bounds_the_push_for_tokens_that_the_teacher_rules_out() -> None:
    data, facts = batch()
    data["delta"][:] = -math.inf
    credit = token_advantages("antisd", SETTINGS, **data, facts=facts)[1]
    taught = facts.has_teacher.repeat_interleave(data["lengths"])
    assert credit.advantage_term[taught].numpy() == pytest.approx(0.7 * math.log(2) / 2, rel=1e-6)
    assert not credit.advantage_term[~taught].any()


@pytest.mark.parametrize("name", ["rlsd", "rlrt"])
def test_the_blend_never_turns_the_verifier_nor_passes_its_clip(name: str) -> None:
    data, facts = batch()
    settings = replace(SETTINGS, rlsd_clip=1.0, rlsd_lambda=1.0)
    advantage, _ = token_advantages(name, settings, **data, facts=facts)
    verifier = 0.8 * data["rewards_advantage"].repeat_interleave(data["lengths"])
    assert (advantage * verifier >= 0).all() and (advantage.abs() <= 2 * verifier.abs()).all()


def test_facts_of_tokens_without_a_teacher_are_not_read() -> None:
    data, facts = batch()
    other = {"delta": data["delta"].clone(), "teacher_entropy": facts.teacher_entropy.clone()}
    without = ~facts.has_teacher.repeat_interleave(data["lengths"])
    other["delta"][without] = 11.0
    other["teacher_entropy"][without] = math.nan
    for name, method in METHODS.items():
        changed = facts._replace(teacher_entropy=other["teacher_entropy"])
        want = token_advantages(name, SETTINGS, **data, facts=facts)
        got = token_advantages(name, SETTINGS, **data | {"delta": other["delta"]}, facts=changed)
        assert torch.equal(got[0], want[0]), method
        assert torch.equal(got[1].omega, want[1].omega), method
