"""The statistics by their definitions, dense and with autograd, for whoever tests an implementation of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dasd_megatron.losses import TokenStats


def dense(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    divergence: str,
    temperature: float,
    vocab_size: int,
    weight: float,
) -> TokenStats:
    """The definitions, with autograd, in the dtype of ``logits``; columns of zero probability contribute zero."""

    def expectation(p: Tensor, values: Tensor) -> Tensor:
        return torch.where(p > 0, p * torch.where(p > 0, values, 0.0), 0.0).sum(-1)

    log_p = (logits[:, :vocab_size] / temperature).log_softmax(-1)
    p = log_p.exp()
    log_prob, entropy = log_p.gather(1, targets[:, None])[:, 0], -expectation(p, log_p)
    if teacher is None:
        return TokenStats(log_prob, entropy, None, None)
    log_q = (teacher.to(logits.dtype)[:, :vocab_size] / temperature).log_softmax(-1)
    q = log_q.exp()
    if divergence == "reverse_kl":
        value = expectation(p, log_p - log_q)
    elif divergence == "forward_kl":
        value = expectation(q, log_q - log_p)
    elif divergence == "jsd":
        m = weight * p + (1 - weight) * q
        log_m = torch.where(m > 0, m, 1.0).log()
        value = weight * expectation(p, log_p - log_m) + (1 - weight) * expectation(q, log_q - log_m)
    else:
        raise ValueError(f"the reference has no divergence {divergence!r}: write its definition here")
    return TokenStats(log_prob, entropy, log_q.gather(1, targets[:, None])[:, 0], value)


def weighted_sum(stats: TokenStats, weights: Tensor) -> Tensor:
    total = stats.log_prob * weights[0] + stats.entropy * weights[1]
    if stats.divergence is not None:
        total = total + stats.divergence * weights[2]
    return total.sum()
