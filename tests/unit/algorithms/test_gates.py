"""Push gates and the bound of the teacher's term against plain loops in float64, and every edge case."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.algorithms import (
    PUSH_GATES,
    MethodSettings,
    RolloutFacts,
    direction_adaptive_credit,
    token_advantages,
)

SETTINGS = MethodSettings(
    verifier_weight=1.0,
    beta=0.3,
    rho=0.3,
    quantile_side="upper",
    scale_floor=0.5,
    gate=True,
    rlsd_clip=0.2,
    entropy_floor=0.2,
)


def batch(lengths: list[int], seed: int, groups: int = 2) -> tuple[dict[str, Any], RolloutFacts]:
    """Return inputs of ``token_advantages`` in float64, and facts of rollouts that lie in ``groups`` groups."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rollouts = sum(lengths), len(lengths)
    right = torch.rand(rollouts, generator=generator) < 0.5
    group = torch.randint(0, groups, (rollouts,), generator=generator)
    rates = [float(right[group == own].double().mean()) for own in group]
    data = {
        "rewards_advantage": torch.randn(rollouts, generator=generator, dtype=torch.float64),
        "entropy": torch.rand(tokens, generator=generator, dtype=torch.float64) * 2,
        "delta": torch.randn(tokens, generator=generator, dtype=torch.float64) * 2,
        "lengths": torch.tensor(lengths, dtype=torch.int64),
    }
    facts = RolloutFacts(
        has_teacher=torch.rand(rollouts, generator=generator) < 0.8,
        is_right=right,
        solve_rate=torch.tensor(rates, dtype=torch.float32),
        teacher_entropy=torch.rand(tokens, generator=generator, dtype=torch.float64) * 3,
    )
    return data, facts


def loop_factor(gate: str, entropy: float, gap: float, teacher_entropy: float, right: bool, rate: float) -> float:
    """Return the factor on the push of one token."""
    if gate == "group":
        return rate
    if gate == "teacher_entropy":
        return 1.0 if entropy <= 0 else min(max(2 * teacher_entropy / max(entropy, 1e-6), 0.0), 1.0)
    if rate == 1.0:
        return 1.0
    # A push adds to the advantage of a token with a negative gap.
    if gap < 0:
        return float(right)
    return float(not right and rate > 0)


@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    gate=st.sampled_from(sorted(PUSH_GATES)),
    name=st.sampled_from(["dasd", "reversed"]),
    pulls=st.booleans(),
    clip=st.sampled_from([None, 0.01, 0.2, 100.0]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_property_a_gate_scales_pushes_alone_and_the_bound_cuts_both(lengths, gate, name, pulls, clip, seed) -> None:
    data, facts = batch(lengths, seed)
    _, plain = token_advantages(name, SETTINGS, **data, facts=facts)
    chosen = replace(SETTINGS, push_gate=gate, push_gate_pulls=pulls, term_clip=clip)
    advantage, gated = token_advantages(name, chosen, **data, facts=facts)
    token = 0
    for rollout, length in enumerate(lengths):
        for _ in range(length):
            omega = plain.omega[token].item()
            if omega < 0:
                factor = loop_factor(
                    gate,
                    data["entropy"][token].item(),
                    data["delta"][token].item(),
                    facts.teacher_entropy[token].item(),
                    bool(facts.is_right[rollout]),
                    facts.solve_rate[rollout].item(),
                )
                omega *= 2 * factor - 1 if pulls else factor
            term = 0.3 * omega * plain.delta_bar[token].item()
            if clip is not None:
                term = min(max(term, -clip), clip)
            assert gated.omega[token].item() == pytest.approx(omega, rel=1e-9, abs=1e-12)
            assert gated.advantage_term[token].item() == pytest.approx(term, rel=1e-9, abs=1e-12)
            want = data["rewards_advantage"][rollout].item() + term
            assert advantage[token].item() == pytest.approx(want, rel=1e-9, abs=1e-12)
            token += 1
    assert torch.equal(gated.delta_bar, plain.delta_bar) and torch.equal(gated.tau, plain.tau)


@pytest.mark.parametrize("gate", sorted(PUSH_GATES))
def test_factors_stay_from_0_to_1_whatever_the_numbers(gate: str) -> None:
    data, facts = batch([3, 0, 1, 4], 1)
    # Certain students, a gap without bound, a teacher's entropy that rounding made negative.
    data["entropy"][:3] = torch.tensor([0.0, -1e-7, 5.0])
    data["delta"][:3] = torch.tensor([-math.inf, math.inf, 0.0])
    facts = facts._replace(teacher_entropy=torch.full((8,), -1e-7), has_teacher=torch.ones(4, dtype=torch.bool))
    plain = token_advantages("reversed", SETTINGS, **data, facts=facts)[1].omega
    gated = token_advantages("reversed", replace(SETTINGS, push_gate=gate), **data, facts=facts)[1].omega
    assert (gated <= 0).all() and (gated >= plain).all() and torch.isfinite(gated).all()


def test_rollouts_without_a_teacher_do_not_read_its_entropy() -> None:
    data, facts = batch([3, 4], 2)
    has_teacher = torch.tensor([True, False])
    broken = facts.teacher_entropy.clone()
    broken[3:] = math.nan
    facts = facts._replace(has_teacher=has_teacher, teacher_entropy=broken)
    gated = replace(SETTINGS, push_gate="teacher_entropy")
    advantage, credit = token_advantages("reversed", gated, **data, facts=facts)
    assert (credit.omega[3:] == 0).all() and torch.isfinite(advantage).all() and (credit.omega[:3] < 0).any()


def test_a_step_without_any_teacher_has_no_pushes_to_gate() -> None:
    data, facts = batch([3, 4], 3)
    facts = facts._replace(has_teacher=torch.tensor([False, False]), teacher_entropy=None)
    gated = replace(SETTINGS, push_gate="teacher_entropy", push_gate_pulls=True)
    advantage, credit = token_advantages("dasd", gated, **data, facts=facts)
    assert torch.equal(advantage, data["rewards_advantage"].repeat_interleave(data["lengths"]))
    assert not credit.omega.any()


def test_what_the_gates_are_for() -> None:
    # Two uncertain tokens of one rollout: at the first the teacher is as uncertain, at the second it is certain.
    data = {
        "rewards_advantage": torch.tensor([1.0]),
        "entropy": torch.tensor([0.7, 0.7, 0.0, 0.0]),
        "delta": torch.tensor([-1.0, 2.0, 0.0, 0.0]),
        "lengths": torch.tensor([4]),
    }

    def pushes(gate: str, right: bool, rate: float, pulls: bool = False) -> list[float]:
        facts = RolloutFacts(
            has_teacher=torch.tensor([True]),
            is_right=torch.tensor([right]),
            solve_rate=torch.tensor([rate]),
            teacher_entropy=torch.tensor([0.7, 0.0, 0.0, 0.0]),
        )
        chosen = replace(SETTINGS, push_gate=gate, push_gate_pulls=pulls, gate=False, entropy_floor=0.0, rho=0.6)
        return token_advantages("dasd", chosen, **data, facts=facts)[1].omega[:2].tolist()

    full = pushes("none", True, 0.5)
    assert full[0] == full[1] < 0
    assert pushes("teacher_entropy", True, 0.5) == [full[0], 0.0]
    assert pushes("teacher_entropy", True, 0.5, pulls=True) == [full[0], -full[0]]
    assert pushes("group", True, 0.25) == [pytest.approx(full[0] / 4)] * 2 and pushes("group", False, 0.0) == [0.0, 0.0]
    assert pushes("verdict", True, 0.5) == [full[0], 0.0] and pushes("verdict", False, 0.5) == [0.0, full[1]]
    assert pushes("verdict", False, 0.0) == [0.0, 0.0] and pushes("verdict", True, 1.0) == full


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        ({"push_gate": "no_such"}, "all", "push_gate is 'no_such'; expected none or one of"),
        ({"push_gate": "group"}, None, "push_gate=group needs the facts"),
        ({"push_gate": "teacher_entropy"}, "no entropy", "needs facts.teacher_entropy"),
        ({"term_clip": 0.0}, "all", "term_clip is 0.0"),
        ({"term_clip": math.nan}, "all", "term_clip is nan"),
    ],
)
def test_refusals(change: dict[str, Any], facts: str | None, message: str) -> None:
    data, known = batch([3, 2], 0)
    given_facts = {"all": known, "no entropy": known._replace(teacher_entropy=None), None: None}[facts]
    with pytest.raises(ValueError, match=message):
        token_advantages("dasd", replace(SETTINGS, **change), **data, facts=given_facts)


def test_the_bound_of_direction_adaptive_credit() -> None:
    entropy, delta = torch.rand(9), torch.randn(9) * 5
    free = direction_adaptive_credit(entropy, delta, torch.tensor([4, 5]), beta=0.5, scale_floor=0.1)
    for clip in (0.05, 1.0):
        bound = direction_adaptive_credit(
            entropy, delta, torch.tensor([4, 5]), beta=0.5, scale_floor=0.1, term_clip=clip
        )
        torch.testing.assert_close(bound.advantage_term, free.advantage_term.clamp(-clip, clip))
        assert torch.equal(bound.omega, free.omega)


def test_table() -> None:
    for name, gate in PUSH_GATES.items():
        assert gate.name == name != "none" and gate.description and "\n" not in gate.description


def test_empty_batches() -> None:
    for lengths in ([], [0, 0]):
        data, facts = batch(lengths, 0)
        for gate in PUSH_GATES:
            advantage, credit = token_advantages("dasd", replace(SETTINGS, push_gate=gate), **data, facts=facts)
            assert advantage.shape == credit.omega.shape == Tensor([]).shape
