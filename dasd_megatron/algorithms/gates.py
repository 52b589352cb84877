"""The table of push gates: signals that tell a choice from ignorance, so that only choices are pushed away from the
teacher.

A policy is uncertain for two reasons. It may have several good ways on, which DASD is to keep open, or it may not know
the next step, which the teacher does. The entropy alone cannot tell them apart. A gate is a factor g from 0 to
1 on the pushes; pulls are left as they are. With ``push_gate_pulls`` the factor is 2 g - 1, so that a push that g is
against becomes a pull. All of these are our choice. The functions call tensors' own methods, so that this
module, which the configuration takes its choices from, imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dasd_megatron.algorithms.methods import RolloutFacts, RolloutStatistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PushGate:
    """A gate, as far as the rest of the package needs to know it."""

    name: str
    """``algorithm.push_gate`` in the configuration."""
    description: str
    """One clause for people."""
    factor: Callable[[RolloutStatistics, RolloutFacts], Tensor]
    """``[N]`` factor on the push of each token, float64, 0 to 1."""


def _by_group(statistics: RolloutStatistics, facts: RolloutFacts) -> Tensor:
    return facts.solve_rate.to(statistics.gap)[statistics.rollout]


def _by_teacher_entropy(statistics: RolloutStatistics, facts: RolloutFacts) -> Tensor:
    if facts.teacher_entropy is None:
        if bool(facts.has_teacher.any()):
            raise ValueError("the gate teacher_entropy needs facts.teacher_entropy")
        return statistics.entropy.new_ones(statistics.entropy.shape)
    student = statistics.entropy.clamp_min(1e-6)
    return (2.0 * facts.teacher_entropy.to(student) / student).clamp(0.0, 1.0)


def _by_verdict(statistics: RolloutStatistics, facts: RolloutFacts) -> Tensor:
    rollout = statistics.rollout
    is_right = facts.is_right.to(rollout.device)[rollout]
    solve_rate = facts.solve_rate.to(statistics.gap)[rollout]
    # A push raises the tokens that the teacher finds less likely than the student does, and lowers the others.
    raises = statistics.gap < 0
    agrees = (is_right & raises) | (~is_right & ~raises & (solve_rate > 0))
    return (agrees | (solve_rate >= 1)).to(statistics.gap.dtype)


PUSH_GATES: dict[str, PushGate] = {
    gate.name: gate
    for gate in (
        PushGate("group", "scaled by the share of right responses in the group", _by_group),
        PushGate(
            "teacher_entropy",
            "scaled by twice the teacher's entropy over the student's, at most 1",
            _by_teacher_entropy,
        ),
        PushGate(
            "verdict",
            "only where it moves the token as the verifier does, or where all of the group is right",
            _by_verdict,
        ),
    )
}
"""Every gate by its name, in the order in which messages list them."""
