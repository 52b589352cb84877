"""One rank's arithmetic on its own vocabulary shard, in PyTorch: partial sums, the mixture's sums, and the closed-form
gradient.

``triton_kernels`` has the same three functions for GPUs; this is their reference, and what runs everywhere else.
Notation: z and x are the student's and the teacher's logits, ``c = 1 / temperature``, ``d = (z - max z) c`` and
``e = (x - max x) c``.

Powers of two stand for exponentials: PyTorch's ``exp2`` takes half the time of its ``exp`` on CPU. Logits are scaled
and shifted in one fused multiply-add, ``z c log2(e) - shift``, with the whole number next to the scaled maximum for a
shift (:class:`_Frame`): nothing is rounded but the result, however large the logits are.

Rows are worked on a few at a time, so that the buffers stay in the caches of a core: on CPU that, and not arithmetic,
decides the speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dasd_megatron.losses.divergences import DIVERGENCES, Divergence, Probabilities

# These are the rows of the packed partial numbers. Expectations are over the shard's own columns, normalised within
# them, in nats, about its own maxima.
MAX, Z, MEAN, TARGET, TEACHER_MAX, TEACHER_Z, TEACHER_MEAN, TEACHER_TARGET, CROSS = range(9)

_LOG2_E = 1.0 / math.log(2.0)
_LN_2 = math.log(2.0)
# Shifted logits in the backward pass end here. exp() is 0 long before, and a product with a gradient's coefficient
# cannot overflow.
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
    """Pass over a shard's logits once, to the numbers from which all ranks together make the statistics.

    Args:
        logits, teacher: ``[T, V_local]``, float16, bfloat16, float32 or float64; the teacher may be None.
        targets: ``[T]`` int64 global token ids.
        columns: how many of the shard's columns belong to the vocabulary; the rest are padding and are not read.
        first_column: global id of column 0.
        divergence: a key of :data:`~dasd_megatron.losses.divergences.DIVERGENCES`; decides which expectations the
            teacher's rows hold.
        chunk_size: rows at once; None chooses by the cache.

    Returns:
        ``[4, T]``, with a teacher ``[9, T]``, float32 (float64 for float64 logits): MAX raw maximum, -inf without mass;
        Z sum of exp(d); MEAN expectation of d; TARGET raw logit of the target where this shard owns it, else 0; the
        same four for the teacher, whose mean is 0 but for ``forward_kl``; CROSS the expectation of e under the student
        (``reverse_kl``) or of d under the teacher (``forward_kl``). Sums without mass are 0. Where the weight is not 0
        and the other logit is -inf, CROSS is beyond -1e30.
    """
    dtype = accumulator(logits)
    lowest = torch.finfo(dtype).min
    scale = _log2_scale(inverse_temperature, dtype)
    weighted_by = DIVERGENCES[divergence].weighted_by
    packed = torch.zeros(4 if teacher is None else 9, logits.shape[0], dtype=dtype, device=logits.device)
    packed[MAX:CROSS:TEACHER_MAX] = -math.inf
    if columns == 0:
        return packed
    chunk_size = chunk_size or rows_by_cache(logits, columns, teacher is not None)
    work = _buffers(logits, columns, chunk_size, 2 if teacher is None else 4)
    for rows in _chunks(logits, chunk_size):
        own, other = logits[rows, :columns], None if teacher is None else teacher[rows, :columns]
        _sum_rows(own, other, packed[:, rows], work, scale, weighted_by, floor=None)
        # A logit of -inf makes 0 * -inf. That is rare, so what avoids it costs a pass only where it has happened.
        if not bool(packed[MEAN:, rows].isfinite().all()):
            _sum_rows(own, other, packed[:, rows], work, scale, weighted_by, floor=lowest)
    _normalise(packed, scale, weighted_by)
    local = targets - first_column
    owned = (local >= 0) & (local < columns)
    index = torch.where(owned, local, 0)[:, None]
    packed[TARGET] = torch.where(owned, logits.gather(1, index)[:, 0].to(dtype), 0.0)
    if teacher is not None:
        packed[TEACHER_TARGET] = torch.where(owned, teacher.gather(1, index)[:, 0].to(dtype), 0.0)
    return packed


def _sum_rows(
    logits: Tensor,
    teacher: Tensor | None,
    sums: Tensor,
    work: list[Tensor],
    scale: float,
    weighted_by: Literal["student", "teacher"] | None,
    floor: float | None,
) -> None:
    """Write maxima, masses and weighted sums of a few rows into ``sums``, in powers of two about the shifts.

    Calls on few rows cost as much as their arithmetic, so only what reads the logits is done here. A product that is
    only summed is written over a factor that is not needed again: a dot product proper would lose digits.
    """
    d = _about_maximum(logits, scale, work[0], sums[MAX], floor)
    p = torch.exp2(d, out=work[1][: len(d)])
    torch.sum(p, -1, out=sums[Z])
    if teacher is None:
        torch.sum(d.mul_(p), -1, out=sums[MEAN])
        return
    # Without weighted sums, no product needs finite logarithms of the teacher.
    e = _about_maximum(teacher, scale, work[2], sums[TEACHER_MAX], None if weighted_by is None else floor)
    q = torch.exp2(e, out=work[3][: len(e)])
    torch.sum(q, -1, out=sums[TEACHER_Z])
    if weighted_by == "student":
        torch.sum(d.mul_(p), -1, out=sums[MEAN])
        torch.sum(e.mul_(p), -1, out=sums[CROSS])
        return
    torch.sum(p.mul_(d), -1, out=sums[MEAN])
    if weighted_by == "teacher":
        torch.sum(e.mul_(q), -1, out=sums[TEACHER_MEAN])
        torch.sum(d.mul_(q), -1, out=sums[CROSS])


def _normalise(packed: Tensor, scale: float, weighted_by: Literal["student", "teacher"] | None) -> None:
    """Turn the sums of :func:`_sum_rows`, all rows of them, into masses about the maxima and expectations in nats."""

    def expectation(weighted: Tensor, mass: Tensor, offset: Tensor) -> Tensor:
        return torch.where(mass == 0, 0.0, (weighted / mass + offset) * _LN_2)

    sums = packed.to(torch.float64, copy=True)
    offset = _offset(packed[MAX], scale)
    packed[Z], packed[MEAN] = sums[Z] * offset.exp2(), expectation(sums[MEAN], sums[Z], offset)
    if len(packed) <= CROSS:
        return
    teacher_offset = _offset(packed[TEACHER_MAX], scale)
    packed[TEACHER_Z] = sums[TEACHER_Z] * teacher_offset.exp2()
    if weighted_by == "student":
        packed[CROSS] = expectation(sums[CROSS], sums[Z], teacher_offset)
    elif weighted_by == "teacher":
        packed[TEACHER_MEAN] = expectation(sums[TEACHER_MEAN], sums[TEACHER_Z], teacher_offset)
        packed[CROSS] = expectation(sums[CROSS], sums[TEACHER_Z], offset)


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
    """Return the sums of the Jensen-Shannon divergence's second pass: ``p log(p / m)`` and ``q log(q / m)`` over this
    shard's columns, ``[2, T]``.

    ``m = w p + (1 - w) q``. Maxima and logarithms of the normalisers are those of the whole vocabulary, ``[T]``.
    """
    sums = torch.zeros(2, logits.shape[0], dtype=accumulator(logits), device=logits.device)
    if columns == 0:
        return sums
    chunk_size = chunk_size or rows_by_cache(logits, columns, True)
    work_d, work_e, work_p, work_q, work_m = _buffers(logits, columns, chunk_size, 5)
    scale = _log2_scale(inverse_temperature, sums.dtype)
    student = _Frame.of(p_max, scale, p_log_z, probabilities=True)
    other = _Frame.of(q_max, scale, q_log_z, probabilities=True)
    # With this floor no probability is 0, so neither is the mixture, and its logarithm is finite. What the floor adds
    # to a sum is lost in rounding.
    least = math.log2(torch.finfo(sums.dtype).tiny) + 1

    def reduce(rows: slice, floor: float | None) -> None:
        log_p = student.log2_probabilities(logits, rows, columns, work_d, floor)
        p = torch.exp2(log_p, out=work_p[: len(log_p)])
        log_q = other.log2_probabilities(teacher, rows, columns, work_e, floor)
        q = torch.exp2(log_q, out=work_q[: len(log_q)])
        log_m = torch.lerp(q, p, weight, out=work_m[: len(p)]).log2_()
        torch.sum(log_p.sub_(log_m).mul_(p), -1, out=sums[0, rows])
        torch.sum(log_q.sub_(log_m).mul_(q), -1, out=sums[1, rows])

    for rows in _chunks(logits, chunk_size):
        reduce(rows, None)
        # A sum has 0 log 0 where both probabilities are below float32's least.
        if not bool(sums[:, rows].isfinite().all()):
            reduce(rows, least)
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
    """Write the gradient ``p (constant + linear log p - cross X) - teacher_share q + one_hot [v = target]`` into
    ``out``.

    Args:
        out: ``[T, V_local]``; may be ``logits`` itself. Padding columns get 0.
        p_max, p_log_z, q_max, q_log_z: ``[T]`` maxima and logarithms of the normalisers over the whole vocabulary.
        constant, linear, cross, teacher_share, one_hot: ``[T]`` coefficients, which contain the incoming gradients and
            the division by the temperature; None: 0. ``cross`` comes with ``linear``.
        mixture_weight: X is log q; with a weight w it is log(w p + (1 - w) q).
        logits, teacher, targets, columns, first_column, chunk_size: as in :func:`local_partials`.
    """
    out[:, columns:] = 0
    if columns == 0:
        return
    dtype = accumulator(logits)
    scale = _log2_scale(inverse_temperature, dtype)
    with_mixture = mixture_weight is not None
    student = _Frame.of(p_max, scale, p_log_z, probabilities=with_mixture)
    other = None
    if (cross is not None or teacher_share is not None) and teacher is not None:
        if q_max is None or q_log_z is None:
            raise ValueError("cross and teacher_share need q_max and q_log_z")
        other = _Teacher(teacher, _Frame.of(q_max, scale, q_log_z, probabilities=with_mixture), mixture_weight)
    terms = _terms(student, other, constant, linear, cross, teacher_share, with_mixture=with_mixture, dtype=dtype)
    if one_hot is not None:
        local = targets - first_column
        owned = (local >= 0) & (local < columns)
        index, one_hot = torch.where(owned, local, 0)[:, None], torch.where(owned, one_hot, 0.0).to(dtype)[:, None]

    chunk_size = chunk_size or rows_by_cache(logits, columns, other is not None)
    count = 4 if teacher_share is not None else 3 if other is not None else 2
    work_d, work_p, *work = _buffers(logits, columns, chunk_size, count)
    for rows in _chunks(logits, chunk_size):
        d = (student.log2_probabilities if with_mixture else student.shifted)(logits, rows, columns, work_d)
        p = torch.exp2(d, out=work_p[: len(d)])
        factor = terms.constant[rows, None]
        if terms.linear is not None:
            factor = d.clamp_min_(_BACKWARD_FLOOR).mul_(terms.linear[rows, None]).add_(factor)
        if terms.cross is not None and other is not None:
            factor = factor.sub_(other.log2_other(p, rows, columns, work[0]).mul_(terms.cross[rows, None]))
        destination = out[rows, :columns]
        result = destination if destination.dtype == dtype else p
        if terms.teacher_share is not None and other is not None:
            q = other.frame.shifted(other.logits, rows, columns, work[1]).exp2_().mul_(terms.teacher_share[rows, None])
            torch.sub(p.mul_(factor), q, out=result)
        else:
            torch.mul(p, factor, out=result)
        if one_hot is not None:
            result.scatter_add_(1, index[rows], one_hot[rows])
        if result is p:
            destination.copy_(p)


class EntryClip(NamedTuple):
    """A bound in nats on each summand of a divergence, and the mixture's weight of the student."""

    divergence: Divergence
    weight: float
    bound: float


class _ClippedEntries:
    """Summands of a divergence and their slopes, bounded by a clip, for a few rows at a time."""

    def __init__(self, clip: EntryClip, student: _Frame, other: _Frame, columns: int, buffers: list[Tensor]) -> None:
        self.clip, self.student, self.other, self.columns, self.buffers = clip, student, other, columns, buffers

    def __call__(self, logits: Tensor, teacher: Tensor, rows: slice) -> tuple[Probabilities, Tensor, Tensor]:
        """Return the probabilities, the contributions of at most the bound, and the slopes, 0 where the bound holds a
        contribution back."""
        work_d, work_p, work_e, work_q = self.buffers
        # The floor is so low that what is infinite stays above every bound, and is not NaN times a probability of 0.
        log_p = self.student.log2_probabilities(logits, rows, self.columns, work_d, _BACKWARD_FLOOR)
        p = torch.exp2(log_p, out=work_p[: len(log_p)])
        log_q = self.other.log2_probabilities(teacher, rows, self.columns, work_e, _BACKWARD_FLOOR)
        q = torch.exp2(log_q, out=work_q[: len(log_q)])
        probabilities = Probabilities(log_p.mul_(_LN_2), p, log_q.mul_(_LN_2), q)
        entries = self.clip.divergence.entries(probabilities, self.clip.weight)
        slope = entries.slope.masked_fill_(entries.contribution > self.clip.bound, 0.0)
        return probabilities, entries.contribution.clamp_max_(self.clip.bound), slope


def entry_sums(
    logits: Tensor,
    teacher: Tensor,
    p_max: Tensor,
    p_log_z: Tensor,
    q_max: Tensor,
    q_log_z: Tensor,
    *,
    columns: int,
    inverse_temperature: float,
    clip: EntryClip,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the sums of a divergence whose entries are clipped, over this shard's columns, ``[2, T]``: of
    ``min(contribution, bound)``, and of the slopes of the entries under the bound.

    Maxima and logarithms of the normalisers are those of the whole vocabulary, ``[T]``. What would be infinite counts
    as the bound, so the sums are finite. Besides four buffers this makes up to four temporary tensors of some rows.
    """
    sums = torch.zeros(2, logits.shape[0], dtype=accumulator(logits), device=logits.device)
    if columns == 0:
        return sums
    chunk_size = chunk_size or rows_by_cache(logits, columns, True)
    scale = _log2_scale(inverse_temperature, sums.dtype)
    student = _Frame.of(p_max, scale, p_log_z, probabilities=True)
    other = _Frame.of(q_max, scale, q_log_z, probabilities=True)
    entries = _ClippedEntries(clip, student, other, columns, _buffers(logits, columns, chunk_size, 4))
    for rows in _chunks(logits, chunk_size):
        _, contribution, slope = entries(logits, teacher, rows)
        torch.sum(contribution, -1, out=sums[0, rows])
        torch.sum(slope, -1, out=sums[1, rows])
    return sums


def entry_backward(
    logits: Tensor,
    teacher: Tensor,
    out: Tensor,
    targets: Tensor,
    *,
    columns: int,
    first_column: int,
    inverse_temperature: float,
    p_max: Tensor,
    p_log_z: Tensor,
    q_max: Tensor,
    q_log_z: Tensor,
    constant: Tensor,
    entries: Tensor,
    clip: EntryClip,
    linear: Tensor | None = None,
    one_hot: Tensor | None = None,
    chunk_size: int | None = None,
) -> None:
    """Write the gradient ``p (constant + linear log p) + entries a + one_hot [v = target]`` into ``out``, with a the
    slopes of the entries under the bound; the arguments are those of :func:`backward`."""
    out[:, columns:] = 0
    if columns == 0:
        return
    dtype = accumulator(logits)
    chunk_size = chunk_size or rows_by_cache(logits, columns, True)
    scale = _log2_scale(inverse_temperature, dtype)
    student = _Frame.of(p_max, scale, p_log_z, probabilities=True)
    other = _Frame.of(q_max, scale, q_log_z, probabilities=True)
    clipped = _ClippedEntries(clip, student, other, columns, _buffers(logits, columns, chunk_size, 4))
    constant, entries = constant.to(dtype), entries.to(dtype)
    linear = None if linear is None else linear.to(dtype)
    if one_hot is not None:
        local = targets - first_column
        owned = (local >= 0) & (local < columns)
        index, one_hot = torch.where(owned, local, 0)[:, None], torch.where(owned, one_hot, 0.0).to(dtype)[:, None]
    for rows in _chunks(logits, chunk_size):
        probabilities, _, slope = clipped(logits, teacher, rows)
        factor = constant[rows, None]
        if linear is not None:
            factor = probabilities.log_p.mul_(linear[rows, None]).add_(factor)
        result = slope.mul_(entries[rows, None]).addcmul_(probabilities.p, factor)
        if one_hot is not None:
            result.scatter_add_(1, index[rows], one_hot[rows])
        out[rows, :columns] = result


class _Terms(NamedTuple):
    """Coefficients of the gradient about the frames, ``[T]`` in the dtype of the arithmetic."""

    constant: Tensor
    linear: Tensor | None
    cross: Tensor | None
    teacher_share: Tensor | None


def _terms(
    student: _Frame,
    other: _Teacher | None,
    constant: Tensor,
    linear: Tensor | None,
    cross: Tensor | None,
    teacher_share: Tensor | None,
    *,
    with_mixture: bool,
    dtype: torch.dtype,
) -> _Terms:
    """Return the coefficients for logarithms to base 2; without a mixture they are for unnormalised probabilities."""
    constant = constant.double()
    linear = None if linear is None else linear.double() * _LN_2
    cross = None if cross is None else cross.double() * _LN_2
    if not with_mixture:
        # p stays unnormalised, and X about its shift: what is missing goes into the coefficients, in float64 for their
        # differences.
        if linear is not None:
            constant = constant - linear * student.log2_z
        if cross is not None and other is not None:
            constant = constant + cross * other.frame.log2_z
        inverse_z = student.log2_z.neg().exp2()
        constant = constant * inverse_z
        linear = None if linear is None else linear * inverse_z
        cross = None if cross is None else cross * inverse_z
    if teacher_share is not None and other is not None:
        teacher_share = (teacher_share.double() * other.frame.log2_z.neg().exp2()).to(dtype)
    return _Terms(
        constant.to(dtype),
        None if linear is None else linear.to(dtype),
        None if cross is None else cross.to(dtype),
        teacher_share,
    )


def accumulator(logits: Tensor) -> torch.dtype:
    """Return the dtype of statistics of ``logits``."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@functools.lru_cache
def _l2_cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache, of the GPU or of one CPU core; 1 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


def rows_by_cache(logits: Tensor, columns: int, with_teacher: bool) -> int:
    """Return the number of rows to work on at once when the caller leaves the choice open."""
    row_bytes = max(columns, 1) * accumulator(logits).itemsize * (4 if with_teacher else 2)
    # Measured on CPU at 75,968 columns, 4 to 8 rows of them are fastest, in buffers of about eight times the L2 cache:
    # with fewer rows the calls cost as much as their arithmetic, with more the next cache level no longer catches what
    # L2 does not.
    rows = max(8 * _l2_cache_bytes(logits.device) // row_bytes, 4)
    # Each thread works on rows of its own, in its core's own cache.
    return rows * torch.get_num_threads() if logits.device.type == "cpu" else rows


def _chunks(logits: Tensor, chunk_size: int) -> Iterator[slice]:
    return (slice(start, start + chunk_size) for start in range(0, logits.shape[0], chunk_size))


def _buffers(logits: Tensor, columns: int, chunk_size: int, count: int) -> list[Tensor]:
    shape = (min(chunk_size, logits.shape[0]), columns)
    return [torch.empty(shape, dtype=accumulator(logits), device=logits.device) for _ in range(count)]


def _log2_scale(inverse_temperature: float, dtype: torch.dtype) -> float:
    """Return the factor on the logits as the kernels' dtype holds it, so that arithmetic beside them can use the same
    number."""
    return torch.tensor(inverse_temperature * _LOG2_E, dtype=dtype).item()


def _scale_and_shift(logits: Tensor, scale: float, shift: Tensor, out: Tensor, floor: float | None) -> Tensor:
    """Write ``logits * scale - shift``, at least ``floor``, into the first rows of ``out``. Rounded once: PyTorch adds
    with ``alpha`` by a fused multiply-add."""
    out = out[: logits.shape[0]]
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    torch.add(shift.neg()[:, None], logits, alpha=scale, out=out)
    return out if floor is None else out.clamp_min_(floor)


def _shift_of(maximum: Tensor, scale: float) -> Tensor:
    # A row that is -inf throughout is shifted by the lowest number: it then has no mass, where -inf - -inf would have
    # made it NaN.
    return (maximum * scale).round_().clamp_min_(torch.finfo(maximum.dtype).min)


def _about_maximum(logits: Tensor, scale: float, out: Tensor, out_max: Tensor, floor: float | None) -> Tensor:
    """Return logits scaled and shifted by their row maxima, which go into ``out_max`` unscaled."""
    if logits.dtype == out_max.dtype:
        torch.amax(logits, -1, out=out_max)
    else:
        out_max.copy_(logits.amax(-1))
    return _scale_and_shift(logits, scale, _shift_of(out_max, scale), out, floor)


def _offset(maximum: Tensor, scale: float) -> Tensor:
    """Return the shift minus the scaled maximum ``[T]``, float64; 0 for a row that is -inf throughout."""
    return torch.where(maximum == -math.inf, 0.0, _shift_of(maximum, scale).double() - maximum.double() * scale)


class _Frame(NamedTuple):
    """The origin that scaled logits of rows are counted from, ``[T]``: scaled logits minus ``shift`` are logarithms to
    base 2."""

    scale: float
    shift: Tensor
    log2_z: Tensor
    """float64: logarithm to base 2 of the normaliser about the shift."""
    log2_total: Tensor | None
    """The same of the normaliser about 0 in the dtype of the logits, where it was asked for and its rounding is below
    2e-6 in all rows."""

    @classmethod
    def of(cls, maximum: Tensor, scale: float, log_z: Tensor, *, probabilities: bool) -> _Frame:
        """``probabilities``: :meth:`log2_probabilities` will be called. Finding out whether it may take the short way
        waits for the device."""
        shift = _shift_of(maximum, scale)
        log2_z = log_z.double() * _LOG2_E - _offset(maximum, scale)
        log2_total = None
        if probabilities and bool(((total := shift + log2_z).abs() < 64).all()):
            log2_total = total.to(maximum.dtype)
        return cls(scale, shift, log2_z, log2_total)

    def shifted(self, logits: Tensor, rows: slice, columns: int, out: Tensor, floor: float | None = None) -> Tensor:
        return _scale_and_shift(logits[rows, :columns], self.scale, self.shift[rows], out, floor)

    def log2_probabilities(
        self, logits: Tensor, rows: slice, columns: int, out: Tensor, floor: float | None = None
    ) -> Tensor:
        if self.log2_total is not None:
            return _scale_and_shift(logits[rows, :columns], self.scale, self.log2_total[rows], out, floor)
        log_p = self.shifted(logits, rows, columns, out).sub_(self.log2_z[rows, None].to(out.dtype))
        return log_p if floor is None else log_p.clamp_min_(floor)


class _Teacher(NamedTuple):
    """The teacher's side of the gradient."""

    logits: Tensor
    frame: _Frame
    mixture_weight: float | None

    def log2_other(self, p: Tensor, rows: slice, columns: int, out: Tensor) -> Tensor:
        """Return the logarithms to base 2 that ``cross`` multiplies, of a few rows: of the mixture with the student's
        probabilities ``p``, or of q about its shift."""
        if self.mixture_weight is None:
            return self.frame.shifted(self.logits, rows, columns, out, _BACKWARD_FLOOR)
        q = self.frame.log2_probabilities(self.logits, rows, columns, out).exp2_()
        mixture = torch.lerp(q, p, self.mixture_weight, out=q)
        return mixture.clamp_min_(torch.finfo(out.dtype).tiny).log2_()
