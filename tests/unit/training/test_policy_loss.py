"""The loss of a policy update against plain loops over responses and tokens, in value and gradient: every surrogate,
aggregation and level of rejection, over replicas and micro-batches; and what is rejected acts on nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig
from dasd_megatron.losses import (
    AGGREGATIONS,
    REJECTIONS,
    SURROGATES,
    TokenStats,
    aggregation_weights,
    count_trained,
    reject,
)
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets, policy_loss

MAX_TOKENS = 40
ALGORITHM = AlgorithmConfig(beta=1.0, scale_floor=0.5, divergence_weight=0.7, divergence_cap=1.0)
# Wide enough that each level of rejection keeps some responses and leaves out others.
BOUNDS = {"none": (None, None), "token": (0.8, 1.3), "sequence": (0.5, 2.0), "geometric": (0.9, 1.1)}


class Batch(NamedTuple):
    """Packed tokens of responses, float64; ``divergence`` and ``log_prob`` get gradients."""

    lengths: list[int]
    log_prob: Tensor
    old: Tensor
    engine: Tensor
    advantage: Tensor
    start: Tensor
    omega: Tensor
    divergence: Tensor


def draw(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (12,), generator=generator).tolist()
    noise = [torch.randn(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(7)]
    # Numbers that float32 has too, so that both precisions start from the same ones.
    noise = [values.float().double() for values in noise]
    old = -noise[0].abs()
    return Batch(
        lengths,
        log_prob=(old + 0.3 * noise[1]).float().double(),
        old=old,
        engine=(old + 0.2 * noise[2]).float().double(),
        advantage=noise[3],
        start=(old + 0.3 * noise[4]).float().double(),
        omega=noise[5].clamp(-1, 1),
        divergence=noise[6].abs(),
    )


def plain_kept(batch: Batch, level: str, veto: float | None) -> list[list[bool]]:
    low, high = BOUNDS[level]
    kept, place = [], 0
    for length in batch.lengths:
        ratios = [math.exp(batch.old[i] - batch.engine[i]) for i in range(place, place + length)]
        place += length
        compared = {
            "none": [1.0] * length,
            "token": ratios,
            "sequence": [math.prod(ratios)] * length,
            "geometric": [math.prod(ratios) ** (1 / length)] * length,
        }[level]
        vetoed = veto is not None and any(ratio < veto for ratio in ratios)
        kept.append([not vetoed and (level == "none" or low <= ratio <= high) for ratio in compared])
    return kept


def plain_surrogate(
    name: str, log_prob: float, ratio: float, response_ratio: float, advantage: float
) -> tuple[float, float]:
    """The surrogate and its derivative by the token's log-prob."""
    if name == "cispo":
        weight = min(ratio, 5.0)
        return -weight * advantage * log_prob, -weight * advantage
    ratio = ratio if name == "ppo" else response_ratio
    low, high = (0.8, 1.28) if name == "ppo" else (1 - 3e-4, 1 + 4e-4)
    clipped = min(max(ratio, low), high)
    if clipped * advantage < ratio * advantage:
        return -clipped * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def plain_loss(
    batch: Batch, kept: list[list[bool]], settings: PolicyLossConfig
) -> tuple[float, list[float], list[float]]:
    """The loss of the whole batch and its derivatives by each log-prob and each divergence."""
    trained = [sum(flags) for flags in kept]
    responses = sum(count > 0 for count in trained)
    total, by_log_prob, by_divergence, place = 0.0, [], [], 0
    for length, flags, count in zip(batch.lengths, kept, trained, strict=True):
        places = range(place, place + length)
        place += length
        response_ratio = math.exp(sum(float(batch.log_prob[i] - batch.old[i]) for i in places) / length)
        for i, flag in zip(places, flags, strict=True):
            log_prob, omega, divergence = float(batch.log_prob[i]), float(batch.omega[i]), float(batch.divergence[i])
            loss, slope = plain_surrogate(
                settings.surrogate,
                log_prob,
                math.exp(log_prob - batch.old[i]),
                response_ratio,
                float(batch.advantage[i]),
            )
            gap = float(batch.start[i]) - log_prob
            loss += settings.kl_coef * (math.exp(gap) - 1 - gap)
            slope += settings.kl_coef * (1 - math.exp(gap))
            capped = omega < 0 and divergence >= 1.0
            loss += 0.7 * omega * (1.0 if capped else divergence)
            divisor = {
                "token_mean": sum(trained),
                "seq_mean_token_mean": responses * count,
                "seq_mean_token_sum_norm": responses * MAX_TOKENS,
            }[settings.aggregation]
            share = 1 / divisor if flag else 0.0
            total += share * loss
            by_log_prob.append(share * slope)
            by_divergence.append(0.0 if capped else share * 0.7 * omega)
    return total, by_log_prob, by_divergence


def computed(
    batch: Batch, settings: PolicyLossConfig, dtype: torch.dtype, *, replicas: int = 2
) -> tuple[float, Tensor, Tensor]:
    """The same from the code: replicas with some responses each, micro-batches of neighbours in another order."""
    lengths = torch.tensor(batch.lengths)
    owners = torch.arange(len(lengths)) % replicas
    token_owner = owners.repeat_interleave(lengths)
    log_prob, divergence = (
        batch.log_prob.to(dtype, copy=True).requires_grad_(),
        batch.divergence.to(dtype, copy=True).requires_grad_(),
    )
    parts = []
    for replica in range(replicas):
        mine = lengths[owners == replica]
        tokens = token_owner == replica
        rejected = reject(
            batch.old[tokens], batch.engine[tokens], mine,
            level=settings.rejection, low=settings.rejection_low, high=settings.rejection_high,
            veto=settings.rejection_veto,
        )  # fmt: skip
        kept = rejected.kept if settings.rejects else None
        parts.append((mine, tokens, kept, *count_trained(mine, kept)))
    counts = torch.stack([part[-1] for part in parts]).sum(0)
    total = torch.zeros((), dtype=dtype)
    for mine, tokens, kept, trained, _ in parts:
        weight = aggregation_weights(
            mine, kept, trained, counts, aggregation=settings.aggregation, max_tokens=MAX_TOKENS
        )
        targets = PolicyTargets(
            batch.old[tokens].to(dtype), batch.advantage[tokens].to(dtype), weight, mine, batch.start[tokens].to(dtype),
            Distillation(batch.omega[tokens].to(dtype), torch.ones_like(tokens[tokens]), None, ALGORITHM),
        )  # fmt: skip
        token_loss = policy_loss(targets, settings)
        places = list(reversed(torch.arange(int(mine.sum())).split(mine.tolist())))
        for first in range(0, len(places), 2):
            index = torch.cat(places[first : first + 2])
            stats = TokenStats(log_prob[tokens][index], log_prob[tokens][index], None, divergence[tokens][index])
            loss, sums = token_loss(stats, index)
            assert torch.equal(sums["loss"], loss)
            total = total + loss
    total = total / len(token_owner)
    total.backward()
    return float(total.detach()), log_prob.grad, divergence.grad


@pytest.fixture
def seed() -> int:
    return torch.seed() % 2**31


@pytest.mark.parametrize("level", ["none", *REJECTIONS])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_value_and_gradients_are_those_of_plain_loops(seed: int, surrogate: str, aggregation: str, level: str) -> None:
    low, high = BOUNDS[level]
    settings = PolicyLossConfig(
        surrogate=surrogate, aggregation=aggregation, kl_coef=0.3, rejection=level, rejection_low=low,
        rejection_high=high, rejection_veto=0.7 if seed % 2 else None,
    )  # fmt: skip
    batch = draw(seed)
    kept = plain_kept(batch, level, settings.rejection_veto)
    value, by_log_prob, by_divergence = plain_loss(batch, kept, settings)
    # Weights are float32 in both.
    for dtype, tolerance, least in ((torch.float64, 1e-6, 1e-12), (torch.float32, 1e-5, 1e-7)):
        got, *gradients = computed(batch, settings, dtype)
        assert got == pytest.approx(value, rel=tolerance, abs=tolerance), f"seed {seed}"
        for gradient, wanted in zip(gradients, (by_log_prob, by_divergence), strict=True):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            torch.testing.assert_close(
                gradient.double(), wanted, rtol=tolerance, atol=least, msg=lambda m: f"seed {seed}: {m}"
            )
            assert not gradient[~torch.tensor(sum(kept, []))].any(), f"seed {seed}"


def test_replicas_do_not_change_what_is_averaged(seed: int) -> None:
    batch = draw(seed)
    for aggregation in AGGREGATIONS:
        settings = PolicyLossConfig(surrogate="gspo", aggregation=aggregation, rejection="token", kl_coef=0.3)
        whole, parts = (computed(batch, settings, torch.float64, replicas=replicas) for replicas in (1, 3))
        assert whole[0] == pytest.approx(parts[0], rel=1e-6), f"seed {seed}"
        torch.testing.assert_close(whole[1], parts[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_batch_that_is_rejected_wholly_has_no_gradient(surrogate: str, aggregation: str) -> None:
    batch = draw(3)._replace(engine=torch.full_like(draw(3).engine, -50.0))
    settings = PolicyLossConfig(surrogate=surrogate, aggregation=aggregation, rejection="token", kl_coef=0.3)
    value, by_log_prob, by_divergence = computed(batch, settings, torch.float32)
    assert value == 0.0 and not by_log_prob.any() and not by_divergence.any()


def test_a_mean_over_tokens_weighs_each_of_them_by_exactly_one() -> None:
    """So that a run without rejection has the bits that it has without weights."""
    lengths = torch.tensor([3, 1, 7])
    trained, counts = count_trained(lengths)
    counts += torch.tensor([1000, 1000, 8])
    weights = aggregation_weights(lengths, None, trained, counts, aggregation="token_mean", max_tokens=9)
    assert weights.dtype == torch.float32 and weights.tolist() == [1.0] * 11


def test_reports_are_means_over_all_tokens_whatever_they_weigh() -> None:
    batch = draw(5)
    lengths = torch.tensor(batch.lengths)
    sums = []
    for weight in (torch.ones(len(batch.old)), torch.zeros(len(batch.old))):
        targets = PolicyTargets(batch.old, batch.advantage, weight, lengths, batch.start)
        token_loss = policy_loss(targets, PolicyLossConfig(kl_coef=0.3))
        sums.append(token_loss(TokenStats(batch.log_prob, batch.old, None, None), torch.arange(len(batch.old)))[1])
    assert sums[0]["loss"] != 0 and sums[1]["loss"] == 0
    assert sums[0]["clip_share"] == sums[1]["clip_share"] > 0 and sums[0]["kl_to_start"] == sums[1]["kl_to_start"] > 0
