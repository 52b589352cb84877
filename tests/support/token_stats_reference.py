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


def clipped_divergence(
    logits: Tensor, teacher: Tensor, divergence: str, *, temperature: float, vocab_size: int, weight: float, clip: float
) -> Tensor:
    """The sum over the vocabulary of each summand or ``clip``, whichever is less, with autograd. A summand that is
    infinite counts as the clip."""
    log_p = (logits[:, :vocab_size] / temperature).log_softmax(-1)
    log_q = (teacher.to(logits.dtype)[:, :vocab_size] / temperature).log_softmax(-1)
    return clipped_sum(log_p, log_q, divergence, weight=weight, clip=clip)


def clipped_sum(log_p: Tensor, log_q: Tensor, divergence: str, *, weight: float, clip: float) -> Tensor:
    """The same from the logarithms of the probabilities."""
    p, q = log_p.exp(), log_q.exp()
    mixture = weight * p + (1 - weight) * q
    log_m = torch.where(mixture > 0, mixture, 1.0).log()
    terms = {
        "reverse_kl": [(1.0, p, log_p, log_q)],
        "forward_kl": [(1.0, q, log_q, log_p)],
        "jsd": [(weight, p, log_p, log_m), (1 - weight, q, log_q, log_m)],
    }[divergence]
    total, infinite = torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool)
    for share, mass, log_mass, log_other in terms:
        counts, lacks = mass > 0, log_other == -torch.inf
        gap = torch.where(counts & ~lacks, log_mass, 0.0) - torch.where(counts & ~lacks, log_other, 0.0)
        total = total + share * mass * gap
        infinite = infinite | (counts & lacks)
    return torch.where(infinite | (total > clip), clip, total).sum(-1)
