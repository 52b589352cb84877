"""Passes of the model over micro-batches through Megatron's pipeline schedules: scoring without gradient, and
updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from dasd_megatron import backend
from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig
from dasd_megatron.losses import (
    EntryStats,
    TokenStats,
    TopK,
    linear_token_stats,
    top_k_divergence,
    vocab_parallel_token_stats,
)
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.training.batching import MicroBatch
from dasd_megatron.training.optimizer import OptimizerState, TrainingError
from dasd_megatron.training.parallel import broadcast_from_last_stage, reduce_over_replicas, sum_over_sequence_parts
from dasd_megatron.training.policy_loss import (
    PolicyTargets,
    TokenLoss,
    over_teacher_tokens,
    policy_loss,
)
from dasd_megatron.training.scores import TeacherEntries, TeacherStates, TokenScores

BatchLoss = Callable[[TokenStats, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""A :data:`~dasd_megatron.training.policy_loss.TokenLoss` that is given the micro-batch of the tokens."""


class UpdateResult(NamedTuple):
    """One optimizer step: ``means`` over the response tokens of all replicas, by the names that the loss reported, and
    what the optimizer reported. ``applied`` is False where the gradient norm was not finite, and nothing was
    changed."""

    means: dict[str, float]
    grad_norm: float
    lr: float
    applied: bool


def _token_stats(
    model: ShardedModel,
    micro_batch: MicroBatch,
    output: torch.Tensor,
    loss: PolicyLossConfig,
    temperature: float,
    teacher: TeacherStates | TeacherEntries | None = None,
    algorithm: AlgorithmConfig | None = None,
    *,
    top_k: int | None = None,
    entry_ids: torch.Tensor | None = None,
) -> TokenStats | EntryStats:
    """Compute the statistics of a micro-batch's response tokens from the last stage's output; see
    :class:`ShardedModel`. With a ``teacher`` the section ``algorithm`` says which divergence from it is wanted.
    ``top_k`` and ``entry_ids`` ask for entries of the vocabulary, as
    :func:`~dasd_megatron.losses.linear_token_stats` does."""
    rows = output[micro_batch.rows, micro_batch.columns]
    if not model.fused_linear:
        # The rows are a copy of ours, so their gradient may take their place.
        return vocab_parallel_token_stats(
            rows,
            micro_batch.targets,
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=model.vocab_size,
            temperature=temperature,
            inplace_backward=True,
            check_targets=False,
        )
    linear_stats = partial(
        _linear_stats,
        *(model, rows, model.head_weight(), micro_batch.targets, loss, temperature),
        weight_grad=model.head_gradient() if torch.is_grad_enabled() else None,
    )
    if teacher is None or algorithm is None:
        return linear_stats(top_k=top_k, entry_ids=entry_ids)
    objective: dict[str, Any] = dict(
        divergence=algorithm.divergence, jsd_weight=algorithm.jsd_weight, entry_clip=algorithm.divergence_entry_clip
    )
    if isinstance(teacher, TeacherStates):
        states = teacher.of(micro_batch.packed_index)
        return linear_stats(teacher_hidden=states, teacher_weight=teacher.weight, **objective)
    entries = teacher.of(micro_batch.packed_index)
    stats = linear_stats(entry_ids=entries.ids)
    assert isinstance(stats, EntryStats), "it was asked for entries"
    divergence = top_k_divergence(stats.top.log_prob, entries.log_prob, tail=algorithm.divergence_tail, **objective)
    return TokenStats(stats.log_prob, stats.entropy, None, divergence)


def _linear_stats(
    model: ShardedModel,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: PolicyLossConfig,
    temperature: float,
    *,
    top_k: int | None = None,
    **others: Any,
) -> TokenStats | EntryStats:
    """Compute the statistics of ``targets`` from hidden states and this rank's shard of an LM head."""
    if top_k is not None:
        # Places beyond the vocabulary would take memory and hold no entry.
        top_k = min(top_k, model.vocab_size)
    return linear_token_stats(
        # Megatron hands the last stage's output over in float32; the values are those of the model's own dtype.
        hidden.to(weight.dtype),
        weight,
        targets,
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_size=model.vocab_size,
        temperature=temperature,
        chunk_size=loss.block_tokens or backend.current().loss_block_tokens(loss.block_columns),
        vocab_chunk_size=loss.block_columns,
        reduce_hidden_grad=not model.config.sequence_parallel,
        keep_bytes=backend.current().kept_logits_bytes() if loss.keep_logits else 0,
        check_targets=False,
        top_k=top_k,
        **others,
    )


def _packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams | None:
    if micro_batch.starts is None:
        return None
    starts, longest = micro_batch.starts, micro_batch.longest
    return PackedSeqParams(
        "thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def run_schedule(
    model: ShardedModel, micro_batches: list[MicroBatch], last_stage: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    """Run all micro-batches forward (and backward); returns what ``last_stage(micro_batch, output)`` reported, in
    order, on the last pipeline stage, and nothing elsewhere.

    Raises:
        ValueError: a response token is outside the vocabulary; on all ranks of the replica.
    """
    # The statistics are made without this check, which would wait for the device at every micro-batch.
    for batch in micro_batches:
        if batch.least_target < 0 or batch.largest_target >= model.vocab_size:
            raise ValueError(
                f"response tokens of a micro-batch range from {batch.least_target} to {batch.largest_target}, outside "
                f"the vocabulary of {model.vocab_size}"
            )

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
        micro_batch_size=max(len(batch.tokens) for batch in micro_batches),
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
    top_k: int | None = None,
    entry_ids: torch.Tensor | None = None,
) -> TokenScores:
    """Return the log-prob of every response token and the entropy of the distribution it was drawn from, at
    ``temperature``.

    ``top_k``: also the most probable entries of the vocabulary; ``entry_ids``: also the log-probs of these, [N, k] on
    the last pipeline stage. Either needs ``loss.fused_linear``.

    Collectives: one all-gather over tensor-parallel ranks per micro-batch, with ``top_k`` two more and with
    ``entry_ids`` an all-reduce; one broadcast from the last pipeline stage; under context parallelism two all-reduces,
    and two of entries.
    """

    def last_stage(micro_batch: MicroBatch, output: torch.Tensor, non_loss_data: bool) -> TokenStats | EntryStats:
        ids = None if entry_ids is None else entry_ids[micro_batch.packed_index]
        return _token_stats(model, micro_batch, output, loss, temperature, top_k=top_k, entry_ids=ids)

    return _packed_scores(micro_batches, run_schedule(model, micro_batches, last_stage, forward_only=True))


@torch.no_grad()
def hidden_states(model: ShardedModel, micro_batches: list[MicroBatch]) -> torch.Tensor | None:
    """Return the states that the LM head is applied to, of every response token: ``[N, h / TP]`` in the model's dtype,
    each tensor-parallel rank's part, on the last pipeline stage, and None elsewhere. ``loss.fused_linear`` is needed.

    Collectives: under context parallelism two all-reduces.
    """
    width = model.config.hidden_size // parallel_state.get_tensor_model_parallel_world_size()
    begin = parallel_state.get_tensor_model_parallel_rank() * width
    total, device = response_tokens(micro_batches), micro_batches[0].tokens.device
    hidden = None
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        hidden = torch.zeros(total, width, dtype=model.config.params_dtype, device=device)

    def last_stage(micro_batch: MicroBatch, output: torch.Tensor, non_loss_data: bool) -> None:
        assert hidden is not None
        part = output[..., begin : begin + width][micro_batch.rows, micro_batch.columns]
        hidden[micro_batch.packed_index] = part.to(hidden.dtype)

    run_schedule(model, micro_batches, last_stage, forward_only=True)
    # One rank has the states of a token, and the others have zeros.
    return None if hidden is None else sum_over_sequence_parts(hidden)


@torch.no_grad()
def score_states(
    model: ShardedModel,
    micro_batches: list[MicroBatch],
    loss: PolicyLossConfig,
    states: TeacherStates | None,
    *,
    temperature: float,
    top_k: int | None = None,
    entry_ids: torch.Tensor | None = None,
) -> TokenScores:
    """Return what :func:`score` does, of the states of a teacher on the last pipeline stage and not of a pass of the
    model; ``states`` is None elsewhere.

    Collectives: those of :func:`score`, and another all-gather per micro-batch for each part of the states.
    """
    stats = []
    if states is not None:
        for micro_batch in micro_batches:
            hidden = states.of(micro_batch.packed_index)
            ids = None if entry_ids is None else entry_ids[micro_batch.packed_index]
            arguments = (model, hidden, states.weight, micro_batch.targets, loss, temperature)
            stats.append(_linear_stats(*arguments, top_k=top_k, entry_ids=ids))
    return _packed_scores(micro_batches, stats)


def response_tokens(micro_batches: list[MicroBatch]) -> int:
    """Return the number of response tokens of all ranks that share the sequences."""
    own = sum(batch.packed_index.numel() for batch in micro_batches)
    return int(sum_over_sequence_parts(torch.tensor(own, device=micro_batches[0].tokens.device)))


def _packed_scores(micro_batches: list[MicroBatch], stats: Sequence[TokenStats | EntryStats]) -> TokenScores:
    """Return the statistics of micro-batches in the order of the callers' sequences. ``stats``: one for each on the
    last pipeline stage, none elsewhere."""
    packed_index = torch.cat([batch.packed_index for batch in micro_batches])
    total, device = response_tokens(micro_batches), packed_index.device
    packed, top = torch.zeros(2, total, dtype=torch.float32, device=device), None
    if stats:
        outputs = [torch.stack([part.log_prob, part.entropy]) for part in stats]
        packed[:, packed_index] = torch.cat(outputs, dim=1)
        # One rank has the statistics of a token, and the others have zeros.
        sum_over_sequence_parts(packed)
        tops = [part.top for part in stats if isinstance(part, EntryStats)]
        if tops:
            ids, log_prob = (torch.cat(values) for values in zip(*tops, strict=True))
            top = TopK(
                torch.zeros(total, ids.shape[1], dtype=torch.int32, device=device),
                torch.zeros(total, ids.shape[1], dtype=torch.float32, device=device),
            )
            top.ids[packed_index], top.log_prob[packed_index] = ids.int(), log_prob
            for values in top:
                sum_over_sequence_parts(values)
    log_prob, entropy = broadcast_from_last_stage(packed)
    return TokenScores(log_prob, entropy, top)


def update(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    targets: PolicyTargets,
    settings: PolicyLossConfig,
    *,
    temperature: float,
) -> UpdateResult:
    """Take one optimizer step on the policy loss of the response tokens of all replicas; ``means`` is what
    :func:`~dasd_megatron.training.policy_loss.policy_loss` reports.

    Collectives: those of Megatron's backward and optimizer, one all-gather per micro-batch for the statistics (with
    distillation another for the teacher's states, and one more for ``jsd`` and clipped entries), those of the loss, and
    two to report.
    """
    distributed = parallel_state.get_context_parallel_world_size() > 1
    group = parallel_state.get_context_parallel_group() if distributed else None

    teacher = algorithm = None
    if targets.distillation is not None:
        teacher, algorithm = targets.distillation.teacher, targets.distillation.settings

    def token_stats(micro_batch: MicroBatch, output: torch.Tensor) -> TokenStats:
        return TokenStats(*_token_stats(model, micro_batch, output, settings, temperature, teacher, algorithm)[:4])

    token_loss = policy_loss(targets, settings, group=group)
    batch_loss = _by_tokens(token_loss)
    reports = _accumulate(model, optimizer, micro_batches, token_stats, batch_loss)
    result = _apply(optimizer, micro_batches, batch_loss, reports)
    return result._replace(means=over_teacher_tokens(result.means))


class SharedPass(NamedTuple):
    """The scores of an update's rollouts by the weights before it, and the update; None where its gradients were not to
    be applied."""

    scores: TokenScores
    result: UpdateResult | None


def score_and_update(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    batch_loss: BatchLoss,
    settings: PolicyLossConfig,
    *,
    temperature: float,
    teacher: TeacherStates | TeacherEntries | None,
    algorithm: AlgorithmConfig,
    accept: Callable[[TokenScores], bool],
) -> SharedPass:
    """Score rollouts and take one optimizer step on them, in one forward pass; what :func:`score` and :func:`update` do
    in two.

    Args:
        teacher: for the distributional objective, on the last pipeline stage.
        accept: is given the scores, on every rank alike, when the gradients are there and before they are applied. They
            are not where it returns False or raises, and the next update clears them.

    Collectives: those of :func:`update`, and one broadcast of the scores from the last pipeline stage. Context
    parallelism is not for it: every rank needs whole rollouts.
    """

    def token_stats(micro_batch: MicroBatch, output: torch.Tensor) -> TokenStats:
        return TokenStats(*_token_stats(model, micro_batch, output, settings, temperature, teacher, algorithm)[:4])

    reports = _accumulate(model, optimizer, micro_batches, token_stats, batch_loss)
    scores = _packed_scores(micro_batches, [report.stats for report in reports])
    if not accept(scores):
        return SharedPass(scores, None)
    result = _apply(optimizer, micro_batches, batch_loss, reports)
    return SharedPass(scores, result._replace(means=over_teacher_tokens(result.means)))


def supervised_update(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    settings: PolicyLossConfig,
    *,
    token_weights: torch.Tensor | None = None,
) -> UpdateResult:
    """Take one optimizer step on the mean negative log-likelihood of the response tokens; ``means`` has the loss, in
    nats.

    Args:
        token_weights: float32 [N], factors of the tokens' losses before the mean is taken over the tokens of all
            replicas, packed in the order of the micro-batches' sequences; None: 1.

    Raises:
        TrainingError: the gradient is not finite; nothing was changed.
    """

    def negative_log_likelihood(stats: TokenStats, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_prob = stats.log_prob if token_weights is None else stats.log_prob * token_weights[index]
        loss = -log_prob.sum()
        return loss, {"loss": loss}

    def token_stats(micro_batch: MicroBatch, output: torch.Tensor) -> TokenStats:
        return TokenStats(*_token_stats(model, micro_batch, output, settings, 1.0)[:4])

    batch_loss = _by_tokens(negative_log_likelihood)
    reports = _accumulate(model, optimizer, micro_batches, token_stats, batch_loss)
    result = _apply(optimizer, micro_batches, batch_loss, reports)
    if not result.applied:
        raise TrainingError(
            f"warm start: loss {result.means['loss']}, gradient norm {result.grad_norm}: start again with a lower "
            "warm_start.lr, and check that the weights in model.path are finite"
        )
    return result


class _Report(NamedTuple):
    """Results of a micro-batch on the last stage: sums over its tokens by name, and their statistics."""

    sums: dict[str, torch.Tensor]
    stats: TokenStats


def _by_tokens(token_loss: TokenLoss) -> BatchLoss:
    return lambda stats, micro_batch: token_loss(stats, micro_batch.packed_index)


def _accumulate(
    model: ShardedModel,
    optimizer: OptimizerState,
    micro_batches: list[MicroBatch],
    token_stats: Callable[[MicroBatch, torch.Tensor], TokenStats],
    batch_loss: BatchLoss,
) -> list[_Report]:
    """Make the gradients of ``batch_loss`` over ``micro_batches``, in place of those of an earlier update; returns a
    report of each on the last pipeline stage, and nothing elsewhere."""

    def last_stage(micro_batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Report]:
        index = micro_batch.packed_index
        stats = token_stats(micro_batch, output)
        loss, sums = batch_loss(stats, micro_batch)
        count = torch.tensor(index.numel(), dtype=torch.int, device=index.device)
        kept = TokenStats(stats.log_prob.detach(), stats.entropy.detach(), None, None)
        return loss, count, _Report({name: value.detach().to(loss.dtype) for name, value in sums.items()}, kept)

    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.optimizer.zero_grad()
    return run_schedule(model, micro_batches, last_stage, forward_only=False)


def _apply(
    optimizer: OptimizerState, micro_batches: list[MicroBatch], batch_loss: BatchLoss, reports: list[_Report]
) -> UpdateResult:
    """Take an optimizer step on the gradients that :func:`_accumulate` has made."""
    step = optimizer.step()
    count = sum(batch.packed_index.numel() for batch in micro_batches)
    names = _reported_names(batch_loss, micro_batches[0].tokens.device)
    means = _means_by_name(names, [report.sums for report in reports], count)
    return UpdateResult(means, step.grad_norm, step.lr, step.applied)


def _reported_names(batch_loss: BatchLoss, device: torch.device) -> list[str]:
    """Return the names of the sums that a loss reports, in its order. Pipeline stages before the last compute no loss
    and have to know the names all the same: the loss of no tokens has them too."""
    nothing, nowhere = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    empty = MicroBatch(*(nowhere,) * 6, sequences=nowhere)
    with torch.no_grad():
        _, sums = batch_loss(TokenStats(nothing, nothing, nothing, nothing), empty)
    return list(sums)


def _means_by_name(names: list[str], reports: list[dict[str, torch.Tensor]], count: int) -> dict[str, float]:
    """Average the micro-batches' sums over the response tokens of all replicas, in float64.

    ``reports``: one for each micro-batch on the last pipeline stage, none elsewhere; ``count``: response tokens of this
    rank. Collectives: one broadcast from the last pipeline stage and one all-reduce over replicas, under context
    parallelism another.
    """
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=backend.current().device())
    if reports:
        rows = [torch.stack([report[name] for name in names]) for report in reports]
        sums[:-1] = torch.stack(rows).double().sum(0)
    broadcast_from_last_stage(sums)
    sums[-1] = count
    reduce_over_replicas(sum_over_sequence_parts(sums))
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))
