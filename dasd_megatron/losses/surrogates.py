"""The tables of the policy loss: surrogates, ways to average them over a batch, and levels of rejection.

Nothing else compares their names. To add a surrogate, write its loss and its record here. The functions call tensors'
own methods, so that this module, which the configuration takes its choices from, imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Bounds(NamedTuple):
    """The least and the largest ratio of two probabilities."""

    low: float
    high: float


@dataclass(frozen=True)
class Surrogate:
    """One surrogate of the policy gradient, with a ratio r between the policy being trained and the one before."""

    name: str
    """``loss.surrogate`` in the configuration."""
    formula: str
    clip_low: float
    """Default of ``loss.clip_low``: r is clipped at ``1 - clip_low``."""
    clip_high: float
    """Default of ``loss.clip_high``: r is clipped at ``1 + clip_high``."""
    loss: Callable[[Tensor, Tensor, Tensor, Bounds], tuple[Tensor, Tensor]]
    """Function of log r, log-prob, advantage (``[N]`` each) and the clip's bounds: the loss ``[N]`` to minimise and
    which tokens the clip acts on, ``[N]`` bool."""
    uses_response_ratio: bool = False
    """True: the value of r is the geometric mean of the ratios of the whole response, and its gradient the token's own
    (GSPO-token)."""
    takes_dual_clip: bool = False


def _clipped_ratio(log_ratio: Tensor, _: Tensor, advantage: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    bounded = -advantage * ratio.clamp(bounds.low, bounds.high)
    clipped = bounded > unclipped
    return bounded.where(clipped, unclipped), clipped


def _clipped_weight(log_ratio: Tensor, log_prob: Tensor, advantage: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(bounds.low, bounds.high)
    return -advantage * weight * log_prob, weight != ratio


SURROGATES: dict[str, Surrogate] = {
    surrogate.name: surrogate
    for surrogate in (
        # arXiv:1707.06347; an upper bound of its own as in DAPO, arXiv:2503.14476.
        Surrogate("ppo", "-min(r A, clip(r) A)", 0.2, 0.28, _clipped_ratio, takes_dual_clip=True),
        # arXiv:2507.18071: its GSPO-token, whose gradient is exact where advantages differ by token, and its bounds.
        Surrogate(
            "gspo", "-min(s A, clip(s) A), s the response's ratio", 3e-4, 4e-4, _clipped_ratio, uses_response_ratio=True
        ),
        # arXiv:2506.13585, without a lower bound; a ratio of 5 at most, which TRL recommends after arXiv:2510.13786.
        Surrogate("cispo", "-sg(clip(r)) A log p", 1.0, 4.0, _clipped_weight),
    )
}
"""Every surrogate by its name, in the order in which messages list them."""


class BatchCounts(NamedTuple):
    """What an update trains on, over all replicas: without rejected tokens, and without responses that have no others.
    ``max_tokens`` is the longest response that the configuration allows."""

    tokens: float
    responses: float
    max_tokens: int


@dataclass(frozen=True)
class Aggregation:
    """One way to make a loss of a batch from those of its tokens."""

    name: str
    """``loss.aggregation`` in the configuration."""
    formula: str
    divisor: Callable[[Tensor, BatchCounts], Tensor]
    """Function of each response's own tokens ``[B]`` and the batch's counts: the number ``[B]`` that the losses of its
    tokens are divided by, before all are added."""


AGGREGATIONS: dict[str, Aggregation] = {
    aggregation.name: aggregation
    for aggregation in (
        Aggregation(
            "token_mean", "the mean over all tokens", lambda lengths, counts: lengths.new_full((), counts.tokens)
        ),
        Aggregation(
            "seq_mean_token_mean",
            "the mean over responses of the mean over their tokens",
            lambda lengths, counts: lengths * counts.responses,
        ),
        # Dr. GRPO, arXiv:2503.20783.
        Aggregation(
            "seq_mean_token_sum_norm",
            "the mean over responses of the sum over their tokens / rollout.max_new_tokens",
            lambda lengths, counts: lengths.new_full((), counts.responses * counts.max_tokens),
        ),
    )
}
"""Every aggregation by its name, in the order in which messages list them."""


@dataclass(frozen=True)
class Rejection:
    """One level at which the trainer's probabilities are compared with the rollout engine's, to leave out what lies
    outside bounds."""

    name: str
    """``loss.rejection`` in the configuration."""
    bounds: Bounds
    """Defaults of ``loss.rejection_low`` and ``loss.rejection_high``."""
    log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Function of the tokens' log-ratios, the sum of their response's, and its length (``[N]`` each): the logarithm
    ``[N]`` of the ratio that is compared."""
    is_by_token: bool = False
    """True: tokens are left out one by one, and not whole responses."""


REJECTIONS: dict[str, Rejection] = {
    rejection.name: rejection
    for rejection in (
        # IcePop, arXiv:2510.18855, and its bounds. Those of the other two are our choice.
        Rejection("token", Bounds(0.5, 5.0), lambda token, _, __: token, is_by_token=True),
        Rejection("sequence", Bounds(0.5, 2.0), lambda _, total, __: total),
        Rejection("geometric", Bounds(0.99, 1.01), lambda _, total, length: total / length),
    )
}
"""Every level of rejection by its name, in the order in which messages list them."""
