"""Passes of the model over micro-batches through Megatron's pipeline schedules: scoring without gradient, and
updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig
from dasd_megatron.losses import (
    TokenStats,
    kl_k3,
    linear_token_stats,
    policy_surrogate,
    routed_divergence,
    vocab_parallel_token_stats,
)
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.training.batching import MicroBatch
from dasd_megatron.training.optimizer import OptimizerState, TrainingError
from dasd_megatron.training.parallel import broadcast_from_last_stage, reduce_over_replicas, sum_over_sequence_parts


class TokenScores(NamedTuple):
    """Packed statistics of the response tokens of one batch, float32 [N], equal on all ranks of a replica."""

    log_prob: torch.Tensor
    entropy: torch.Tensor


class UpdateResult(NamedTuple):
    """Means over the response tokens of all replicas, and what the optimizer reported. ``applied`` is False where the
    gradient norm was not finite, and nothing was changed."""

    loss: float
    clip_share: float
    kl_to_start: float
    divergence: float
    capped_share: float
    grad_norm: float
    lr: float
    applied: bool


@dataclass
class TeacherStates:
    """What the full-vocabulary divergence needs of the teacher; on the last pipeline stage.

    Attributes:
        hidden: ``[N, h / TP]``, each tensor-parallel rank's part of what the teacher's LM head is applied to, for every
        packed token. weight: ``[V_local, h]``, this rank's shard of the LM head that the teacher was scored with.
    """

    hidden: torch.Tensor
    weight: torch.Tensor

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """Whole states ``[R, h]`` of these packed tokens; one all-gather over tensor-parallel ranks."""
        return gather_from_tensor_model_parallel_region(self.hidden[index])


@dataclass
class Distillation:
    """The distributional objective of one update: direction ``omega`` [N] float32 and the teacher, None before the last
    stage."""

    omega: torch.Tensor
    teacher: TeacherStates | None
    settings: AlgorithmConfig


def _token_stats(
    model: ShardedModel,
    micro_batch: MicroBatch,
    output: torch.Tensor,
    loss: PolicyLossConfig,
    temperature: float,
    distillation: Distillation | None = None,
) -> TokenStats:
    """Statistics of a micro-batch's response tokens from what the last stage put out; see :class:`ShardedModel`."""
    rows = output[micro_batch.rows, micro_batch.columns]
    common = dict(
        group=parallel_state.get_tensor_model_parallel_group(), vocab_size=model.vocab_size, temperature=temperature
    )
    if not model.fused_linear:
        # The rows are a copy of ours, so their gradient may take their place.
        return vocab_parallel_token_stats(rows, micro_batch.targets, inplace_backward=True, **common)
    if distillation is not None:
        common |= dict(
            teacher_hidden=distillation.teacher.of(micro_batch.packed_index),
            teacher_weight=distillation.teacher.weight,
            divergence=distillation.settings.divergence,
            jsd_weight=distillation.settings.jsd_weight,
        )
    weight = model.head_weight()
    return linear_token_stats(
        # Megatron hands the last stage's output over in float32; the values are those of the model's own dtype.
        rows.to(weight.dtype),
        weight,
        micro_batch.targets,
        chunk_size=loss.block_tokens,
        vocab_chunk_size=loss.block_columns,
        reduce_hidden_grad=not model.config.sequence_parallel,
        **common,
    )


def _packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams | None:
    if micro_batch.starts is None:
        return None
    starts, longest = micro_batch.starts, micro_batch.longest
    return PackedSeqParams(
        "thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _run_schedule(
    model: ShardedModel,
    micro_batches: list[MicroBatch],
    last_stage: Callable[..., Any],
    *,
    micro_batch_size: int,
    forward_only: bool,
) -> list[Any]:
    """Run all micro-batches forward (and backward); returns what ``last_stage(micro_batch, logits)`` reported, in
    order, on the last pipeline stage, and nothing elsewhere."""

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        output = chunk(
            micro_batch.tokens, micro_batch.position_ids, None, packed_seq_params=_packed_seq_params(micro_batch)
        )
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
def score(
    model: ShardedModel,
    micro_batches: list[MicroBatch],
    loss: PolicyLossConfig,
    *,
    temperature: float,
    keep_hidden: list[torch.Tensor] | None = None,
) -> TokenScores:
    """Log-prob of every response token and entropy of the distribution it was drawn from, at ``temperature``.

    ``keep_hidden``, if given, receives on the last pipeline stage one tensor: the states that the LM head was applied
    to, ``[N, h / TP]``, of which each tensor-parallel rank keeps its part.

    Collectives: one all-gather over tensor-parallel ranks per micro-batch; one broadcast from the last pipeline stage;
    under context parallelism two all-reduces, and one of what ``keep_hidden`` receives.
    """
    packed_index = torch.cat([batch.packed_index for batch in micro_batches])
    total = int(sum_over_sequence_parts(torch.tensor(len(packed_index), device=packed_index.device)))

    def last_stage(micro_batch: MicroBatch, output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        if keep_hidden is not None:
            rank, parts = (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_world_size(),
            )
            width = output.shape[-1] // parts
            if not keep_hidden:
                keep_hidden.append(output.new_zeros(total, width, dtype=model.config.params_dtype))
            part = output[..., rank * width : (rank + 1) * width][micro_batch.rows, micro_batch.columns]
            keep_hidden[0][micro_batch.packed_index] = part.to(model.config.params_dtype)
        stats = _token_stats(model, micro_batch, output, loss, temperature)
        return torch.stack([stats.log_prob, stats.entropy])

    size = max(len(batch.tokens) for batch in micro_batches)
    outputs = _run_schedule(model, micro_batches, last_stage, micro_batch_size=size, forward_only=True)
    packed = torch.zeros(2, total, dtype=torch.float32, device=packed_index.device)
    if outputs:
        packed[:, packed_index] = torch.cat(outputs, dim=1)
        # Of every token one rank has the statistics, and the others zeros.
        sum_over_sequence_parts(packed)
        if keep_hidden:
            sum_over_sequence_parts(keep_hidden[0])
    return TokenScores(*broadcast_from_last_stage(packed))


def update(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    *,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    start_log_prob: torch.Tensor | None,
    distillation: Distillation | None,
    settings: PolicyLossConfig,
    temperature: float,
) -> UpdateResult:
    """One optimizer step on the clipped surrogate, averaged over the response tokens of all replicas.

    With ``distillation`` the loss also has ``divergence_weight * omega * D(student, teacher)`` of every token.

    Args:
        old_log_prob, advantage, start_log_prob: float32 [N], packed in the order of the micro-batches' sequences; the
            last is the
            starting model's log-prob and only read when ``settings.kl_coef`` is not 0.

    Collectives: those of Megatron's backward and optimizer, one all-gather per micro-batch for the statistics (with
    ``distillation`` another for the teacher's states, and one more for ``jsd``), and two to report.
    """

    def policy_loss(micro_batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = micro_batch.packed_index
        stats = _token_stats(model, micro_batch, output, settings, temperature, distillation)
        surrogate, clipped = policy_surrogate(
            stats.log_prob,
            old_log_prob[index],
            advantage[index],
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        )
        loss = surrogate.sum()
        kl = divergence = capped_count = torch.zeros_like(loss)
        if start_log_prob is not None:
            kl = kl_k3(stats.log_prob, start_log_prob[index]).sum()
            loss = loss + settings.kl_coef * kl
        if distillation is not None:
            term, capped = routed_divergence(
                stats.divergence, distillation.omega[index], cap=distillation.settings.divergence_cap
            )
            loss = loss + distillation.settings.divergence_weight * term.sum()
            # An infinite divergence, of which the term has taken nothing, would hide all others in the mean.
            divergence = torch.where(torch.isinf(stats.divergence), 0.0, stats.divergence).sum()
            capped_count = capped.sum()
        reported = (loss, clipped.sum(), kl, divergence, capped_count)
        return loss, _count(index), torch.stack([value.detach().to(loss.dtype) for value in reported])

    sums, *rest = _optimize(model, optimizer, micro_batches, policy_loss, num_reported=5)
    return UpdateResult(*sums.tolist(), *rest)


def supervised_update(
    model: ShardedModel, optimizer: OptimizerState, micro_batches: list[MicroBatch], settings: PolicyLossConfig
) -> tuple[float, float, float]:
    """One optimizer step on the mean negative log-likelihood of the response tokens; returns (loss in nats, gradient
    norm, lr).

    Raises:
        TrainingError: the gradient is not finite; nothing was changed.
    """

    def negative_log_likelihood(
        micro_batch: MicroBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = -_token_stats(model, micro_batch, output, settings, 1.0).log_prob.sum()
        return loss, _count(micro_batch.packed_index), loss.detach()[None]

    sums, grad_norm, lr, applied = _optimize(model, optimizer, micro_batches, negative_log_likelihood, num_reported=1)
    if not applied:
        raise TrainingError(
            f"warm start: loss {sums.item()}, gradient norm {grad_norm}: start again with a lower warm_start.lr, "
            "and check that the weights in model.path are finite"
        )
    return sums.item(), grad_norm, lr


def _count(index: torch.Tensor) -> torch.Tensor:
    return torch.tensor(index.numel(), dtype=torch.int, device=index.device)


def _optimize(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    loss_function: Callable[..., Any],
    *,
    num_reported: int,
) -> tuple[torch.Tensor, float, float, bool]:
    """Accumulate gradients over ``micro_batches`` and step; returns (means [num_reported] over the tokens of all
    replicas of the sums
    that ``loss_function`` reported, float64; gradient norm; learning rate; whether the gradients were finite and
    applied)."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.optimizer.zero_grad()
    size = max(len(batch.tokens) for batch in micro_batches)
    reports = _run_schedule(model, micro_batches, loss_function, micro_batch_size=size, forward_only=False)
    grad_norm, lr, applied = optimizer.step()
    sums = torch.zeros(num_reported + 1, dtype=torch.float64, device=micro_batches[0].tokens.device)
    if reports:
        sums[:-1] = torch.stack(reports).double().sum(0)
    broadcast_from_last_stage(sums)
    sums[-1] = sum(batch.packed_index.numel() for batch in micro_batches)
    reduce_over_replicas(sum_over_sequence_parts(sums))
    return sums[:-1] / sums[-1], grad_norm, lr, applied
