"""The table of methods: how each of them turns the teacher's signal and the verifier's advantage into the advantage of
a token.

A :class:`Method` says all that the rest of the package needs to know of a method, so nothing else compares names. To
add one, write its function here, its record in :data:`METHODS` and its ``conf/algorithm/<name>.yaml``. The functions
call tensors' own methods, so that this module, which the configuration takes its choices from, imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED, DISTRIBUTIONAL = OBJECTIVES = ("sampled", "distributional")
QUANTILE_SIDES = ("upper", "lower")

ENTROPY_FLOOR = 0.3
"""Default of the least entropy threshold, nats; our choice."""


class RolloutStatistics(NamedTuple):
    """Per-rollout statistics in float64, spread over the N packed tokens where a formula of tokens needs them."""

    rollout: Tensor
    """``[N]`` int64, the rollout of each token."""
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
    entropy_floor: float = ENTROPY_FLOOR
    objective: str = SAMPLED

    @property
    def is_distributional(self) -> bool:
        """True where the teacher acts through a divergence, and not through the advantage."""
        return self.objective == DISTRIBUTIONAL


@dataclass(frozen=True)
class Method:
    """A method, as far as the rest of the package needs to know it."""

    name: str
    """``algorithm.name`` in the configuration, and the name of the yaml."""
    description: str
    """One line for people."""
    direction: Callable[[RolloutStatistics, MethodSettings], Tensor] | None = None
    """``[N]`` direction of each token before the reliability gate, in [-1, 1]. None: omega is 0 everywhere, so the
    teacher adds nothing to the verifier's advantage, and the distributional objective has nothing to weight a
    divergence with."""
    verifier_factor: Callable[[RolloutStatistics, Tensor, MethodSettings], Tensor] | None = None
    """``[N]`` factor on the verifier's advantage of each token, from the statistics, that advantage ``[N]`` and the
    settings. None: 1."""
    routes_by_entropy: bool = False
    """True where the direction depends on the entropy threshold, so that ``algorithm.rho`` decides which tokens are
    pushed away."""

    @property
    def has_direction(self) -> bool:
        """True where the teacher gives a direction, so that ``algorithm.beta`` matters and the verifier may be left
        out."""
        return self.direction is not None

    @property
    def needs_teacher(self) -> bool:
        """True where the teacher's log-probs are read at all."""
        return self.direction is not None or self.verifier_factor is not None


def _route_by_entropy(statistics: RolloutStatistics, _: MethodSettings) -> Tensor:
    return statistics.routed.tanh()


def _pull_everywhere(statistics: RolloutStatistics, _: MethodSettings) -> Tensor:
    return statistics.routed.new_ones(statistics.routed.shape)


def _push_everywhere(statistics: RolloutStatistics, _: MethodSettings) -> Tensor:
    return -statistics.routed.new_ones(statistics.routed.shape)


def _scale_by_gap(statistics: RolloutStatistics, verifier: Tensor, settings: MethodSettings) -> Tensor:
    return (verifier.sign() * statistics.gap).exp().clamp(1.0 - settings.rlsd_clip, 1.0 + settings.rlsd_clip)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "dasd",
            "pulls certain tokens toward the teacher and pushes uncertain ones away (arXiv:2605.22263)",
            direction=_route_by_entropy,
            routes_by_entropy=True,
        ),
        Method("grpo", "leaves the teacher out: the verifier's advantage alone (arXiv:2402.03300)"),
        Method("opsd", "pulls every token toward the teacher", direction=_pull_everywhere),
        Method("reversed", "pushes every token away from the teacher", direction=_push_everywhere),
        Method(
            "rlsd",
            "lets the teacher scale the verifier's advantage (arXiv:2604.03128)",
            verifier_factor=_scale_by_gap,
        ),
    )
}
"""Every method by its name, in the order in which messages list them."""
