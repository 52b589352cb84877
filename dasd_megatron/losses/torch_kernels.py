"""What one rank computes on its own vocabulary shard, in PyTorch: partial sums, the mixture's sums, and the closed-form gradient.

``triton_kernels`` has the same three functions for GPUs; this is their reference, and what runs everywhere else. Notation: z and x are
the student's and the teacher's logits, ``c = 1 / temperature``, ``d = (z - max z) c`` and ``e = (x - max x) c``. Powers of two stand for
exponentials (PyTorch's ``exp2`` takes half the time of its ``exp`` on CPU), so d and e are kept in units of log 2.

Rows are worked on a few at a time, so that the buffers stay in the core's cache: on CPU that, and not arithmetic, decides the speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Rows of the packed partial numbers. Expectations are over the shard's own columns, normalised within them, in nats, about its own maxima.
MAX, Z, MEAN, TARGET, TEACHER_MAX, TEACHER_Z, TEACHER_MEAN, TEACHER_TARGET, CROSS = range(9)

_LOG2_E = 1.0 / math.log(2.0)
_LN_2 = math.log(2.0)
# Shifted logits in the backward pass end here. exp() is 0 long before, and a product with a gradient's coefficient cannot overflow.
_BACKWARD_FLOOR = -1e30


def local_partials(
    logits: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    *,
    columns: int,
    first_column: int,
    inverse_temperature: float,
    divergence: str,
    chunk_size: int | None = None,
) -> Tensor:
    """One pass over a shard's logits to the numbers from which all ranks together make the statistics.

    Args:
        logits, teacher: ``[T, V_local]``, float16, bfloat16, float32 or float64; the teacher may be None.
        targets: ``[T]`` int64 global token ids.
        columns: how many of the shard's columns belong to the vocabulary; the rest are padding and are not read.
        first_column: global id of column 0.
        divergence: decides which expectations the teacher's rows hold; see :func:`~dasd_megatron.losses.vocab_parallel_token_stats`.
        chunk_size: rows at once; None chooses by the cache.

    Returns:
        ``[4, T]``, with a teacher ``[9, T]``, float32 (float64 for float64 logits): MAX raw maximum, -inf without mass; Z sum of exp(d);
        MEAN expectation of d; TARGET raw logit of the target where this shard owns it, else 0; the same four for the teacher; CROSS the
        expectation of e under the student (``reverse_kl``) or of d under the teacher (``forward_kl``). Sums without mass are 0. Where the
        weight is not 0 and the other logit is -inf, CROSS is beyond -1e30.
    """
    dtype = accumulator(logits)
    floor = torch.finfo(dtype).min
    scale = inverse_temperature * _LOG2_E
    packed = torch.zeros(4 if teacher is None else 9, logits.shape[0], dtype=dtype, device=logits.device)
    packed[MAX :: TEACHER_MAX - MAX] = -math.inf
    if teacher is not None:
        packed[CROSS] = 0.0
    if columns == 0:
        return packed
    chunk_size = chunk_size or rows_by_cache(logits, columns, teacher is not None)
    work_d, work_p, *teacher_work = _buffers(logits, columns, chunk_size, 2 if teacher is None else 4)
    for rows in _chunks(logits, chunk_size):
        maximum, d, p, total = _exponentials(logits[rows, :columns], scale, floor, work_d, work_p)
        packed[MAX, rows], packed[Z, rows] = maximum, total
        # Divided by the sum where there is one. A product that is only summed is written over a factor that is not needed again: a dot
        # product proper would lose digits.
        inverse = _LN_2 / total.clamp_min(torch.finfo(dtype).tiny)
        if teacher is None:
            packed[MEAN, rows] = d.mul_(p).sum(-1) * inverse
            continue
        teacher_maximum, e, q, teacher_total = _exponentials(teacher[rows, :columns], scale, floor, *teacher_work)
        packed[TEACHER_MAX, rows], packed[TEACHER_Z, rows] = teacher_maximum, teacher_total
        teacher_inverse = _LN_2 / teacher_total.clamp_min(torch.finfo(dtype).tiny)
        if divergence == "reverse_kl":
            packed[MEAN, rows] = d.mul_(p).sum(-1) * inverse
            packed[CROSS, rows] = e.mul_(p).sum(-1) * inverse
            continue
        packed[MEAN, rows] = p.mul_(d).sum(-1) * inverse
        packed[TEACHER_MEAN, rows] = e.mul_(q).sum(-1) * teacher_inverse
        if divergence == "forward_kl":
            packed[CROSS, rows] = d.mul_(q).sum(-1) * teacher_inverse
    local = targets - first_column
    owned = (local >= 0) & (local < columns)
    index = torch.where(owned, local, 0)[:, None]
    packed[TARGET] = torch.where(owned, logits.gather(1, index)[:, 0].to(dtype), 0.0)
    if teacher is not None:
        packed[TEACHER_TARGET] = torch.where(owned, teacher.gather(1, index)[:, 0].to(dtype), 0.0)
    return packed


def mixture_sums(
    logits: Tensor,
    teacher: Tensor,
    p_max: Tensor,
    p_log_z: Tensor,
    q_max: Tensor,
    q_log_z: Tensor,
    *,
    columns: int,
    inverse_temperature: float,
    weight: float,
    chunk_size: int | None = None,
) -> Tensor:
    """The second pass of the Jensen-Shannon divergence: sums over this shard's columns of ``p log(p / m)`` and ``q log(q / m)``.

    ``m = w p + (1 - w) q``. Maxima and logarithms of the normalisers are those of the whole vocabulary, ``[T]``. Returns ``[2, T]``.
    """
    sums = torch.zeros(2, logits.shape[0], dtype=accumulator(logits), device=logits.device)
    if columns == 0:
        return sums
    chunk_size = chunk_size or rows_by_cache(logits, columns, True)
    work_d, work_e, work_p, work_q, work_m = _buffers(logits, columns, chunk_size, 5)
    scale = inverse_temperature * _LOG2_E
    for rows in _chunks(logits, chunk_size):
        d, p = _probabilities(logits[rows, :columns], p_max[rows], p_log_z[rows], scale, work_d, work_p)
        e, q = _probabilities(teacher[rows, :columns], q_max[rows], q_log_z[rows], scale, work_e, work_q)
        log_m = _log2_mixture(p, q, weight, work_m)
        sums[0, rows] = d.sub_(log_m).mul_(p).sum(-1)
        sums[1, rows] = e.sub_(log_m).mul_(q).sum(-1)
    return sums.mul_(_LN_2)


def backward(
    logits: Tensor,
    teacher: Tensor | None,
    out: Tensor,
    targets: Tensor,
    *,
    columns: int,
    first_column: int,
    inverse_temperature: float,
    p_max: Tensor,
    p_log_z: Tensor,
    q_max: Tensor | None = None,
    q_log_z: Tensor | None = None,
    constant: Tensor,
    linear: Tensor | None = None,
    cross: Tensor | None = None,
    teacher_share: Tensor | None = None,
    one_hot: Tensor | None = None,
    mixture_weight: float | None = None,
    chunk_size: int | None = None,
) -> None:
    """Write the gradient ``p (constant + linear log p - cross X) - teacher_share q + one_hot [v = target]`` into ``out``.

    Args:
        out: ``[T, V_local]``; may be ``logits`` itself. Padding columns get 0.
        p_max, p_log_z, q_max, q_log_z: ``[T]`` maxima and logarithms of the normalisers over the whole vocabulary.
        constant, linear, cross, teacher_share, one_hot: ``[T]`` coefficients, which contain the incoming gradients and the division by
            the temperature; None: 0.
        mixture_weight: X is log q; with a weight w it is log(w p + (1 - w) q).
        logits, teacher, targets, columns, first_column, chunk_size: as in :func:`local_partials`.
    """
    out[:, columns:] = 0
    if columns == 0:
        return
    dtype = accumulator(logits)
    scale = inverse_temperature * _LOG2_E
    with_mixture = mixture_weight is not None
    needs_teacher = cross is not None or teacher_share is not None
    # p stays unnormalised, and X may be in other units: what is missing goes into the coefficients, in float64 for their differences.
    inverse_z = p_log_z.double().neg().exp()
    constant, linear, cross = (None if one is None else one.double() for one in (constant, linear, cross))
    if linear is not None:
        constant = constant - linear * p_log_z
        linear = (linear * _LN_2 * inverse_z).to(dtype)
    if cross is not None:
        if not with_mixture:
            constant = constant + cross * q_log_z
        cross = (cross * (_LN_2 if with_mixture else inverse_temperature) * inverse_z).to(dtype)
    constant = (constant * inverse_z).to(dtype)
    if with_mixture:
        student_share = inverse_z.mul(mixture_weight).to(dtype)
        teacher_scale = q_log_z.double().neg().exp().mul(1.0 - mixture_weight).to(dtype)
    elif teacher_share is not None:
        teacher_scale = (teacher_share.double() * q_log_z.double().neg().exp()).to(dtype)
    if one_hot is not None:
        local = targets - first_column
        owned = (local >= 0) & (local < columns)
        index, one_hot = torch.where(owned, local, 0)[:, None], torch.where(owned, one_hot, 0.0).to(dtype)[:, None]

    chunk_size = chunk_size or rows_by_cache(logits, columns, needs_teacher)
    work_d, work_p, *work = _buffers(
        logits, columns, chunk_size, 4 if with_mixture or teacher_share is not None else 3 if needs_teacher else 2
    )
    for rows in _chunks(logits, chunk_size):
        d = _shift(logits[rows, :columns], p_max[rows], scale, work_d)
        p = torch.exp2(d, out=work_p[: len(d)])
        if linear is None and cross is None:
            factor = constant[rows, None]
        elif linear is None:
            factor = d.copy_(constant[rows, None])
        else:
            factor = d.clamp_min_(_BACKWARD_FLOOR).mul_(linear[rows, None]).add_(constant[rows, None])
        if with_mixture:
            e = _shift(teacher[rows, :columns], q_max[rows], scale, work[0])
            m = torch.exp2(e, out=e).mul_(teacher_scale[rows, None])
            m = m.add_(torch.mul(p, student_share[rows, None], out=work[1][: len(p)]))
            factor = factor.sub_(m.clamp_min_(torch.finfo(dtype).tiny).log2_().mul_(cross[rows, None]))
        elif cross is not None:
            e = _shift(teacher[rows, :columns], q_max[rows], 1.0, work[0]).clamp_min_(_BACKWARD_FLOOR)
            factor = factor.sub_(e.mul_(cross[rows, None]))
        destination = out[rows, :columns]
        result = destination if destination.dtype == dtype else p
        if teacher_share is not None:
            e = _shift(teacher[rows, :columns], q_max[rows], scale, work[1])
            q = torch.exp2(e, out=e).mul_(teacher_scale[rows, None])
            torch.sub(p.mul_(factor), q, out=result)
        else:
            torch.mul(p, factor, out=result)
        if one_hot is not None:
            result.scatter_add_(1, index[rows], one_hot[rows])
        if result is p:
            destination.copy_(p)


def accumulator(logits: Tensor) -> torch.dtype:
    """The dtype of statistics of ``logits``."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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


def rows_by_cache(logits: Tensor, columns: int, with_teacher: bool) -> int:
    """Rows to work on at once when the caller leaves the choice open."""
    row_bytes = max(columns, 1) * accumulator(logits).itemsize * (4 if with_teacher else 2)
    # Measured on CPU at 16,384 to 151,936 columns: buffers of about four times the L2 cache are fastest. Smaller ones pay more for the
    # calls than they save in traffic, which the next cache level still catches.
    rows = max(4 * _l2_cache_bytes(logits.device) // row_bytes, 1)
    # Each thread works on rows of its own, in its core's own cache.
    return rows * torch.get_num_threads() if logits.device.type == "cpu" else rows


def _chunks(logits: Tensor, chunk_size: int) -> Iterator[slice]:
    return (slice(start, start + chunk_size) for start in range(0, logits.shape[0], chunk_size))


def _buffers(logits: Tensor, columns: int, chunk_size: int, count: int) -> list[Tensor]:
    shape = (min(chunk_size, logits.shape[0]), columns)
    return [torch.empty(shape, dtype=accumulator(logits), device=logits.device) for _ in range(count)]


def _shift(logits: Tensor, maximum: Tensor, scale: float, out: Tensor) -> Tensor:
    """``(logits - maximum) * scale`` into the first rows of ``out``. Subtracting first keeps full precision when logits are large."""
    out = out[: logits.shape[0]]
    if logits.dtype == out.dtype:
        torch.sub(logits, maximum[:, None], out=out)
    else:
        out.copy_(logits).sub_(maximum[:, None])
    return out if scale == 1.0 else out.mul_(scale)


def _exponentials(logits: Tensor, scale: float, floor: float, out_d: Tensor, out_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maxima, shifted logits (never -inf, so that 0 x -inf cannot arise), their powers of two and the sums of these."""
    maximum = logits.amax(-1).to(out_d.dtype)
    # A row that is -inf throughout is shifted by 0: it then has no mass, where -inf - -inf would have made it NaN.
    d = _shift(logits, torch.where(maximum == -math.inf, 0.0, maximum), scale, out_d).clamp_min_(floor)
    p = torch.exp2(d, out=out_p[: len(d)])
    return maximum, d, p, p.sum(-1)


def _probabilities(logits: Tensor, maximum: Tensor, log_z: Tensor, scale: float, out_log: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Global log-probabilities in units of log 2, finite, and probabilities of this shard's columns."""
    log_p = _shift(logits, maximum, scale, out_log).sub_((log_z * _LOG2_E)[:, None]).clamp_min_(_BACKWARD_FLOOR)
    return log_p, torch.exp2(log_p, out=out[: len(log_p)])


def _log2_mixture(p: Tensor, q: Tensor, weight: float, out: Tensor) -> Tensor:
    out = torch.mul(p, weight, out=out[: len(p)])
    return out.add_(q, alpha=1.0 - weight).clamp_min_(torch.finfo(p.dtype).tiny).log2_()
