"""Passes of the model over micro-batches through Megatron's pipeline schedules: scoring without gradient, and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from dasd_megatron.config import PolicyLossConfig
from dasd_megatron.losses import TokenStats, kl_k3, policy_surrogate, vocab_parallel_token_stats
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.training.batching import MicroBatch
from dasd_megatron.training.optimizer import OptimizerState
from dasd_megatron.training.parallel import broadcast_from_last_stage, reduce_over_replicas


class TokenScores(NamedTuple):
    """Packed statistics of the response tokens of one batch, float32 [N], equal on all ranks of a replica."""

    log_prob: torch.Tensor
    entropy: torch.Tensor


class UpdateResult(NamedTuple):
    """Means over the response tokens of all replicas, and what the optimizer reported."""

    loss: float
    clip_share: float
    kl_to_start: float
    grad_norm: float
    lr: float


def _token_stats(model: ShardedModel, micro_batch: MicroBatch, logits: torch.Tensor, temperature: float) -> TokenStats:
    return vocab_parallel_token_stats(
        logits[micro_batch.rows, micro_batch.columns],
        micro_batch.targets,
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_size=model.vocab_size,
        temperature=temperature,
    )


def _run_schedule(
    model: ShardedModel, micro_batches: list[MicroBatch], last_stage: Callable[..., Any], *, micro_batch_size: int, forward_only: bool
) -> list[Any]:
    """Run all micro-batches forward (and backward); returns what ``last_stage(micro_batch, logits)`` reported, in order, on the last
    pipeline stage, and nothing elsewhere."""

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        output = chunk(micro_batch.tokens, micro_batch.position_ids, None)
        return output, partial(last_stage, micro_batch)

    iterators = [iter(micro_batches) for _ in model.chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


@torch.no_grad()
def score(model: ShardedModel, micro_batches: list[MicroBatch], *, temperature: float) -> TokenScores:
    """Log-prob of every response token and entropy of the distribution it was drawn from, at ``temperature``.

    Collectives: one all-gather over tensor-parallel ranks per micro-batch; one broadcast from the last pipeline stage.
    """

    def last_stage(micro_batch: MicroBatch, logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        stats = _token_stats(model, micro_batch, logits, temperature)
        return torch.stack([stats.log_prob, stats.entropy])

    size = max(len(batch.tokens) for batch in micro_batches)
    outputs = _run_schedule(model, micro_batches, last_stage, micro_batch_size=size, forward_only=True)
    packed_index = torch.cat([batch.packed_index for batch in micro_batches])
    packed = torch.zeros(2, len(packed_index), dtype=torch.float32, device=packed_index.device)
    if outputs:
        packed[:, packed_index] = torch.cat(outputs, dim=1)
    return TokenScores(*broadcast_from_last_stage(packed))


def update(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    *,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    start_log_prob: torch.Tensor | None,
    settings: PolicyLossConfig,
    temperature: float,
) -> UpdateResult:
    """One optimizer step on the clipped surrogate, averaged over the response tokens of all replicas.

    Args:
        old_log_prob, advantage, start_log_prob: float32 [N], packed in the order of the micro-batches' sequences; the last is the
            starting model's log-prob and only read when ``settings.kl_coef`` is not 0.

    Collectives: those of Megatron's backward and optimizer, one all-gather per micro-batch for the statistics, and two to report.
    """

    def policy_loss(micro_batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = micro_batch.packed_index
        log_prob = _token_stats(model, micro_batch, logits, temperature).log_prob
        surrogate, clipped = policy_surrogate(
            log_prob,
            old_log_prob[index],
            advantage[index],
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
        loss = surrogate.sum()
        kl = torch.zeros_like(loss)
        if start_log_prob is not None:
            kl = kl_k3(log_prob, start_log_prob[index]).sum()
            loss = loss + settings.kl_coef * kl
        return loss, _count(index), torch.stack([loss.detach(), clipped.sum().to(loss.dtype), kl.detach()])

    sums, grad_norm, lr = _optimize(model, optimizer, micro_batches, policy_loss, num_reported=3)
    loss, clip_share, kl = sums.tolist()
    return UpdateResult(loss, clip_share, kl, grad_norm, lr)


def supervised_update(model: ShardedModel, optimizer: OptimizerState, micro_batches: list[MicroBatch]) -> tuple[float, float, float]:
    """One optimizer step on the mean negative log-likelihood of the response tokens; returns (loss in nats, gradient norm, lr)."""

    def negative_log_likelihood(micro_batch: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = -_token_stats(model, micro_batch, logits, 1.0).log_prob.sum()
        return loss, _count(micro_batch.packed_index), loss.detach()[None]

    sums, grad_norm, lr = _optimize(model, optimizer, micro_batches, negative_log_likelihood, num_reported=1)
    return sums.item(), grad_norm, lr


def _count(index: torch.Tensor) -> torch.Tensor:
    return torch.tensor(index.numel(), dtype=torch.int, device=index.device)


def _optimize(
    model: ShardedModel, optimizer: OptimizerState, micro_batches: list[MicroBatch], loss_function: Callable[..., Any], *, num_reported: int
) -> tuple[torch.Tensor, float, float]:
    """Accumulate gradients over ``micro_batches`` and step; returns (means [num_reported] over the tokens of all replicas of the sums
    that ``loss_function`` reported, float64; gradient norm; learning rate)."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.optimizer.zero_grad()
    size = max(len(batch.tokens) for batch in micro_batches)
    reports = _run_schedule(model, micro_batches, loss_function, micro_batch_size=size, forward_only=False)
    grad_norm, lr = optimizer.step()
    sums = torch.zeros(num_reported + 1, dtype=torch.float64, device=micro_batches[0].tokens.device)
    if reports:
        sums[:-1] = torch.stack(reports).double().sum(0)
    broadcast_from_last_stage(sums)
    sums[-1] = sum(batch.packed_index.numel() for batch in micro_batches)
    reduce_over_replicas(sums)
    return sums[:-1] / sums[-1], grad_norm, lr
