"""Metrics of a batch's credit, as sums and maxima that add up over data-parallel ranks and micro-batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dasd_megatron.algorithms.credit import GAP_LIMIT, Credit

_SUMS = (
    "tokens", "rollouts", "pushed", "pulled", "entropy", "entropy_pushed", "entropy_pulled", "omega", "omega_squared",
    "delta", "delta_abs", "delta_bar_abs", "push", "push_delta", "advantage_abs", "tau", "sigma", "taught",
)  # fmt: skip


class CreditStatistics(NamedTuple):
    """Two float64 tensors. Over ranks reduce ``sums`` with SUM and ``maxima`` with MAX, then call
    :func:`credit_metrics`."""

    sums: Tensor
    """``[18]``: counts of tokens, rollouts, pushed (omega < 0) and pulled (omega > 0) tokens, then sums over tokens or
    rollouts, and last the count of tokens whose gaps are summed."""
    maxima: Tensor
    """``[2]``: the largest omega, and minus the smallest; -inf without tokens."""


def credit_statistics(
    credit: Credit, entropy: Tensor, delta: Tensor, advantage: Tensor, taught: Tensor | None = None
) -> CreditStatistics:
    """Additive statistics of N packed tokens of B rollouts.

    ``entropy``, ``delta`` and ``advantage`` are ``[N]``. ``taught`` is ``[N]`` bool, the tokens of rollouts that the
    teacher scored, whose gaps alone are counted; None: all of them. Infinite gaps count as +-20 nats, as they do in the
    credit. On the tokens' device, no collectives and no read-back. Raises ValueError on different shapes.
    """
    for name, values in (("entropy", entropy), ("delta", delta), ("advantage", advantage)):
        if values.shape != credit.omega.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; the credit has {tuple(credit.omega.shape)}")
    entropy, advantage, omega = (values.detach().double() for values in (entropy, advantage, credit.omega))
    delta = delta.detach().double().clamp(-GAP_LIMIT, GAP_LIMIT)
    if taught is None:
        taught = torch.ones_like(entropy, dtype=torch.bool)
    elif taught.shape != entropy.shape:
        raise ValueError(f"taught has shape {tuple(taught.shape)}; the credit has {tuple(credit.omega.shape)}")
    delta, delta_bar = (torch.where(taught, gap, 0.0) for gap in (delta, credit.delta_bar.double()))
    pushed, pulled = omega < 0, omega > 0
    sums = {
        "tokens": entropy.new_tensor(entropy.numel()),
        "rollouts": entropy.new_tensor(credit.tau.numel()),
        "pushed": pushed.sum(),
        "pulled": pulled.sum(),
        "entropy": entropy.sum(),
        "entropy_pushed": (entropy * pushed).sum(),
        "entropy_pulled": (entropy * pulled).sum(),
        "omega": omega.sum(),
        "omega_squared": omega.square().sum(),
        "delta": delta.sum(),
        "delta_abs": delta.abs().sum(),
        "delta_bar_abs": delta_bar.abs().sum(),
        "push": (-omega * pushed).sum(),
        "push_delta": (-omega * pushed * delta).sum(),
        "advantage_abs": advantage.abs().sum(),
        "tau": credit.tau.double().sum(),
        "sigma": credit.sigma.double().sum(),
        "taught": taught.sum(),
    }
    lowest = omega.new_full((1,), -math.inf)
    maxima = torch.stack([torch.cat([omega, lowest]).amax(), torch.cat([-omega, lowest]).amax()])
    return CreditStatistics(torch.stack([sums[name].double() for name in _SUMS]), maxima)


def credit_metrics(statistics: CreditStatistics) -> dict[str, float]:
    """Return metrics from reduced statistics, by the names of the metrics file; entropies and gaps in nats.

    ``entropy/pushed``, ``credit/pushed_delta_mean`` and ``entropy/pulled`` are left out where no token is pushed or
    pulled, the metrics of gaps where no token has a teacher, and everything without any token. ``credit/tau_mean`` and
    ``credit/sigma_mean`` are means over rollouts, those of gaps over tokens that have a teacher, all others over
    tokens. The tensors are read back from their device.
    """
    total = dict(zip(_SUMS, statistics.sums.tolist(), strict=True))
    omega_max, minus_omega_min = statistics.maxima.tolist()
    tokens, rollouts = total["tokens"], total["rollouts"]
    if tokens == 0:
        return {}
    omega_mean = total["omega"] / tokens
    metrics = {"entropy/mean": total["entropy"] / tokens}
    if total["pushed"]:
        metrics["entropy/pushed"] = total["entropy_pushed"] / total["pushed"]
        metrics["credit/pushed_delta_mean"] = total["push_delta"] / total["push"]
    if total["pulled"]:
        metrics["entropy/pulled"] = total["entropy_pulled"] / total["pulled"]
    if total["taught"]:
        metrics["credit/delta_mean"] = total["delta"] / total["taught"]
        metrics["credit/delta_abs_mean"] = total["delta_abs"] / total["taught"]
        metrics["credit/delta_bar_abs_mean"] = total["delta_bar_abs"] / total["taught"]
    return metrics | {
        "credit/pushed_share": total["pushed"] / tokens,
        "credit/omega_mean": omega_mean,
        "credit/omega_std": math.sqrt(max(total["omega_squared"] / tokens - omega_mean**2, 0.0)),
        "credit/omega_min": -minus_omega_min,
        "credit/omega_max": omega_max,
        "credit/tau_mean": total["tau"] / rollouts,
        "credit/sigma_mean": total["sigma"] / rollouts,
        "credit/advantage_abs_mean": total["advantage_abs"] / tokens,
    }
