"""Per-token statistics of vocabulary-parallel logits: log-prob, entropy and full-vocabulary divergence, with closed-form gradients.

Notation: ``d = (z - max z) / temperature`` are a row's shifted student logits, ``Z = sum exp(d)``, so ``log p = d - log Z``; the
teacher has its own maximum and normaliser. Every rank reduces its own columns to a few numbers per token, one all-gather brings the
numbers of all ranks together, and each rank finishes the statistics by itself. Shifting before summing keeps full precision when the
logits are large.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# A Kullback-Leibler divergence beyond this is reported as infinite: only columns without mass in the second distribution lead there.
_INFINITE_NATS = 1e7
# Shifted logits in the backward pass end here. exp() is 0 long before, and a product with a gradient's coefficient cannot overflow.
_BACKWARD_FLOOR = -1e30


class TokenStats(NamedTuple):
    """Statistics of T tokens, in nats; float32 ``[T]`` (float64 for float64 logits), the same on every rank of the group."""

    log_prob: Tensor
    entropy: Tensor
    teacher_log_prob: Tensor | None
    divergence: Tensor | None


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
    jsd_weight: float = 0.5,
) -> TokenStats:
    """Log-prob of the target, entropy, teacher log-prob of the target and divergence, over the full vocabulary, per token.

    With p the student's and q the teacher's distribution of ``logits / temperature``, ``divergence`` is one of

    - ``reverse_kl``  KL(p || q)
    - ``forward_kl``  KL(q || p)
    - ``jsd``         w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w = ``jsd_weight``, between 0 and 1

    Args:
        logits: ``[T, V_local]``, bfloat16, float16, float32 or float64; this rank's contiguous vocabulary shard, rank order = group order,
            shards of equal width. Unchanged by the forward pass.
        targets: ``[T]`` int64 global token ids, the same on every rank.
        teacher_logits: ``[T, V_local]``, sharded the same way, any of these dtypes, or None. Never receives a gradient.
        group: tensor-parallel process group; None: this process holds the whole vocabulary.
        vocab_size: true vocabulary size; columns at or past it are padding, are not read, carry no mass and get gradient 0. A shard may be
            all padding. None: all columns of all shards.
        temperature: the logits are divided by it; > 0. Gradients are those with respect to the undivided logits.
        chunk_size: tokens worked on at once; None chooses by the size of the device's L2 cache, at least one per CPU thread. Beyond the
            outputs and the gradient, memory is at most five buffers of ``chunk_size x V_local`` in float32.
        inplace_backward: the backward pass writes the gradient into the storage of ``logits`` instead of allocating it. Then nothing else
            may read the logits afterwards; autograd raises where something it saved has been overwritten.

    Returns:
        TokenStats; without a teacher its last two are None. ``log_prob``, ``entropy`` and ``divergence`` carry gradients to ``logits``.
        Statistics are accumulated in float32 (float64 for float64 logits) and are bit-equal on all ranks.

    Collectives: forward one all-gather of 4 numbers per token, 9 with a teacher, and for ``jsd`` a second one of 2 numbers per token: the
    logarithm of the mixture m is that of a sum, so both normalisers must be known before it can be summed over columns. Backward none.
    A group of one rank runs no collective.

    Columns at -inf carry no mass. A Kullback-Leibler divergence is +inf where its second distribution has no mass and its first has some
    (more than about 1e-31); the reverse KL of such a token has no finite gradient, and gets 0. NaN logits make their own tokens NaN and no
    others; so does a token without any finite logit.

    Raises:
        ValueError: on shapes, dtypes, devices or arguments that do not fit, and on a target outside the vocabulary. The check of the
            targets reads two numbers back from the device, one synchronisation per call; all ranks see the same targets, so all raise.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    _check_arguments(logits, targets, teacher_logits, divergence, temperature, chunk_size, jsd_weight)
    num_tokens, width = logits.shape
    if vocab_size is None:
        vocab_size = width * world_size
    if not 0 < vocab_size <= width * world_size:
        raise ValueError(f"vocab_size is {vocab_size}; {world_size} shard(s) of {width} columns hold 1 to {width * world_size}")
    _check_targets(targets, vocab_size)

    columns = min(max(vocab_size - rank * width, 0), width)
    if chunk_size is None:
        chunk_size = _rows_by_cache(logits, columns, teacher_logits is not None)
    local = targets - rank * width
    owned = (local >= 0) & (local < columns)
    shard = _Shard(
        columns=columns,
        local_targets=torch.where(owned, local, 0),
        owned=owned,
        group=group if world_size > 1 else None,
        world_size=world_size,
        inverse_temperature=1.0 / temperature,
        chunk_size=min(chunk_size, max(num_tokens, 1)),
    )
    teacher = None if teacher_logits is None else teacher_logits.detach()
    return TokenStats(*_VocabParallelTokenStats.apply(logits, teacher, shard, divergence, jsd_weight, inplace_backward))


def _check_arguments(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    divergence: str,
    temperature: float,
    chunk_size: int | None,
    jsd_weight: float,
) -> None:
    for name, tensor in (("logits", logits), ("teacher_logits", teacher_logits)):
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [tokens, local vocabulary]")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected bfloat16, float16, float32 or float64")
        if tensor.device != targets.device:
            raise ValueError(f"{name} is on {tensor.device} and targets on {targets.device}; expected one device")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; logits of {logits.shape[0]} tokens need [{logits.shape[0]}]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected int64")
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)} and logits {tuple(logits.shape)}; "
            "the teacher needs the same tokens and vocabulary"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1, or None to choose it")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight is {jsd_weight}; expected a number between 0 and 1, both excluded")


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
    if lowest < 0 or highest >= vocab_size:
        position = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
        raise ValueError(
            f"targets[{position}] is {int(targets[position])}, outside the vocabulary of {vocab_size}; "
            "drop masked positions before the call"
        )


@functools.lru_cache
def _l2_cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache: of the GPU, or of one CPU core; 1 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


def _rows_by_cache(logits: Tensor, columns: int, with_teacher: bool) -> int:
    row_bytes = max(columns, 1) * _accumulator(logits).itemsize * (4 if with_teacher else 2)
    # Measured on CPU at 16,384 to 151,936 columns: buffers of about four times the L2 cache are fastest. Smaller ones pay more for the
    # calls than they save in traffic, which the next cache level still catches.
    rows = max(4 * _l2_cache_bytes(logits.device) // row_bytes, 1)
    # Each thread works on rows of its own, in its core's own cache.
    return rows * torch.get_num_threads() if logits.device.type == "cpu" else rows


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Shard(NamedTuple):
    """Which columns this rank holds and how it works through them."""

    columns: int
    local_targets: Tensor
    owned: Tensor
    group: dist.ProcessGroup | None
    world_size: int
    inverse_temperature: float
    chunk_size: int

    def chunks(self) -> list[slice]:
        if self.columns == 0:
            return []
        return [slice(start, start + self.chunk_size) for start in range(0, self.owned.numel(), self.chunk_size)]

    def buffers(self, like: Tensor, count: int) -> list[Tensor]:
        shape = (min(self.chunk_size, self.owned.numel()), self.columns)
        return [torch.empty(shape, dtype=_accumulator(like), device=like.device) for _ in range(count)]


class _Softmax(NamedTuple):
    """One distribution's normalisation, ``[T]`` each, as this rank needs it to compute its columns again.

    ``shift``: what the rank subtracts from its logits, its own maximum. ``offset``: this maximum minus the group's, divided by the
    temperature. ``log_z``: logarithm of the global sum about the group's maximum. ``scale``: the factor from PyTorch's softmax over the
    rank's columns to global probabilities: the rank's share of the mass, divided by what that softmax really sums to (1 but for rounding,
    which reaches 1e-5 in float32 at a vocabulary of 150,000).
    """

    shift: Tensor
    offset: Tensor
    log_z: Tensor
    scale: Tensor


def _shift(logits: Tensor, maximum: Tensor, inverse_temperature: float, floor: float, out: Tensor) -> Tensor:
    """``(logits - maximum) / temperature`` into the first rows of ``out``; -inf becomes ``floor``, so that 0 x -inf cannot arise."""
    out = out[: logits.shape[0]]
    if logits.dtype == out.dtype:
        torch.sub(logits, maximum[:, None], out=out)
    else:
        out.copy_(logits).sub_(maximum[:, None])
    if inverse_temperature != 1.0:
        out.mul_(inverse_temperature)
    return out.clamp_min_(floor)


def _finite(maximum: Tensor) -> Tensor:
    """What to shift rows by: their maximum, or 0 for a row that is -inf throughout."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


def _all_gather(local: Tensor, shard: _Shard) -> Tensor:
    """``[n, T]`` of every rank as ``[ranks, n, T]``."""
    if shard.group is None or local.numel() == 0:
        return local.expand(shard.world_size, *local.shape)
    gathered = local.new_empty(shard.world_size * local.shape[0], local.shape[1])
    # Newer PyTorch has the same collective under another name, and warns about the old one.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(gathered, local, group=shard.group)
    return gathered.view(shard.world_size, *local.shape)


class _Partials(NamedTuple):
    """What one rank knows of each token: the numbers to gather, ``[n, T]``, and what its two softmaxes sum to, ``[T]``."""

    packed: Tensor
    student_sum: Tensor
    teacher_sum: Tensor | None


# Rows of the packed numbers. Expectations are over the rank's own columns, normalised within them, of logits shifted by its own maxima.
_MAX, _Z, _MEAN, _TARGET, _TEACHER_MAX, _TEACHER_Z, _TEACHER_MEAN, _TEACHER_TARGET, _CROSS = range(9)


def _local_partials(logits: Tensor, teacher: Tensor | None, shard: _Shard, divergence: str) -> _Partials:
    """One pass over this rank's columns. A rank without columns, or with -inf alone, has maximum -inf and therefore no weight.

    A product that is only summed is written over a factor that is not needed again: a dot product proper would lose digits.
    """
    dtype = _accumulator(logits)
    floor = torch.finfo(dtype).min
    packed = torch.zeros(4 if teacher is None else 9, logits.shape[0], dtype=dtype, device=logits.device)
    packed[_MAX] = -math.inf
    student_sum, teacher_sum = torch.ones_like(packed[0]), None
    if teacher is not None:
        packed[_TEACHER_MAX] = -math.inf
        teacher_sum = torch.ones_like(student_sum)
    work_d, work_p, *teacher_work = shard.buffers(logits, 2 if teacher is None else 4)
    for rows in shard.chunks():
        z = logits[rows, : shard.columns]
        maximum = z.amax(-1).to(dtype)
        d = _shift(z, _finite(maximum), shard.inverse_temperature, floor, work_d)
        # softmax is PyTorch's fastest exponential on every device; its largest entry is exp(0) / Z.
        p = torch.softmax(d, -1, out=work_p[: len(d)])
        total = p.sum(-1)
        packed[_MAX, rows], student_sum[rows], packed[_Z, rows] = maximum, total, total / p.amax(-1)
        packed[_MEAN, rows] = (p.mul_(d) if divergence == "forward_kl" else d.mul_(p)).sum(-1) / total
        if teacher is None:
            continue
        z = teacher[rows, : shard.columns]
        maximum = z.amax(-1).to(dtype)
        td = _shift(z, _finite(maximum), shard.inverse_temperature, floor, teacher_work[0])
        q = torch.softmax(td, -1, out=teacher_work[1][: len(td)])
        teacher_total = q.sum(-1)
        packed[_TEACHER_MAX, rows], teacher_sum[rows] = maximum, teacher_total
        packed[_TEACHER_Z, rows] = teacher_total / q.amax(-1)
        if divergence == "reverse_kl":
            packed[_CROSS, rows] = td.mul_(p).sum(-1) / total
        elif divergence == "forward_kl":
            packed[_TEACHER_MEAN, rows] = td.mul_(q).sum(-1) / teacher_total
            packed[_CROSS, rows] = d.mul_(q).sum(-1) / teacher_total
    if shard.columns:
        index = shard.local_targets[:, None]
        packed[_TARGET] = torch.where(shard.owned, logits.gather(1, index)[:, 0].to(dtype), 0.0)
        if teacher is not None:
            packed[_TEACHER_TARGET] = torch.where(shard.owned, teacher.gather(1, index)[:, 0].to(dtype), 0.0)
    return _Partials(packed, student_sum, teacher_sum)


class _Group(NamedTuple):
    """One distribution over all ranks: every rank's offset and share of the mass ``[ranks, T]``; maximum and log Z ``[T]``."""

    offsets: Tensor
    shares: Tensor
    maximum: Tensor
    log_z: Tensor

    def expectation(self, local: Tensor, offsets: Tensor) -> Tensor:
        """Expectation over all ranks of logits whose own shifts lie ``offsets`` from the group's. Ranks without mass drop out."""
        return torch.where(self.shares == 0, 0.0, self.shares * (local + offsets)).sum(0)

    def on_rank(self, rank: int, local_maximum: Tensor, local_sum: Tensor) -> _Softmax:
        share = self.shares[rank]
        # The offset of a rank without finite logits is -inf; its factor 0 must not meet that.
        return _Softmax(_finite(local_maximum), self.offsets[rank].clamp_min(_BACKWARD_FLOOR), self.log_z, share / local_sum)


def _combine(maxima: Tensor, masses: Tensor, shard: _Shard) -> _Group:
    """The distribution over all ranks from each rank's maximum and Z, both ``[ranks, T]``."""
    maximum = maxima.amax(0)
    offsets = (maxima - maximum) * shard.inverse_temperature
    scaled = masses * offsets.exp()
    z = scaled.sum(0)
    return _Group(offsets, scaled / z, maximum, z.log())


def _infinite(divergence: Tensor) -> Tensor:
    """Rounding below 0 removed, and what stands for an infinite divergence made infinite."""
    return torch.where(divergence > _INFINITE_NATS, math.inf, divergence.clamp_min(0.0))


def _mixture_log_ratio(part: Tensor, mixture: Tensor, out: Tensor) -> Tensor:
    """log(part / mixture); where ``part`` is 0 a finite number, so that its product with ``part`` is 0."""
    return torch.div(part, mixture, out=out).clamp_min_(torch.finfo(part.dtype).tiny).log_()


def _mixture(p: Tensor, q: Tensor, weight: float, out: Tensor) -> Tensor:
    torch.mul(p, weight, out=out)
    return out.add_(q, alpha=1.0 - weight).clamp_min_(torch.finfo(p.dtype).tiny)


def _probabilities(logits: Tensor, softmax: _Softmax, rows: slice, shard: _Shard, shifted: Tensor, out: Tensor) -> Tensor:
    """Global probabilities of this rank's columns; ``shifted`` receives the shifted logits."""
    d = _shift(logits[rows, : shard.columns], softmax.shift[rows], shard.inverse_temperature, _BACKWARD_FLOOR, shifted)
    return torch.softmax(d, -1, out=out[: len(d)]).mul_(softmax.scale[rows, None])


def _jsd_terms(logits: Tensor, teacher: Tensor, student: _Softmax, other: _Softmax, shard: _Shard, weight: float) -> Tensor:
    """KL(p || m) and KL(q || m), ``[2, T]``, summed over the ranks in rank order."""
    local = torch.zeros(2, logits.shape[0], dtype=_accumulator(logits), device=logits.device)
    scratch, buffer_p, buffer_q, buffer_m = shard.buffers(logits, 4)
    for rows in shard.chunks():
        p = _probabilities(logits, student, rows, shard, scratch, buffer_p)
        q = _probabilities(teacher, other, rows, shard, scratch, buffer_q)
        m = _mixture(p, q, weight, buffer_m[: len(p)])
        local[0, rows] = _mixture_log_ratio(p, m, scratch[: len(p)]).mul_(p).sum(-1)
        local[1, rows] = _mixture_log_ratio(q, m, scratch[: len(p)]).mul_(q).sum(-1)
    return _all_gather(local, shard).sum(0)


class _VocabParallelTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        teacher: Tensor | None,
        shard: _Shard,
        divergence: str,
        jsd_weight: float,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        rank = 0 if shard.group is None else dist.get_rank(shard.group)
        partials = _local_partials(logits, teacher, shard, divergence)
        every = _all_gather(partials.packed, shard).unbind(1)
        p_group = _combine(every[_MAX], every[_Z], shard)
        student = p_group.on_rank(rank, partials.packed[_MAX], partials.student_sum)
        mean = p_group.expectation(every[_MEAN], p_group.offsets)
        log_prob = (every[_TARGET].sum(0) - p_group.maximum) * shard.inverse_temperature - p_group.log_z
        entropy = (p_group.log_z - mean).clamp_min(0.0)

        other = teacher_log_prob = value = student_to_mixture = None
        if teacher is not None:
            q_group = _combine(every[_TEACHER_MAX], every[_TEACHER_Z], shard)
            other = q_group.on_rank(rank, partials.packed[_TEACHER_MAX], partials.teacher_sum)
            teacher_log_prob = (every[_TEACHER_TARGET].sum(0) - q_group.maximum) * shard.inverse_temperature - q_group.log_z
            if divergence == "reverse_kl":
                cross = p_group.expectation(every[_CROSS], q_group.offsets)
                value = _infinite((mean - cross) - (p_group.log_z - q_group.log_z))
            elif divergence == "forward_kl":
                teacher_mean = q_group.expectation(every[_TEACHER_MEAN], q_group.offsets)
                cross = q_group.expectation(every[_CROSS], p_group.offsets)
                value = _infinite((teacher_mean - cross) - (q_group.log_z - p_group.log_z))
            else:
                student_to_mixture, teacher_to_mixture = _jsd_terms(logits, teacher, student, other, shard, jsd_weight)
                value = (jsd_weight * student_to_mixture + (1.0 - jsd_weight) * teacher_to_mixture).clamp_min(0.0)
            ctx.mark_non_differentiable(teacher_log_prob)

        ctx.set_materialize_grads(False)
        ctx.shard, ctx.divergence, ctx.jsd_weight, ctx.inplace_backward = shard, divergence, jsd_weight, inplace_backward
        ctx.save_for_backward(logits, teacher, *student, *(other or (None,) * 4), entropy, value, student_to_mixture)
        return log_prob, entropy, teacher_log_prob, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
        _: Tensor | None,
        grad_divergence: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradient of the loss with respect to this rank's undivided logits.

        With g the incoming gradients, per column v and before the division by the temperature:

            log-prob    g (1[v = y] - p_v)
            entropy     -g p_v (log p_v + H)
            reverse KL  g p_v (log p_v - log q_v - KL)
            forward KL  g (p_v - q_v)
            JSD         g w p_v (log(p_v / m_v) - KL(p || m))

        All but the one-hot, the forward KL's q_v and the JSD's logarithm are p_v times ``constant + linear d_v - teacher_linear td_v``,
        with one coefficient of each kind per token.
        """
        logits, teacher, *saved = ctx.saved_tensors
        student, other = _Softmax(*saved[:4]), _Softmax(*saved[4:8])
        entropy, value, student_to_mixture = saved[8:]
        shard, divergence, jsd_weight = ctx.shard, ctx.divergence, ctx.jsd_weight
        out = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)

        constant = linear = teacher_linear = torch.zeros_like(entropy)
        one_hot = grad_value = None
        if grad_log_prob is not None:
            one_hot = torch.where(shard.owned, grad_log_prob.to(entropy.dtype) * shard.inverse_temperature, 0.0)
            constant = constant - grad_log_prob
        if grad_entropy is not None:
            constant = constant - grad_entropy * (entropy - student.log_z)
            linear = linear - grad_entropy
        if grad_divergence is not None:
            grad_value = grad_divergence.to(entropy.dtype)
            if divergence == "reverse_kl":
                infinite = value == math.inf
                grad_value = torch.where(infinite, 0.0, grad_value)
                constant = constant + grad_value * (other.log_z - student.log_z - torch.where(infinite, 0.0, value))
                linear, teacher_linear = linear + grad_value, grad_value
            elif divergence == "forward_kl":
                constant = constant + grad_value
            else:
                constant = constant - grad_value * jsd_weight * student_to_mixture
            grad_value = grad_value * shard.inverse_temperature
        # The coefficients so far belong to logits about the group's maxima and to global probabilities; now to this rank's own.
        constant = constant + linear * student.offset
        if needs_teacher := grad_value is not None and divergence == "reverse_kl":
            constant = constant - teacher_linear * other.offset
        scale = student.scale * shard.inverse_temperature
        constant, linear, teacher_linear = constant * scale, linear * scale, teacher_linear * scale
        needs_linear = grad_entropy is not None or needs_teacher

        work_d, work_p, *work = shard.buffers(logits, 2 if grad_value is None else 5 if divergence == "jsd" else 4)
        for rows in shard.chunks():
            d = _shift(logits[rows, : shard.columns], student.shift[rows], shard.inverse_temperature, _BACKWARD_FLOOR, work_d)
            p = torch.softmax(d, -1, out=work_p[: len(d)])
            factor = d.mul_(linear[rows, None]).add_(constant[rows, None]) if needs_linear else constant[rows, None]
            if needs_teacher:
                td = _shift(teacher[rows, : shard.columns], other.shift[rows], shard.inverse_temperature, _BACKWARD_FLOOR, work[0])
                factor.sub_(td.mul_(teacher_linear[rows, None]))
            elif grad_value is not None:
                q = _probabilities(teacher, other, rows, shard, work[0], work[1])
                if divergence == "jsd":
                    global_p = torch.mul(p, student.scale[rows, None], out=work[0][: len(p)])
                    m = _mixture(global_p, q, jsd_weight, work[2][: len(p)])
                    log_ratio = _mixture_log_ratio(global_p, m, m)
                    factor = log_ratio.mul_((grad_value * jsd_weight * student.scale)[rows, None]).add_(factor)
            destination = out[rows, : shard.columns]
            result = destination if destination.dtype == p.dtype else p
            torch.mul(p, factor, out=result)
            if grad_value is not None and divergence == "forward_kl":
                result.sub_(q.mul_(grad_value[rows, None]))
            if one_hot is not None:
                result.scatter_add_(1, shard.local_targets[rows, None], one_hot[rows, None])
            if result is p:
                destination.copy_(p)
        out[:, shard.columns :] = 0
        return out, None, None, None, None, None
