"""The table of methods: how each of them turns the teacher's signal and the verifier's advantage into the advantage of
a token.

A :class:`Method` says all that the rest of the package needs to know of a method, so nothing else compares names. To
add one, write its functions here, its record in :data:`METHODS` and its ``conf/algorithm/<name>.yaml``. The functions
call tensors' own methods, so that this module, which the configuration takes its choices from, imports no torch.

Formulas and sources of all methods are in ``docs/method.md``. There, A is the verifier's advantage of a rollout, and
gap is log q(y) - log p(y) of a token y under the teacher q and the student p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED, DISTRIBUTIONAL = OBJECTIVES = ("sampled", "distributional")
QUANTILE_SIDES = ("upper", "lower")

NO_GATE = "none"
"""``algorithm.push_gate`` without a gate of :data:`~dasd_megatron.algorithms.gates.PUSH_GATES`."""

BETA, SCALE_FLOOR, ENTROPY_FLOOR = 0.02, 1.0, 0.3
"""Defaults of the weight of the teacher's term, and of the least scale of the gap and the least entropy threshold,
nats. They are our choice, and bounds within which no run of ours was lost."""


class RolloutStatistics(NamedTuple):
    """Per-rollout statistics in float64, spread over the N packed tokens where a formula of tokens needs them."""

    rollout: Tensor
    """``[N]`` int64, the rollout of each token."""
    entropy: Tensor
    """``[N]`` student's entropy, nats."""
    gap: Tensor
    """``[N]`` teacher's minus student's log-prob of the sampled token, nats, bounded."""
    delta_bar: Tensor
    """``[N]`` gap divided by its scale in the rollout."""
    tau: Tensor
    """``[B]`` entropy threshold, nats."""
    sigma: Tensor
    """``[B]`` mean absolute deviation of the entropy, nats."""
    routed: Tensor
    """``[N]`` (tau - H) / sigma."""


class RolloutFacts(NamedTuple):
    """What is known of B rollouts, and of their N packed tokens, beside entropies and gaps."""

    has_teacher: Tensor
    """``[B]`` bool: the teacher had privileged text for this rollout and scored it. Where False, the rollout has the
    verifier's advantage alone, whatever its gaps are."""
    is_right: Tensor
    """``[B]`` bool: the reward is at least ``teacher.success_reward``."""
    solve_rate: Tensor
    """``[B]`` float: the share of right rollouts in its group, 0 to 1."""
    teacher_entropy: Tensor | None = None
    """``[N]`` entropy of the teacher's distribution at each token, at the sampling temperature, nats. None where the
    teacher was not run. Not read for rollouts without a teacher."""


class TokenFacts(NamedTuple):
    """What the functions of a method read of N packed tokens, beside the statistics."""

    verifier: Tensor
    """``[N]`` float64, ``verifier_weight`` times the advantage of the token's rollout."""
    taught: Tensor
    """``[N]`` bool: the teacher acts on the token's rollout, by :attr:`Method.teaches` and
    :attr:`RolloutFacts.has_teacher`."""
    place: Tensor
    """``[N]`` float64 place in the rollout, from 0 to 1: (t - 1/2) / T of the t-th of T tokens, counted from 1."""
    teacher_entropy: Tensor
    """``[N]`` float64, nats; see :class:`RolloutFacts`. 0 where it is not known."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings of the methods, each the field of ``algorithm`` in the configuration that has its name.

    Every method gets all of them and reads its own. A further setting is a field here and a field of the
    configuration.
    """

    verifier_weight: float
    beta: float
    rho: float
    quantile_side: str
    scale_floor: float
    gate: bool
    rlsd_clip: float
    rlsd_lambda: float = 1.0
    srpo_beta: float = 1.0
    position_w_min: float = 0.25
    position_tau: float = 0.3
    position_s: float = 0.1
    entropy_floor: float = ENTROPY_FLOOR
    term_clip: float | None = None
    push_gate: str = NO_GATE
    push_gate_pulls: bool = False
    objective: str = SAMPLED

    @property
    def is_distributional(self) -> bool:
        """True where the teacher acts through a divergence, and not through the advantage."""
        return self.objective == DISTRIBUTIONAL


TokenFunction = Callable[[RolloutStatistics, TokenFacts, MethodSettings], "Tensor"]


@dataclass(frozen=True)
class Method:
    """A method, as far as the rest of the package needs to know it."""

    name: str
    """``algorithm.name`` in the configuration, and the name of a yaml."""
    description: str
    """One line for people."""
    direction: TokenFunction | None = None
    """``[N]`` direction of each token before the reliability gate, in [-1, 1]; tokens that are not taught get 0 in any
    case. None: omega is 0 everywhere, so the teacher adds nothing to the verifier's advantage, and the distributional
    objective has nothing to weight a divergence with."""
    signal: Callable[[RolloutStatistics], Tensor] | None = None
    """``[N]`` what ``beta`` and omega are multiplied with under the sampled objective, and then omega is the direction
    itself. None: the gap divided by its scale, and the reliability gate weakens omega."""
    has_mean_one: bool = False
    """True where omega is divided by its mean over the taught tokens of the step's whole batch."""
    verifier_factor: TokenFunction | None = None
    """``[N]`` factor on the verifier's advantage of each token, 1 where the token is not taught. None: 1."""
    teaches: Literal["all", "right", "wrong"] = "all"
    """Rollouts that the teacher acts on: all that have one, or of these the right or the wrong ones alone. The others
    get the verifier's advantage alone."""
    needs_teacher_entropy: bool = False
    """True where the entropy of the teacher's distribution is read."""
    pushes_away: bool = False
    """True where directions may be below 0, so that ``algorithm.push_gate`` has pushes to scale."""
    has_entropy_switch: bool = False
    """True where ``beta`` and ``divergence_weight`` count as 0 while the run's
    :class:`~dasd_megatron.algorithms.switch.EntropySwitch` is off."""
    blends_verifier: bool = False
    """True where the verifier's factor is of RLSD's form, with ``algorithm.rlsd_lambda`` and ``rlsd_clip``."""
    routes_by_entropy: bool = False
    """True where the direction depends on the entropy threshold, so that ``algorithm.rho`` decides which tokens are
    pushed away."""

    def acts_on(self, is_right: Any) -> Any:
        """Return whether the teacher acts on a rollout that has one, from whether it is right: a bool, or bools of any
        shape as a tensor."""
        return (self.teaches == "all") | (is_right == (self.teaches == "right"))

    @property
    def has_direction(self) -> bool:
        """True where the teacher gives a direction, so that ``algorithm.beta`` matters and the verifier may be left
        out."""
        return self.direction is not None

    @property
    def needs_teacher(self) -> bool:
        """True where the teacher's log-probs are read at all."""
        return self.direction is not None or self.verifier_factor is not None


def _route_by_entropy(statistics: RolloutStatistics, _: TokenFacts, __: MethodSettings) -> Tensor:
    return statistics.routed.tanh()


def _pull_everywhere(statistics: RolloutStatistics, _: TokenFacts, __: MethodSettings) -> Tensor:
    return statistics.routed.new_ones(statistics.routed.shape)


def _push_everywhere(statistics: RolloutStatistics, _: TokenFacts, __: MethodSettings) -> Tensor:
    return -statistics.routed.new_ones(statistics.routed.shape)


def _pull_late_tokens(_: RolloutStatistics, facts: TokenFacts, settings: MethodSettings) -> Tensor:
    """PW-OPSD (arXiv:2605.21606): w_min + (1 - w_min) sigmoid((place - tau) / s)."""
    rise = ((facts.place - settings.position_tau) / settings.position_s).sigmoid()
    return settings.position_w_min + (1.0 - settings.position_w_min) * rise


def _pull_where_teacher_is_certain(_: RolloutStatistics, facts: TokenFacts, settings: MethodSettings) -> Tensor:
    """SRPO's weight before it is given a mean of 1 (arXiv:2604.02288): exp(-srpo_beta H), H the teacher's entropy."""
    return (-settings.srpo_beta * facts.teacher_entropy).exp()


def _plain_gap(statistics: RolloutStatistics) -> Tensor:
    return statistics.gap


def _jensen_shannon_gap(statistics: RolloutStatistics) -> Tensor:
    """AntiSD's phi (arXiv:2605.11609): (softplus(gap) - log 2) / 2, at least -0.35 however small the gap is."""
    gap = statistics.gap
    # softplus(u) = max(u, 0) + log(1 + exp(-|u|)), which does not overflow.
    return 0.5 * (gap.clamp_min(0.0) + (-gap.abs()).exp().log1p() - math.log(2.0))


def _leave_taught_to_teacher(statistics: RolloutStatistics, facts: TokenFacts, _: MethodSettings) -> Tensor:
    """SRPO's routing (arXiv:2604.02288): the verifier acts on rollouts that the teacher does not act on."""
    return (~facts.taught).to(statistics.routed.dtype)


def _scale_by_gap(statistics: RolloutStatistics, facts: TokenFacts, settings: MethodSettings) -> Tensor:
    """RLSD (arXiv:2604.03128): 1 - lambda + lambda clip(exp(sign(A) gap), 1 - c, 1 + c)."""
    return _blend(statistics.gap, facts, settings)


def _scale_by_reversed_gap(statistics: RolloutStatistics, facts: TokenFacts, settings: MethodSettings) -> Tensor:
    """RLRT (arXiv:2605.10781): 1 - lambda + lambda clip(exp(-sign(A) gap), 1 - c, 1 + c)."""
    return _blend(-statistics.gap, facts, settings)


def _blend(exponent: Tensor, facts: TokenFacts, settings: MethodSettings) -> Tensor:
    """Return ``[N]`` factors of RLSD's form. An exponent of 0 gives exactly 1."""
    weight = (facts.verifier.sign() * exponent).exp().clamp(1.0 - settings.rlsd_clip, 1.0 + settings.rlsd_clip)
    return 1.0 + settings.rlsd_lambda * (weight - 1.0)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "dasd",
            "pulls certain tokens toward the teacher and pushes uncertain ones away (arXiv:2605.22263)",
            direction=_route_by_entropy,
            pushes_away=True,
            routes_by_entropy=True,
        ),
        Method("grpo", "leaves the teacher out: the verifier's advantage alone (arXiv:2402.03300)"),
        Method("opsd", "pulls every token toward the teacher", direction=_pull_everywhere),
        Method(
            "reversed",
            "pushes every token away from the teacher",
            direction=_push_everywhere,
            pushes_away=True,
        ),
        Method(
            "sdpo",
            "pulls every token toward the teacher by the gap as it is, without the verifier (arXiv:2601.20802)",
            direction=_pull_everywhere,
            signal=_plain_gap,
        ),
        Method(
            "srpo",
            "leaves right responses to the verifier and wrong ones to the teacher (arXiv:2604.02288)",
            direction=_pull_where_teacher_is_certain,
            signal=_plain_gap,
            has_mean_one=True,
            verifier_factor=_leave_taught_to_teacher,
            teaches="wrong",
            needs_teacher_entropy=True,
        ),
        Method(
            "rlsd",
            "lets the teacher scale the verifier's advantage (arXiv:2604.03128)",
            verifier_factor=_scale_by_gap,
            blends_verifier=True,
        ),
        Method(
            "rlrt",
            "raises the verifier's advantage where a right response goes another way than the teacher "
            "(arXiv:2605.10781)",
            verifier_factor=_scale_by_reversed_gap,
            blends_verifier=True,
            teaches="right",
        ),
        Method(
            "antisd",
            "pushes every token away from the teacher, while the teacher is uncertain enough (arXiv:2605.11609)",
            direction=_push_everywhere,
            signal=_jensen_shannon_gap,
            has_entropy_switch=True,
            pushes_away=True,
        ),
        Method(
            "pw_opsd",
            "pulls late tokens toward the teacher more than early ones (arXiv:2605.21606)",
            direction=_pull_late_tokens,
            signal=_plain_gap,
        ),
    )
}
"""Every method by its name, in the order in which messages list them."""
