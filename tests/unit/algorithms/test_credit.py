"""Direction-adaptive credit against a loop over rollouts with torch.quantile, and every edge case."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.algorithms import (
    GAP_LIMIT,
    Credit,
    NonFiniteTokenError,
    context_parallel_credit,
    direction_adaptive_credit,
    gather_packed_tokens,
)


def loop_credit(
    entropy: Tensor,
    delta: Tensor,
    lengths: list[int],
    rho=0.2,
    quantile_side="upper",
    beta=0.02,
    scale_floor=1.0,
    entropy_floor=0.3,
    eps=1e-6,
    gate=True,
) -> Credit:
    parts: list[list[Tensor]] = [[], [], [], [], []]
    for h, d in zip(entropy.double().split(lengths), delta.double().split(lengths), strict=True):
        if len(h) == 0:
            parts[2].append(torch.zeros(1).double())
            parts[3].append(torch.zeros(1).double())
            continue
        d = d.clamp(-20, 20)
        tau = torch.quantile(h, 1 - rho if quantile_side == "upper" else rho).clamp(min=entropy_floor)
        sigma = (h - h.mean()).abs().mean()
        delta_bar = d / max(d.abs().mean().item(), scale_floor, eps)
        omega = torch.tanh((tau - h) / max(sigma.item(), eps))
        if gate:
            omega = omega * torch.sigmoid(delta_bar.abs() - 1)
        for part, value in zip(
            parts, (omega, delta_bar, tau[None], sigma[None], beta * omega * delta_bar), strict=True
        ):
            part.append(value)
    return Credit(*(torch.cat(part) if part else torch.zeros(0).double() for part in parts))


def assert_same(got: Credit, want: Credit, rtol: float, atol: float) -> None:
    for name, a, b in zip(Credit._fields, got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@given(
    lengths=st.lists(st.integers(0, 12), max_size=8),
    rho=st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1)),
    quantile_side=st.sampled_from(["upper", "lower"]),
    beta=st.floats(0, 2),
    scale_floor=st.sampled_from([0.0, 0.1, 5.0]),
    entropy_floor=st.sampled_from([0.0, 0.3, 2.0, 10.0]),
    gate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_property_matches_the_loop(
    lengths, rho, quantile_side, beta, scale_floor, entropy_floor, gate, dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = (torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 4).to(dtype)
    delta = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).to(dtype) * 2
    arguments = dict(
        rho=rho,
        quantile_side=quantile_side,
        beta=beta,
        scale_floor=scale_floor,
        entropy_floor=entropy_floor,
        gate=gate,
    )
    got = direction_adaptive_credit(entropy, delta, torch.tensor(lengths, dtype=torch.int64), **arguments)
    precise = dtype == torch.float64
    assert all(value.dtype == (torch.float64 if precise else torch.float32) for value in got)
    # For float64 entropies the sort resolves float32; a tie there shifts a quantile by 1e-7 at most.
    assert_same(got, loop_credit(entropy, delta, lengths, **arguments), rtol=1e-6, atol=1e-6)
    assert (got.omega.abs() <= 1).all()


@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    rho=st.floats(0, 1),
    quantile_side=st.sampled_from(["upper", "lower"]),
    floor=st.sampled_from([0.0, 0.3, 1.0]),
    spread=st.sampled_from([0.0, 1e-7, 0.1, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_property_no_token_at_or_below_the_floor_is_pushed(
    lengths, rho, quantile_side, floor, spread, dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Around the floor, closely or widely, so that both sides of it occur.
    entropy = (floor + spread * (torch.rand(sum(lengths), generator=generator) - 0.5)).to(dtype)
    delta = torch.randn(sum(lengths), generator=generator) * 3
    arguments = dict(rho=rho, quantile_side=quantile_side, entropy_floor=floor)
    credit = direction_adaptive_credit(entropy, delta, torch.tensor(lengths, dtype=torch.int64), **arguments)
    certain = entropy.double() <= floor
    assert (credit.omega[certain] >= 0).all()
    # Its term moves the token to where the teacher wants it, never away.
    assert (credit.advantage_term[certain] * delta[certain] >= 0).all()


def test_the_floor_of_the_entropy_turns_pushes_into_pulls_where_the_policy_is_certain() -> None:
    entropy = torch.tensor([0.01, 0.02, 0.01, 0.03, 0.25])
    delta, lengths = torch.ones(5), torch.tensor([5])
    relative = direction_adaptive_credit(entropy, delta, lengths, entropy_floor=0.0)
    assert relative.omega[4] < -0.1 and relative.tau < 0.1
    floored = direction_adaptive_credit(entropy, delta, lengths, entropy_floor=0.3)
    assert (floored.omega > 0).all() and floored.tau == pytest.approx(0.3)
    # A fork in the same response is pushed, and the floor changes nothing where the quantile lies above it.
    entropy[4] = 0.9
    assert (direction_adaptive_credit(entropy, delta, lengths, entropy_floor=0.3).omega < 0).tolist() == [False] * 4 + [
        True
    ]
    for floor in (0.0, 0.3):
        uncertain = direction_adaptive_credit(entropy + 1, delta, lengths, entropy_floor=floor)
        torch.testing.assert_close(uncertain.tau, torch.quantile(entropy + 1, 0.8)[None])


def test_equal_and_repeated_entropies_match_torch_quantile() -> None:
    entropy = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 0.0, -0.0, 1e-30, 3.0])
    delta = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for side in ("upper", "lower"):
        got = direction_adaptive_credit(entropy, delta, torch.tensor([5, 4]), quantile_side=side)
        assert_same(got, loop_credit(entropy, delta, [5, 4], quantile_side=side), rtol=1e-6, atol=1e-7)


def test_slightly_negative_entropies_sort_below_zero() -> None:
    entropy = torch.tensor([-1e-7, 0.5, -2e-7, 0.0])
    got = direction_adaptive_credit(
        entropy, torch.ones(4), torch.tensor([4]), rho=0.9, quantile_side="lower", entropy_floor=0.0
    )
    torch.testing.assert_close(got.tau, torch.quantile(entropy, 0.9)[None], rtol=1e-6, atol=0)


def test_the_sides_push_what_they_say() -> None:
    entropy = torch.arange(10.0)
    credit = {
        side: direction_adaptive_credit(entropy, torch.ones(10), torch.tensor([10]), quantile_side=side)
        for side in ("upper", "lower")
    }
    assert (credit["upper"].omega < 0).tolist() == [False] * 8 + [True] * 2
    assert (credit["lower"].omega < 0).tolist() == [False] * 2 + [True] * 8


def test_one_token_and_constant_entropy_add_nothing_above_the_floor() -> None:
    entropy, delta, lengths = (
        torch.tensor([1.7, 0.3, 0.3, 0.3]),
        torch.tensor([2.0, 1.0, -4.0, 0.5]),
        torch.tensor([1, 3]),
    )
    credit = direction_adaptive_credit(entropy, delta, lengths, entropy_floor=0.25, scale_floor=0.0)
    assert credit.omega.tolist() == [0.0] * 4 and credit.advantage_term.abs().sum() == 0
    torch.testing.assert_close(credit.tau, torch.tensor([1.7, 0.3]))
    torch.testing.assert_close(credit.sigma, torch.zeros(2))
    assert credit.delta_bar[0] == 1.0
    # Below the floor there is no spread to measure the distance by: everything is pulled.
    pulled = direction_adaptive_credit(entropy, delta, lengths, entropy_floor=2.0, gate=False)
    assert pulled.omega.tolist() == [1.0] * 4 and pulled.tau.tolist() == [2.0, 2.0]


def test_all_gaps_zero() -> None:
    credit = direction_adaptive_credit(torch.rand(5), torch.zeros(5), torch.tensor([5]))
    assert (
        credit.delta_bar.tolist() == [0.0] * 5
        and credit.advantage_term.abs().sum() == 0
        and torch.isfinite(credit.omega).all()
    )


def test_the_scale_floor_keeps_noise_small() -> None:
    delta = torch.tensor([1e-4, -1e-4, 2e-4])
    entropy = torch.tensor([0.1, 0.2, 0.9])
    free = direction_adaptive_credit(entropy, delta, torch.tensor([3]), scale_floor=0.0)
    assert free.delta_bar.abs().mean() == pytest.approx(1.0)
    # By default there is a floor.
    torch.testing.assert_close(direction_adaptive_credit(entropy, delta, torch.tensor([3])).delta_bar, delta)
    floored = direction_adaptive_credit(entropy, delta, torch.tensor([3]), scale_floor=0.5)
    torch.testing.assert_close(floored.delta_bar, delta / 0.5)
    # Above the floor it changes nothing.
    for floor in (0.0, 0.5):
        large = direction_adaptive_credit(entropy, delta * 1e4, torch.tensor([3]), scale_floor=floor)
        torch.testing.assert_close(large.delta_bar, delta / delta.abs().mean())


def test_a_gap_without_bound_counts_as_the_limit() -> None:
    entropy = torch.rand(4)
    lengths = torch.tensor([4])
    infinite = direction_adaptive_credit(entropy, torch.tensor([-math.inf, 0.5, math.inf, -0.1]), lengths)
    bounded = direction_adaptive_credit(entropy, torch.tensor([-GAP_LIMIT, 0.5, GAP_LIMIT, -0.1]), lengths)
    assert all(torch.isfinite(value).all() for value in infinite)
    assert_same(infinite, bounded, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    credit = direction_adaptive_credit(torch.zeros(0), torch.zeros(0), torch.tensor(lengths, dtype=torch.int64))
    assert [tuple(value.shape) for value in credit] == [(0,), (0,), (len(lengths),), (len(lengths),), (0,)]
    assert credit.tau.tolist() == [0.0] * len(lengths)


def test_nothing_carries_a_gradient() -> None:
    entropy, delta = torch.rand(6, requires_grad=True), torch.randn(6, requires_grad=True)
    assert not any(value.requires_grad for value in direction_adaptive_credit(entropy, delta, torch.tensor([2, 4])))


def test_rollouts_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    lengths = [5, 0, 1, 9, 4]
    entropy, delta = torch.rand(19, generator=generator), torch.randn(19, generator=generator)
    together = direction_adaptive_credit(entropy, delta, torch.tensor(lengths))
    order = [3, 1, 4, 0, 2]
    entropies, deltas = entropy.split(lengths), delta.split(lengths)
    permuted = direction_adaptive_credit(
        torch.cat([entropies[i] for i in order]),
        torch.cat([deltas[i] for i in order]),
        torch.tensor([lengths[i] for i in order]),
    )
    for name in ("omega", "delta_bar", "advantage_term"):
        assert torch.equal(
            getattr(permuted, name), torch.cat([getattr(together, name).split(lengths)[i] for i in order])
        ), name
    assert torch.equal(permuted.tau, together.tau[order]) and torch.equal(permuted.sigma, together.sigma[order])


def test_a_long_rollout_keeps_its_precision() -> None:
    entropy, delta = torch.rand(300_000) + 3, torch.randn(300_000)
    lengths = [200_000, 100_000]
    # torch.quantile refuses more than 16 million elements, and is exact here in float64.
    assert_same(
        direction_adaptive_credit(entropy, delta, torch.tensor(lengths)),
        loop_credit(entropy, delta, lengths),
        rtol=2e-6,
        atol=2e-6,
    )


@pytest.mark.parametrize("bad", [("entropy", math.nan), ("entropy", math.inf), ("delta", math.nan)])
def test_numbers_that_are_none_are_named(bad: tuple[str, float]) -> None:
    tensors = {"entropy": torch.rand(6), "delta": torch.randn(6)}
    tensors[bad[0]][4] = bad[1]
    with pytest.raises(NonFiniteTokenError, match=r"token 4 of the pack \(rollout 2\)"):
        direction_adaptive_credit(tensors["entropy"], tensors["delta"], torch.tensor([3, 0, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": torch.rand(2, 2)}, r"entropy has shape \(2, 2\)"),
        ({"delta": torch.rand(3)}, r"delta \(3,\)"),
        ({"delta": torch.ones(4, dtype=torch.int64)}, "delta torch.int64"),
        ({"lengths": torch.tensor([2, 1])}, "lengths sum to 3"),
        ({"lengths": torch.tensor([5, -1])}, "the least is -1"),
        ({"lengths": torch.tensor([4.0])}, "torch.float32"),
        ({"rho": 1.2}, "rho is 1.2"),
        ({"quantile_side": "top"}, "quantile_side is 'top'"),
        ({"scale_floor": -1.0}, "scale_floor is -1.0"),
        ({"entropy_floor": -0.1}, "entropy_floor is -0.1"),
        ({"entropy_floor": math.inf}, "entropy_floor is inf"),
        ({"entropy_floor": math.nan}, "entropy_floor is nan"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {"entropy": torch.rand(4), "delta": torch.rand(4), "lengths": torch.tensor([4])} | change
    with pytest.raises(ValueError, match=message):
        direction_adaptive_credit(
            arguments.pop("entropy"), arguments.pop("delta"), arguments.pop("lengths"), **arguments
        )


def test_the_form_for_shards_agrees_on_one_process() -> None:
    entropy, delta, lengths = torch.rand(7), torch.randn(7), torch.tensor([3, 4])
    positions = torch.randperm(7)
    whole = direction_adaptive_credit(entropy, delta, lengths, beta=0.3)
    shard = context_parallel_credit(entropy[positions], delta[positions], lengths, positions, group=None, beta=0.3)
    for name in ("omega", "delta_bar", "advantage_term"):
        assert torch.equal(getattr(shard, name), getattr(whole, name)[positions])
    assert torch.equal(shard.tau, whole.tau)


@pytest.mark.parametrize(
    ("positions", "message"),
    [([0, 1, 1], "place 1 is held 2 times"), ([0, 1, 3], "place 2 is held 0 times"), ([0, 1], r"expected \[K, n\]")],
)
def test_gathering_refuses_positions_that_do_not_cover(positions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_packed_tokens(torch.randn(2, 3), torch.tensor(positions), 3, None)
