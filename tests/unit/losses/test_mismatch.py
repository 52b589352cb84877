"""Importance weights and rejection between trainer and rollout engine against the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.losses import REJECTIONS, importance_weights, reject


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), cap=st.floats(0.1, 5.0), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=60, deadline=None)
def test_importance_weights_are_the_plain_formulas(lengths: list[int], cap: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trainer, engine = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    rollouts = list(zip(trainer.split(lengths), engine.split(lengths), strict=True))
    token = [math.exp(p - m) for ps, ms in rollouts for p, m in zip(ps.tolist(), ms.tolist(), strict=True)]
    sequence = [
        math.prod(math.exp(p - m) for p, m in zip(ps.tolist(), ms.tolist(), strict=True))
        for ps, ms in rollouts
        for _ in ps
    ]
    for level, ratios in (("token", token), ("sequence", sequence)):
        weights, cut = importance_weights(trainer, engine, torch.tensor(lengths), level=level, cap=cap)
        torch.testing.assert_close(weights, torch.tensor([min(ratio, cap) for ratio in ratios], dtype=torch.float64))
        clear = [abs(ratio - cap) > 1e-9 for ratio in ratios]
        assert [value for value, sure in zip(cut.tolist(), clear, strict=True) if sure] == [
            ratio > cap for ratio, sure in zip(ratios, clear, strict=True) if sure
        ]


def test_importance_weights_correct_the_expectation() -> None:
    """Uncapped and over many samples of the engine's distribution, they give the trainer's mean."""
    generator = torch.Generator().manual_seed(0)
    engine, trainer = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    value = torch.randn(7, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=generator)
    weights, _ = importance_weights(
        trainer[drawn], engine[drawn], torch.ones(len(drawn), dtype=torch.int64), level="token", cap=1e9
    )
    assert abs((weights * value[drawn]).mean() - (trainer.exp() * value).sum()) < 0.02


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"level": "word"}, "level"), ({"cap": 0.0}, "cap"), ({"lengths": torch.tensor([2])}, "lengths sum to 2")],
)
def test_importance_weights_refuse(changes: dict, named: str) -> None:
    arguments = {"lengths": torch.tensor([1, 2]), "level": "token", "cap": 2.0} | changes
    with pytest.raises(ValueError, match=named):
        importance_weights(torch.zeros(3), torch.zeros(3), arguments.pop("lengths"), **arguments)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    low=st.floats(0.0, 1.0),
    high=st.floats(1.0, 5.0),
    veto=st.one_of(st.none(), st.floats(1e-4, 0.9)),
    level=st.sampled_from(["none", *REJECTIONS]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=150, deadline=None)
def test_rejection_is_the_plain_comparison(
    lengths: list[int], low: float, high: float, veto: float | None, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trainer, engine = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    kept, vetoed, clear = [], [], []
    for ps, ms in zip(trainer.split(lengths), engine.split(lengths), strict=True):
        ratios = [math.exp(p - m) for p, m in zip(ps.tolist(), ms.tolist(), strict=True)]
        product = math.prod(ratios)
        compared = {
            "none": [1.0] * len(ratios),
            "token": ratios,
            "sequence": [product] * len(ratios),
            "geometric": [product ** (1 / len(ratios))] * len(ratios),
        }[level]
        vetoed.append(veto is not None and min(ratios) < veto)
        kept += [not vetoed[-1] and (level == "none" or low <= ratio <= high) for ratio in compared]
        clear += [min(abs(ratio - bound) for bound in (low, high)) > 1e-9 for ratio in compared]
    result = reject(trainer, engine, torch.tensor(lengths), level=level, low=low, high=high, veto=veto)
    assert result.vetoed.tolist() == vetoed
    pairs = zip(result.kept.tolist(), kept, clear, strict=True)
    assert all(found == wanted for found, wanted, sure in pairs if sure)


def test_equal_probabilities_are_kept_at_every_level_by_its_own_bounds() -> None:
    log_prob, lengths = -torch.rand(5), torch.tensor([2, 3])
    for level in ("none", *REJECTIONS):
        assert reject(log_prob, log_prob, lengths, level=level, veto=0.99).kept.all()
        far = reject(log_prob, log_prob - 3.0, lengths, level=level)
        assert far.kept.all() == (level == "none") and not far.vetoed.any()


def test_a_ratio_that_is_not_a_number_is_rejected() -> None:
    log_prob = torch.tensor([-1.0, math.nan, -1.0])
    lengths = torch.tensor([2, 1])
    assert reject(log_prob, -torch.ones(3), lengths, level="token").kept.tolist() == [True, False, True]
    assert reject(log_prob, -torch.ones(3), lengths, level="none", veto=0.5).kept.tolist() == [False, False, True]


def test_rejection_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"rollout_log_prob \(2,\)"):
        reject(torch.zeros(3), torch.zeros(2), torch.tensor([3]), level="token")
    with pytest.raises(ValueError, match="lengths sum to 2"):
        reject(torch.zeros(3), torch.zeros(3), torch.tensor([2]), level="token")
