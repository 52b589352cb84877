"""Per-token statistics of vocabulary-parallel logits: log-prob, entropy and full-vocabulary divergence, with
closed-form gradients.

The derivation stands in docs/loss.md. Nothing of the logits' size is saved but the logits, and nothing of it is made
but their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dasd_megatron.losses.kernels import Kernels, choose_kernels
from dasd_megatron.losses.statistics import (
    Distribution,
    Finished,
    Objective,
    Saved,
    Shard,
    TokenStats,
    finish,
    gradient_coefficients,
    make_objective,
    make_shard,
)

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def vocab_parallel_token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    divergence: str = "reverse_kl",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    inplace_backward: bool = False,
    check_targets: bool = True,
    jsd_weight: float = 0.5,
    entry_clip: float | None = None,
    implementation: str = "auto",
) -> TokenStats:
    """Log-prob of the target, entropy, teacher log-prob of the target and divergence, over the full vocabulary, per
    token.

    With p the student's and q the teacher's distribution of ``logits / temperature``, ``divergence`` is one of

    - ``reverse_kl``  KL(p || q)
    - ``forward_kl``  KL(q || p)
    - ``jsd``         w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w = ``jsd_weight``, between 0 and 1

    Args:
        logits: ``[T, V_local]``, bfloat16, float16, float32 or float64; this rank's contiguous vocabulary shard, rank
            order = group order, shards of equal width. Unchanged by the forward pass.
        targets: ``[T]`` int64 global token ids, the same on every rank.
        teacher_logits: ``[T, V_local]``, sharded the same way, any of these dtypes, or None. Never receives a gradient.
        group: tensor-parallel process group; None: this process holds the whole vocabulary.
        vocab_size: true vocabulary size; columns at or past it are padding, are not read, carry no mass and get
            gradient 0. A shard may be all padding. None: all columns of all shards.
        temperature: the logits are divided by it; > 0. Gradients are those with respect to the undivided logits.
        chunk_size: tokens that the PyTorch kernels work on at once; None chooses by the size of the device's L2 cache,
            at least one per CPU thread. Beyond the outputs and the gradient, memory is at most five buffers of
            ``chunk_size x V_local`` in float32, and none with Triton.
        inplace_backward: the backward pass writes the gradient into the storage of ``logits`` instead of allocating it.
            Then nothing else may read the logits afterwards; autograd raises where something it saved has been
            overwritten.
        check_targets: refuse targets outside the vocabulary, which reads two numbers back from the device: one
            synchronisation a call. False: the caller has looked, where the ids were still on the host. A target outside
            the vocabulary then counts as a logit of 0, and gets no gradient.
        jsd_weight: the mixture's weight of the student, w above.
        entry_clip: bound in nats on what each entry of the vocabulary adds to the divergence, above 0, as in OPSD's
            ``jsd_token_clip``: the divergence is then ``sum_v min(k_v, entry_clip)`` of the summands k of its formula,
            and an entry beyond the bound has no gradient of its own. Summands may be negative, and so may a clipped
            Kullback-Leibler divergence; one that would be infinite is finite. None: no bound.
        implementation: ``torch``, ``triton``, or ``auto``: Triton for CUDA tensors where it is installed, PyTorch for
            all others.

    Returns:
        TokenStats; without a teacher its last two are None. ``log_prob``, ``entropy`` and ``divergence`` carry
        gradients to ``logits``. Statistics are accumulated in float32 (float64 for float64 logits) and are bit-equal on
        all ranks.

    Collectives: forward one all-gather of 4 numbers per token, 9 with a teacher, and for ``jsd`` and ``entry_clip`` a
    second one of 2 numbers per token: the logarithm of the mixture m is that of a sum, and a summand is compared with
    the bound, so both normalisers must be known before the columns are summed. Backward none. A group of one rank runs
    no collective.

    Columns at -inf carry no mass. A Kullback-Leibler divergence is +inf where its second distribution has no mass and
    its first has some (more than about 1e-31); the reverse KL of such a token has no finite gradient, and gets 0. NaN
    logits make their own tokens NaN and no others; so does a token without any finite logit.

    Raises:
        ValueError: on shapes, dtypes, devices or arguments that do not fit, and on a target outside the vocabulary. All
            ranks see the same targets, so all raise.
    """
    objective = make_objective(divergence, jsd_weight, entry_clip)
    _check_logits(logits, targets, teacher_logits)
    shard = make_shard(logits.shape[1], targets, vocab_size, group, temperature, check_targets=check_targets)
    teacher = None if teacher_logits is None else teacher_logits.detach()
    tensors = (logits,) if teacher is None else (logits, teacher)
    kernels = choose_kernels(implementation, tensors, chunk_size, objective)
    apply: Callable[..., tuple[Any, ...]] = _VocabParallelTokenStats.apply
    return TokenStats(*apply(logits, teacher, shard, kernels, objective, inplace_backward))


def _check_logits(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> None:
    for name, tensor in (("logits", logits), ("teacher_logits", teacher_logits)):
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [tokens, local vocabulary]")
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected bfloat16, float16, float32 or float64")
        if tensor.device != targets.device:
            raise ValueError(f"{name} is on {tensor.device} and targets on {targets.device}; expected one device")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; logits of {logits.shape[0]} tokens need [{logits.shape[0]}]"
        )
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} and logits {tuple(logits.shape)}; "
            "the teacher needs the same tokens and vocabulary"
        )


class _VocabParallelTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor | None,
        shard: Shard,
        kernels: Kernels,
        objective: Objective,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        def second_sums(student: Distribution, other: Distribution) -> Tensor:
            return kernels.second_sums(
                logits, teacher, *student, *other, columns=shard.columns,
                inverse_temperature=shard.inverse_temperature,
            )  # fmt: skip

        partials = kernels.local_partials(
            logits, teacher, shard.targets, columns=shard.columns, first_column=shard.first_column,
            inverse_temperature=shard.inverse_temperature, divergence=objective.divergence.name,
        )  # fmt: skip
        finished = finish(partials, objective, shard, second_sums)
        ctx.shard, ctx.kernels, ctx.objective, ctx.inplace_backward = shard, kernels, objective, inplace_backward
        ctx.save_for_backward(logits, teacher, *Saved.of(finished).tensors())
        return to_outputs(ctx, finished, partials.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
        _: Tensor | None,
        grad_divergence: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        logits, teacher, *saved = ctx.saved_tensors
        shard = ctx.shard
        gradients = (grad_log_prob, grad_entropy, grad_divergence)
        out = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        coefficients = gradient_coefficients(
            Saved.from_tensors(saved), ctx.objective, shard.inverse_temperature, *gradients
        )
        ctx.kernels.backward(
            logits, teacher, out, shard.targets, columns=shard.columns, first_column=shard.first_column,
            inverse_temperature=shard.inverse_temperature, **coefficients.arguments(),
        )  # fmt: skip
        if ctx.inplace_backward:
            # Kernels that write through a pointer go unnoticed, and autograd would read the gradient where it had saved
            # the logits.
            torch.autograd.graph.increment_version(out)
        return out, None, None, None, None, None


def to_outputs(
    ctx: Any, finished: Finished, dtype: torch.dtype, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the four statistics in ``dtype``.

    The teacher's log-prob takes no gradient, nor do ``others``, which the caller returns beside them. The gradients of
    outputs that nothing depends on come back as None.
    """
    ctx.set_materialize_grads(False)
    log_prob, entropy, compared = finished.log_prob.to(dtype), finished.entropy.to(dtype), finished.comparison
    constants = [other for other in others if other is not None]
    if compared is None:
        ctx.mark_non_differentiable(*constants)
        return log_prob, entropy, None, None
    teacher_log_prob = compared.log_prob.to(dtype)
    ctx.mark_non_differentiable(teacher_log_prob, *constants)
    return log_prob, entropy, teacher_log_prob, compared.divergence.to(dtype)
