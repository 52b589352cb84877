"""Divergences over the k entries of the vocabulary that matter most, with the rest of it as one more entry or left out.

:func:`~dasd_megatron.losses.linear_token_stats` finds the k most probable entries of a distribution, or returns the
log-probs of given entries; both read the blocks of logits that it makes anyway. :func:`top_k_divergence` compares two
distributions on such entries.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dasd_megatron.losses.statistics import Shard, TopK, all_gather, make_objective

NO_ENTRY = -1
"""Id of a place that has no entry, because fewer than k have any probability."""

# The rest of the vocabulary has at least this probability. It is 1 minus the others, which float32 knows to about this.
_LEAST_TAIL = 1e-7
# This stands for the logarithm of 0, so that no product is 0 times infinity.
_FLOOR = -1e30
# A divergence beyond this is reported as infinite, as that of the whole vocabulary is.
_INFINITE_NATS = 1e7


class GivenEntries:
    """Logits of given entries ``[T, k]``, read block by block; ``ids`` are global, :data:`NO_ENTRY` allowed."""

    def __init__(self, ids: Tensor, shard: Shard, dtype: torch.dtype) -> None:
        self.ids, self.shard = ids.long(), shard
        self.logits = torch.zeros(ids.shape, dtype=dtype, device=ids.device)

    def read(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Take what a block of logits has; ``columns`` are those of the shard."""
        index, owned = local_entries(self.ids[rows], self.shard, columns)
        self.logits[rows] += torch.where(owned, block.gather(1, index), 0.0)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return ids and logits over all shards, -inf where there is no entry; one all-reduce of ``[T, k]``."""
        if self.shard.group is not None and self.logits.numel():
            # One rank has the logit of an entry, and the others have 0.
            dist.all_reduce(self.logits, group=self.shard.group)
        return self.ids, self.logits.masked_fill_(self.ids < 0, -math.inf)


class LargestEntries:
    """The k largest logits of every token and their ids, read block by block."""

    def __init__(self, k: int, shard: Shard, dtype: torch.dtype) -> None:
        shape, device = (len(shard.targets), k), shard.targets.device
        self.shard = shard
        self.ids = torch.full(shape, NO_ENTRY, dtype=torch.int64, device=device)
        self.logits = torch.full(shape, -math.inf, dtype=dtype, device=device)

    def read(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Take what a block of logits has; ``columns`` are those of the shard."""
        logits, places = block.topk(min(self.ids.shape[1], block.shape[1]), dim=1)
        ids = places + (self.shard.first_column + columns.start)
        self.ids[rows], self.logits[rows] = self._largest(
            torch.cat([self.ids[rows], ids], 1), torch.cat([self.logits[rows], logits], 1)
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return ids and logits over all shards, equal on all ranks; two all-gathers of ``[T, k]``."""
        if self.shard.group is not None:
            ids, logits = (
                all_gather(part.t().contiguous(), self.shard).flatten(0, 1).t() for part in (self.ids, self.logits)
            )
            self.ids, self.logits = self._largest(ids, logits)
        # What has no probability is no entry, so that no id comes twice.
        return self.ids.masked_fill_(self.logits == -math.inf, NO_ENTRY), self.logits

    def _largest(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits, places = logits.topk(self.ids.shape[1], dim=1)
        return ids.gather(1, places), logits


def local_entries(ids: Tensor, shard: Shard, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the places of entries in a block of this shard's columns, 0 for those of other blocks, and which of them
    it has."""
    local = ids - (shard.first_column + columns.start)
    owned = (local >= 0) & (local < columns.stop - columns.start)
    return torch.where(owned, local, 0), owned


def top_k_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: str,
    tail: bool,
    jsd_weight: float = 0.5,
    entry_clip: float | None = None,
) -> Tensor:
    """Return the divergence between two distributions on k entries of the vocabulary, per token.

    With ``tail`` the probability of all other entries together is one more entry of both, as in SDPO
    (``distillation_add_tail``, arXiv:2601.20802). Without, both are divided by their sum over the k entries, as in
    OPSD's code (``top_k_loss``, arXiv:2601.18734).

    Args:
        student: ``[T, k]`` log-probs of the entries over the whole vocabulary, nats, -inf allowed; the only argument
            that receives a gradient.
        teacher: ``[T, k]`` log-probs of the same entries.
        divergence, jsd_weight, entry_clip: as for :func:`~dasd_megatron.losses.vocab_parallel_token_stats`.

    Returns:
        ``[T]`` nats in the dtype of ``student``; +inf, without gradient, where it would be for the whole vocabulary.
        The probability of the other entries is 1 minus that of the k, and at least 1e-7: less is lost in rounding.

    Computed in float64; ``[T, k]`` values are all the memory it takes. No collectives. Raises ValueError on an unknown
    divergence, settings outside their range, or different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; expected the same entries"
        )
    objective = make_objective(divergence, jsd_weight, entry_clip)
    complete = _with_tail if tail else _renormalised
    log_p, log_q = (complete(values.double().clamp_min(_FLOOR)) for values in (student, teacher.detach()))
    contribution = objective.contributions(log_p, log_q)
    if entry_clip is not None:
        contribution = contribution.clamp_max(entry_clip)
    value = contribution.sum(-1)
    return value.masked_fill(value > _INFINITE_NATS, math.inf).to(student.dtype)


def _with_tail(log_probs: Tensor) -> Tensor:
    rest = (1.0 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(_LEAST_TAIL)
    return torch.cat([log_probs, rest.log()], -1)


def _renormalised(log_probs: Tensor) -> Tensor:
    return log_probs - log_probs.logsumexp(-1, keepdim=True)


def entry_log_probs(ids: Tensor, logits: Tensor, maximum: Tensor, log_z: Tensor, inverse_temperature: float) -> TopK:
    """Return log-probs of entries from their logits ``[T, k]``, the maximum over the vocabulary and the logarithm of
    the normaliser about it ``[T]``."""
    log_probs = (logits.double() - maximum.double()[:, None]) * inverse_temperature - log_z.double()[:, None]
    return TopK(ids, log_probs.to(logits.dtype))
