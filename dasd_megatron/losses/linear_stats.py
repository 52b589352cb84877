"""Token statistics straight from hidden states and the LM head: logits exist only one block of tokens and columns at a
time.

Every block is projected, reduced to partial sums and forgotten; the backward pass projects it again, turns it into its
own gradient and multiplies that into the gradients of hidden states and head. One more matrix product than with stored
logits buys memory that no longer grows with tokens times vocabulary.

Memory beyond inputs and outputs: one float32 block of logits (two with a teacher), float32 ``[chunk_size, h]``, and
the PyTorch kernels' buffers; for half precision inputs also a block's gradient, and without ``weight_grad`` float32
``[V_local, h]`` to sum the gradient of ``weight`` in; with entries some ``[T, k]``. Saved for the backward pass: the
inputs, at most 7 numbers per token, and the ids.

Matrix products: 1 forward and 3 backward, 2 for tokens whose logits are kept; with a teacher 2 and 4, or 3. ``jsd`` and
``entry_clip`` project both a second time in the forward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dasd_megatron.losses.kernels import Kernels, choose_kernels
from dasd_megatron.losses.statistics import (
    Distribution,
    EntryStats,
    Objective,
    Saved,
    Shard,
    TokenStats,
    TopK,
    finish,
    gradient_coefficients,
    make_objective,
    make_shard,
    merge_partials,
)
from dasd_megatron.losses.token_stats import FLOATING, to_outputs
from dasd_megatron.losses.top_k import GivenEntries, LargestEntries, entry_log_probs, local_entries
from dasd_megatron.losses.torch_kernels import accumulator


class GradientSum(NamedTuple):
    """A sum of a weight's gradients that somebody else keeps, as Megatron does in ``main_grad``."""

    total: Tensor
    """``[V_local, h]``, float32 (float64 for float64 weights): gradients are added to it in place."""
    finish: Callable[[], Tensor | None]
    """Called when a gradient has been added. What it returns goes on to autograd in place of the gradient."""


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
    inplace_backward: bool = False,
    reduce_hidden_grad: bool = True,
    weight_grad: GradientSum | None = None,
    keep_bytes: int = 0,
    check_targets: bool = True,
    jsd_weight: float = 0.5,
    entry_clip: float | None = None,
    top_k: int | None = None,
    entry_ids: Tensor | None = None,
    implementation: str = "auto",
) -> TokenStats | EntryStats:
    """:func:`~dasd_megatron.losses.vocab_parallel_token_stats` of the logits ``hidden @ weight.T``, which are never
    materialised.

    Args:
        hidden: ``[T, h]``, bfloat16, float16, float32 or float64; what the LM head is applied to, the same on every
            rank of the group.
        weight: ``[V_local, h]``, same dtype; this rank's contiguous shard of the LM head, rank order = group order,
            equal sizes.
        targets: ``[T]`` int64 global token ids, the same on every rank.
        teacher_hidden: ``[T, h_teacher]`` or None. Never receives a gradient.
        teacher_weight: ``[V_local, h_teacher]``, the teacher's head, sharded the same way; None: ``weight`` as it is
            now. No gradient.
        divergence, group, vocab_size, temperature, check_targets, jsd_weight, entry_clip, implementation: as there.
            Padded rows of ``weight`` get gradient 0.
        top_k: number of most probable entries to return, the largest first.
        entry_ids: ``[T, k]`` global ids, -1 for no entry, of entries to return; the same on every rank. Not with
            ``top_k``.
        chunk_size, vocab_chunk_size: tokens and columns of one block; None: BLOCK_TOKENS and BLOCK_COLUMNS.
        inplace_backward: the backward pass writes the gradient of ``hidden`` into its storage.
        reduce_hidden_grad: sum the gradient of ``hidden`` over the group, as a column-parallel layer does. False leaves
            each rank its own part of the sum, for a caller that reduces it itself: under sequence parallelism the
            reduce-scatter that belongs to the all-gather of ``hidden`` does.
        keep_bytes: logits of as many tokens as fit are kept for the backward pass, which does not project these again;
            not where ``entry_ids`` is given. Those of half precision inputs are kept in it, less their block's maximum.
        weight_grad: a sum that the gradient of ``weight`` is added to; None: autograd gets the gradient.

    Returns:
        TokenStats like there, EntryStats where ``top_k`` or ``entry_ids`` is given. ``log_prob``, ``entropy``,
        ``divergence`` and ``top.log_prob`` carry gradients to ``hidden`` and ``weight``. Logits of half precision
        inputs are kept in float32, and the gradient of a block of logits is rounded to the inputs' dtype for its two
        matrix products, whose sums are kept in float32.

    Collectives: forward as there, one all-gather (two for ``jsd`` and ``entry_clip``), for ``top_k`` two more of
    ``[T, k]``, for ``entry_ids`` one all-reduce of it. Backward: one all-reduce of ``[T, h]``, none without
    ``reduce_hidden_grad``, in a group of one, or where hidden needs no gradient.

    Raises:
        ValueError: as there, and on hidden states and weights that do not fit each other.
    """
    objective = make_objective(divergence, jsd_weight, entry_clip)
    _check_linear("hidden", hidden, "weight", weight, targets)
    teacher = _checked_teacher(weight, targets, teacher_hidden, teacher_weight)
    shard = make_shard(len(weight), targets, vocab_size, group, temperature, check_targets=check_targets)
    _check_weight_grad(weight, weight_grad)
    _check_sizes(targets, entry_ids, top_k=top_k, chunk_size=chunk_size, vocab_chunk_size=vocab_chunk_size)
    blocks = _Blocks(shard, chunk_size or BLOCK_TOKENS, vocab_chunk_size or BLOCK_COLUMNS)
    # The kernels see contiguous blocks in float32 (float64), and choose themselves how many rows they take at once.
    block = torch.empty(0, dtype=accumulator(hidden), device=hidden.device)
    kernels = choose_kernels(implementation, (block,), None, objective)
    reduces = reduce_hidden_grad and shard.group is not None
    keep_bytes = keep_bytes if torch.is_grad_enabled() and entry_ids is None else 0
    settings = _Settings(shard, blocks, kernels, objective, inplace_backward, reduces, weight_grad, keep_bytes, top_k)
    apply: Callable[..., tuple[Any, ...]] = _LinearTokenStats.apply
    *stats, ids, log_prob = apply(hidden, weight, *(teacher or (None, None)), entry_ids, settings)
    return TokenStats(*stats) if ids is None else EntryStats._make([*stats, TopK(ids, log_prob)])


# One float32 block is 32 MiB: enough work for a matrix product to run at full speed, and little beside the layers'
# activations.
BLOCK_TOKENS = 1024
BLOCK_COLUMNS = 8192


class _Linear(NamedTuple):
    hidden: Tensor
    weight: Tensor


class _Blocks(NamedTuple):
    """The division of one rank's ``[T, V_local]`` logits into blocks."""

    shard: Shard
    tokens: int
    columns: int

    def rows(self) -> Iterator[slice]:
        total = self.shard.targets.numel()
        return (slice(start, min(start + self.tokens, total)) for start in range(0, total, self.tokens))

    def column_ranges(self) -> Iterator[slice]:
        total = self.shard.columns
        return (slice(start, min(start + self.columns, total)) for start in range(0, total, self.columns))


class _Settings(NamedTuple):
    shard: Shard
    blocks: _Blocks
    kernels: Kernels
    objective: Objective
    inplace_backward: bool
    reduces_hidden_grad: bool
    weight_grad: GradientSum | None
    keep_bytes: int
    top_k: int | None


def _checked_teacher(
    weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None
) -> _Linear | None:
    """Return the teacher without gradient; ValueError where it does not fit ``weight`` and ``targets``."""
    if teacher_hidden is None:
        if teacher_weight is not None:
            raise ValueError("teacher_weight is given without teacher_hidden; give both, or teacher_hidden alone")
        return None
    teacher = _Linear(teacher_hidden.detach(), (weight if teacher_weight is None else teacher_weight).detach())
    _check_linear("teacher_hidden", teacher.hidden, "teacher_weight", teacher.weight, targets)
    if len(teacher.weight) != len(weight):
        raise ValueError(
            f"teacher_weight has {len(teacher.weight)} rows and weight {len(weight)}; it needs the same "
            "vocabulary and sharding"
        )
    return teacher


def _check_weight_grad(weight: Tensor, weight_grad: GradientSum | None) -> None:
    if weight_grad is None:
        return
    total, wanted = weight_grad.total, accumulator(weight)
    if total.shape != weight.shape or total.dtype != wanted or total.device != weight.device:
        raise ValueError(
            f"weight_grad is {total.dtype} {tuple(total.shape)} on {total.device}; expected {wanted} "
            f"{tuple(weight.shape)} on {weight.device}"
        )


def _check_sizes(targets: Tensor, entry_ids: Tensor | None, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1, or None")
    if entry_ids is None:
        return
    if sizes["top_k"] is not None:
        raise ValueError("top_k and entry_ids are both given; expected at most one of them")
    if entry_ids.dim() != 2 or len(entry_ids) != len(targets) or entry_ids.is_floating_point():
        raise ValueError(
            f"entry_ids is {entry_ids.dtype} {tuple(entry_ids.shape)}; expected integers [{len(targets)}, entries]"
        )


def _check_linear(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor, targets: Tensor) -> None:
    for name, tensor in ((hidden_name, hidden), (weight_name, weight)):
        if tensor.dim() != 2 or 0 in tensor.shape[1:]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected two dimensions, the last of the hidden size"
            )
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected bfloat16, float16, float32 or float64")
        if tensor.device != targets.device:
            raise ValueError(f"{name} is on {tensor.device} and targets on {targets.device}; expected one device")
    if len(weight) == 0:
        raise ValueError(f"{weight_name} has no rows; expected this rank's shard of the vocabulary")
    if hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{hidden_name} is {hidden.dtype} {tuple(hidden.shape)} and {weight_name} {weight.dtype} "
            f"{tuple(weight.shape)}; expected one dtype and one hidden size"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; {hidden_name} of {len(hidden)} tokens need [{len(hidden)}]"
        )


def _matmul(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Compute ``left @ right`` into float32 or wider ``out``, accumulated in its precision, or added to it."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    if not left.is_cuda:
        return _matmul(left.to(out.dtype), right.to(out.dtype), out, add=add)
    if not add:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    if _adds_wider(left.device, left.dtype, out.dtype):
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(left, right, out_dtype=out.dtype))


@functools.cache
def _adds_wider(device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Return whether torch adds a product of ``dtype`` to a sum of ``out_dtype`` in one kernel on this device. Its
    first release with ``out_dtype`` wants a sum of the factors' type, and other devices have no such kernel."""
    factor, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, dtype=out_dtype, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=out_dtype, out=total)
    except RuntimeError:
        return False
    return True


class _Projector:
    """Blocks of logits of one head, in a buffer that every block shares."""

    def __init__(self, linear: _Linear, blocks: _Blocks) -> None:
        self.linear = linear
        tokens, columns = min(blocks.tokens, len(linear.hidden)), min(blocks.columns, blocks.shard.columns)
        self.buffer = torch.empty(tokens * columns, dtype=accumulator(linear.hidden), device=linear.hidden.device)

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        out = self.buffer[: shape[0] * shape[1]].view(shape)
        return _matmul(self.linear.hidden[rows], self.linear.weight[columns].t(), out)


class _Kept(NamedTuple):
    """Logits of one block, for half precision inputs in their dtype and less ``maximum`` ``[rows]``, that of each row
    in the block."""

    logits: Tensor
    maximum: Tensor | None


class _KeptLogits:
    """Blocks of logits that the forward pass leaves to the backward pass, of the first tokens that fit.

    A logit of half precision is off by 2^-9 of its distance from the block's maximum, and its probability by at most
    0.37 times that of the largest one. Rounded as it is, it would be off by 2^-9 of its size.
    """

    def __init__(self, hidden: Tensor, settings: _Settings) -> None:
        self.dtype = hidden.dtype
        self.tokens = settings.keep_bytes // max(settings.shard.columns * hidden.itemsize, 1)
        self.blocks: dict[tuple[int, int], _Kept] = {}

    def keep(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Keep a block if all of its rows fit. The block is overwritten."""
        if rows.stop > self.tokens:
            return
        if block.dtype == self.dtype:
            kept = _Kept(block.clone(), None)
        else:
            maximum = block.amax(1)
            # A row of padding alone has no maximum to be counted from.
            maximum = torch.where(maximum == -math.inf, 0.0, maximum)
            kept = _Kept(block.sub_(maximum[:, None]).to(self.dtype), maximum)
        self.blocks[rows.start, columns.start] = kept

    def take(self, rows: slice, columns: slice) -> _Kept | None:
        """Return a block that has been kept, once: it becomes its own gradient. A second backward pass finds none."""
        return self.blocks.pop((rows.start, columns.start), None)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
        entry_ids: Tensor | None, settings: _Settings,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        student = _Projector(_Linear(hidden, weight), settings.blocks)
        teacher, second_sums = None, None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = _Projector(_Linear(teacher_hidden, teacher_weight), settings.blocks)
            second_sums = functools.partial(_second_sums, student, teacher, settings)
        entries: LargestEntries | GivenEntries | None = None
        if settings.top_k is not None:
            entries = LargestEntries(settings.top_k, settings.shard, student.buffer.dtype)
        elif entry_ids is not None:
            entries = GivenEntries(entry_ids, settings.shard, student.buffer.dtype)
        ctx.kept = _KeptLogits(hidden, settings)
        partials = _partials(student, teacher, settings, entries, ctx.kept)
        finished = finish(partials, settings.objective, settings.shard, second_sums)
        ids = log_probs = None
        if entries is not None:
            ids, log_probs = entry_log_probs(*entries.finish(), *finished.student, settings.shard.inverse_temperature)
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, ids, *Saved.of(finished).tensors())
        return *to_outputs(ctx, finished, partials.dtype, ids), ids, log_probs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
        _: Tensor | None,
        grad_divergence: Tensor | None,
        __: Tensor | None,
        grad_entries: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, ids, *saved = ctx.saved_tensors
        shard, blocks, kernels, objective, inplace, reduces, weight_sum = ctx.settings[:7]
        gradients = (grad_log_prob, grad_entropy, grad_divergence)
        coefficients = gradient_coefficients(
            Saved.from_tensors(saved), objective, shard.inverse_temperature, *gradients
        )
        if grad_entries is not None:
            # The gradient of log p_i is 1[v = i] - p_v, times the incoming one.
            grad_entries = torch.where(ids < 0, 0.0, grad_entries.double() * shard.inverse_temperature)
            coefficients = coefficients._replace(constant=coefficients.constant - grad_entries.sum(-1))
        student = _Projector(_Linear(hidden, weight), blocks)
        # Only a divergence's gradient depends on the teacher.
        teacher = None if grad_divergence is None else _Projector(_Linear(teacher_hidden, teacher_weight), blocks)
        dtype = student.buffer.dtype
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = hidden.detach() if inplace else torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=dtype) if weight_sum is None else weight_sum.total
        for rows in blocks.rows():
            row_grad = torch.zeros(rows.stop - rows.start, hidden.shape[1], dtype=dtype, device=hidden.device)
            row_coefficients = coefficients.of_rows(rows).arguments()
            for columns in blocks.column_ranges():
                kept = ctx.kept.take(rows, columns)
                block = student(rows, columns) if kept is None else kept.logits
                if kept is not None and kept.maximum is not None:
                    row_coefficients["p_max"] = coefficients.p_max[rows] - kept.maximum
                # The block becomes its own gradient; for half precision inputs in their dtype, in which the matrix
                # units are fast. With entries it is rounded later, since their part cancels nearly all of the rest
                # where the policy is certain.
                rounds_later = block.dtype == hidden.dtype or grad_entries is not None
                gradient = block if rounds_later else torch.empty_like(block, dtype=hidden.dtype)
                kernels.backward(
                    block, None if teacher is None else teacher(rows, columns), gradient, shard.targets[rows],
                    columns=columns.stop - columns.start, first_column=shard.first_column + columns.start,
                    inverse_temperature=shard.inverse_temperature, **row_coefficients,
                )  # fmt: skip
                if grad_entries is not None:
                    index, owned = local_entries(ids[rows], shard, columns)
                    gradient.scatter_add_(1, index, torch.where(owned, grad_entries[rows], 0.0).to(gradient.dtype))
                    gradient = gradient.to(hidden.dtype)
                if grad_hidden is not None:
                    _matmul(gradient, weight[columns], row_grad, add=True)
                if grad_weight is not None:
                    _matmul(gradient.t(), hidden[rows], grad_weight[columns], add=True)
            if grad_hidden is not None:
                grad_hidden[rows] = row_grad
        if grad_hidden is not None and reduces:
            dist.all_reduce(grad_hidden, group=shard.group)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype) if weight_sum is None else weight_sum.finish()
        return grad_hidden, grad_weight, None, None, None, None


def _partials(
    student: _Projector,
    teacher: _Projector | None,
    settings: _Settings,
    entries: LargestEntries | GivenEntries | None,
    kept: _KeptLogits,
) -> Tensor:
    """Return this rank's partial sums ``[n, T]``, made block by block; ``entries`` reads every block, and ``kept``
    keeps what it can."""
    shard, blocks, kernels, objective = settings[:4]
    parts = []
    for rows in blocks.rows():
        row_parts = []
        for columns in blocks.column_ranges():
            block = student(rows, columns)
            part = kernels.local_partials(
                block, None if teacher is None else teacher(rows, columns), shard.targets[rows],
                columns=columns.stop - columns.start, first_column=shard.first_column + columns.start,
                inverse_temperature=shard.inverse_temperature, divergence=objective.divergence.name,
            )  # fmt: skip
            row_parts.append(part)
            if entries is not None:
                entries.read(block, rows, columns)
            kept.keep(block, rows, columns)
        if row_parts:
            parts.append(merge_partials(torch.stack(row_parts), objective.divergence, shard.inverse_temperature))
    if parts:
        return torch.cat(parts, dim=1)
    # There are no tokens, or the shard is all padding.
    empty = student.buffer.new_zeros(len(shard.targets), 0)
    return kernels.local_partials(
        empty, None if teacher is None else empty, shard.targets, columns=0, first_column=shard.first_column,
        inverse_temperature=shard.inverse_temperature, divergence=objective.divergence.name,
    )  # fmt: skip


def _second_sums(student: _Projector, teacher: _Projector, settings: _Settings, *distributions: Distribution) -> Tensor:
    """Return this rank's sums of the second pass ``[2, T]``, made block by block, for the student's and the teacher's
    distribution."""
    shard, blocks, kernels = settings[:3]
    sums = student.buffer.new_zeros(2, len(shard.targets))
    for rows in blocks.rows():
        row_distributions = [values[rows] for distribution in distributions for values in distribution]
        for columns in blocks.column_ranges():
            sums[:, rows] += kernels.second_sums(
                student(rows, columns), teacher(rows, columns), *row_distributions,
                columns=columns.stop - columns.start, inverse_temperature=shard.inverse_temperature,
            )  # fmt: skip
    return sums
