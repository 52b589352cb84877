"""Triton kernels over one vocabulary shard of the logits: sums per token, the JSD's sums per token, and the gradient.

Notation, per token (row): z are the student's and x the teacher's logits, c the inverse temperature, m_p and m_q the
maxima the logits are shifted by, d = (z - m_p) c and e = (x - m_q) c, p = exp(d) / Z and q = exp(e) / Z_q. Logits are
bfloat16, float16 or float32, their last stride is 1 and their row stride arbitrary; arithmetic is float32. What the
kernels take and return is in nats. Inside, shifted logits are in bits, d / ln 2, because the hardware's exponential is
that of base 2.

The forward pass is the online softmax of Milakov and Gimelshein, "Online normalizer calculation for softmax"
(arXiv:1805.02867), extended to expectations: sums are kept about running maxima and corrected when one moves. No
function here runs a collective or synchronises.

Rows that start at multiples of 16 bytes are read by whole vectors, others several times slower, with the same results.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dasd_megatron.losses.divergences import DIVERGENCES
from dasd_megatron.losses.statistics import merge_partials

_BITS = math.log2(math.e)

# float32's most negative number, about. A logit of -inf stands as this where it is a factor, so that its product with a
# probability of 0 is 0, and with any other hugely negative.
_LOWEST = tl.constexpr(-3.4e38)
# This stands for it where a product with a gradient's coefficient must not overflow either.
_FLOOR = tl.constexpr(-1e30)
_LN2 = tl.constexpr(math.log(2.0))

_THREADS = 128
# Fewer rows than this leave multiprocessors of a large GPU without work, unless several programs share a row.
_FEW_ROWS = 512
_PROGRAMS_FOR_FEW_ROWS = 1024
_LEAST_TILES_PER_PROGRAM = 4
# What Triton assumes when not told differs between its versions.
_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _rebase(old, new, bits):
    """Distance in bits of logits shifted by the maximum ``old`` from logits shifted by ``new``, the factor on their
    exponentials, and the shift for ``new``. A maximum of -inf shifts by 0."""
    shift = tl.where(new == -float("inf"), 0.0, new)
    moved = tl.maximum((old - shift) * bits, _LOWEST)
    return moved, tl.exp2(moved), shift


@triton.jit
def _about(weighted, moved, mass):
    """Return ``sum w v`` from the same sum about another maximum, with ``mass = sum w``; saturates, so that a factor of
    0 still gives 0."""
    return tl.maximum(weighted + moved * mass, _LOWEST)


@triton.jit
def _add_tile(
    z, x, top, mass, mean, x_top, x_mass, x_mean, cross, bits, HAS_TEACHER: tl.constexpr, WEIGHTED_BY: tl.constexpr
):
    """Add a tile ``[lanes, vector]`` to the running maxima and sums of each lane, ``[lanes]``."""
    new_top = tl.maximum(top, tl.max(z, 1))
    moved, factor, shift = _rebase(top, new_top, bits)
    d = (z - shift[:, None]) * bits
    p = tl.exp2(d)
    d = tl.maximum(d, _LOWEST)
    if HAS_TEACHER:
        new_x_top = tl.maximum(x_top, tl.max(x, 1))
        x_moved, x_factor, x_shift = _rebase(x_top, new_x_top, bits)
        e = (x - x_shift[:, None]) * bits
        q = tl.exp2(e)
        e = tl.maximum(e, _LOWEST)
        if WEIGHTED_BY == "student":
            cross = factor * _about(cross, x_moved, mass) + tl.sum(p * e, 1)
        if WEIGHTED_BY == "teacher":
            x_mean = x_factor * _about(x_mean, x_moved, x_mass) + tl.sum(q * e, 1)
            cross = x_factor * _about(cross, moved, x_mass) + tl.sum(q * d, 1)
        x_mass = x_factor * x_mass + tl.sum(q, 1)
        x_top = new_x_top
    mean = factor * _about(mean, moved, mass) + tl.sum(p * d, 1)
    mass = factor * mass + tl.sum(p, 1)
    return new_top, mass, mean, x_top, x_mass, x_mean, cross


@triton.jit
def _add_columns(
    z_row,
    x_row,
    begin,
    end,
    bits,
    HAS_TEACHER: tl.constexpr,
    WEIGHTED_BY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Maxima and sums of each lane, ``[lanes]``, over the columns from ``begin`` to ``end`` of a row.

    Every thread keeps the maxima and sums of its own lanes: a maximum over the program would cost a barrier per tile. A
    lane is one 16-byte load wide, which spreads the cost of correcting its sums over that many columns. Sums over
    hundreds of lanes, each over hundreds of tiles, added in a tree at the end, also lose fewer digits than one long
    sum: a few 1e-7 of their size at 150,000 columns.
    """
    TILE: tl.constexpr = LANES * VECTOR
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    top = tl.full([LANES], -float("inf"), tl.float32)
    x_top = top
    mass = tl.full([LANES], 0.0, tl.float32)
    mean = mass
    x_mass = mass
    x_mean = mass
    cross = mass
    # Whole tiles are loaded without a mask: a mask whose edge is not a multiple of the vector would make every load a
    # scalar one.
    whole = begin + (end - begin) // TILE * TILE
    for start in range(begin, whole, TILE):
        z = tl.load(z_row + (start + offsets)).to(tl.float32)
        x = z
        if HAS_TEACHER:
            x = tl.load(x_row + (start + offsets)).to(tl.float32)
        top, mass, mean, x_top, x_mass, x_mean, cross = _add_tile(
            z, x, top, mass, mean, x_top, x_mass, x_mean, cross, bits, HAS_TEACHER, WEIGHTED_BY
        )
    if whole < end:
        inside = whole + offsets < end
        z = tl.load(z_row + (whole + offsets), inside, -float("inf")).to(tl.float32)
        x = z
        if HAS_TEACHER:
            x = tl.load(x_row + (whole + offsets), inside, -float("inf")).to(tl.float32)
        top, mass, mean, x_top, x_mass, x_mean, cross = _add_tile(
            z, x, top, mass, mean, x_top, x_mass, x_mean, cross, bits, HAS_TEACHER, WEIGHTED_BY
        )
    return top, mass, mean, x_top, x_mass, x_mean, cross


@triton.jit
def _join_lanes(top, mass, bits):
    """Maximum over the lanes, their distance from it and the factor on their sums, and the mass about it."""
    maximum = tl.max(top, 0)
    moved, factor, _ = _rebase(top, maximum, bits)
    total = tl.sum(factor * mass, 0)
    # Maxima ignore NaN, sums keep it.
    return tl.where(total == total, maximum, float("nan")), moved, factor, total


@triton.jit
def _ratio(weighted, mass):
    """Expectation in nats; 0 without mass."""
    return tl.where(mass == 0.0, 0.0, weighted * _LN2 / mass)


@triton.jit
def _partials_kernel(
    logits,
    teacher,
    targets,
    packed,
    logits_stride,
    teacher_stride,
    columns,
    first_column,
    chunk,
    bits,
    WEIGHTED_BY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Program (row, split) reduces ``chunk`` columns of a row. ``packed``: float32 ``[4 or 9, splits, rows]``."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.num_programs(0)
    plane = rows * tl.num_programs(1)
    begin = split * chunk
    end = tl.minimum(begin + chunk, columns)
    HAS_TEACHER: tl.constexpr = teacher is not None

    z_row = logits + row.to(tl.int64) * logits_stride
    x_row = z_row
    if HAS_TEACHER:
        x_row = teacher + row.to(tl.int64) * teacher_stride
    top, mass, mean, x_top, x_mass, x_mean, cross = _add_columns(
        z_row, x_row, begin, end, bits, HAS_TEACHER, WEIGHTED_BY, LANES, VECTOR
    )

    maximum, moved, factor, z_mass = _join_lanes(top, mass, bits)
    z_mean = tl.sum(factor * _about(mean, moved, mass), 0)
    target = tl.load(targets + row) - first_column
    mine = (target >= begin) & (target < end)
    slot = packed + split * rows + row
    tl.store(slot, maximum)
    tl.store(slot + plane, z_mass)
    tl.store(slot + 2 * plane, _ratio(z_mean, z_mass))
    tl.store(slot + 3 * plane, tl.load(z_row + target, mine, 0.0).to(tl.float32))
    if HAS_TEACHER:
        x_maximum, x_moved, x_factor, q_mass = _join_lanes(x_top, x_mass, bits)
        q_mean = 0.0
        crossed = 0.0
        if WEIGHTED_BY == "student":
            crossed = _ratio(tl.sum(factor * _about(cross, x_moved, mass), 0), z_mass)
        if WEIGHTED_BY == "teacher":
            q_mean = _ratio(tl.sum(x_factor * _about(x_mean, x_moved, x_mass), 0), q_mass)
            crossed = _ratio(tl.sum(x_factor * _about(cross, moved, x_mass), 0), q_mass)
        tl.store(slot + 4 * plane, x_maximum)
        tl.store(slot + 5 * plane, q_mass)
        tl.store(slot + 6 * plane, q_mean)
        tl.store(slot + 7 * plane, tl.load(x_row + target, mine, 0.0).to(tl.float32))
        tl.store(slot + 8 * plane, crossed)


@triton.jit
def _log_probs(z, x, p_max, q_max, p_log_z, q_log_z, bits, nats_to_bits):
    """Return ``log2 p``, ``log2 q`` and their difference, all finite where a logit is -inf. The difference is taken
    before anything is rounded to the size of a log-prob, hence accurate where p is close to q."""
    d = tl.maximum(z - p_max, _FLOOR)
    e = tl.maximum(x - q_max, _FLOOR)
    gap = (d - e) * bits - (p_log_z - q_log_z) * nats_to_bits
    return d * bits - p_log_z * nats_to_bits, e * bits - q_log_z * nats_to_bits, gap


@triton.jit
def _mixture(log_p, log_q, gap, weight):
    """p, q, log(p / m) and log(q / m) in nats, with m = w p + (1 - w) q, from ``log2 p``, ``log2 q`` and their
    difference ``gap``.

    With h the larger and l the smaller of p and q and u the weight of l, m = h (1 - u (1 - l/h)): nothing overflows,
    and the logarithm is exactly 0 where p = q and off by about 1e-7 near it.
    """
    ratio = tl.exp2(-tl.abs(gap))
    larger = tl.exp2(tl.maximum(log_p, log_q))
    smaller = larger * ratio
    missing = tl.where(gap >= 0.0, 1.0 - weight, weight) * (1.0 - ratio)
    m_to_larger = tl.log(1.0 - missing)
    p = tl.where(gap >= 0.0, larger, smaller)
    q = tl.where(gap >= 0.0, smaller, larger)
    return p, q, tl.minimum(gap, 0.0) * _LN2 - m_to_larger, -tl.maximum(gap, 0.0) * _LN2 - m_to_larger


@triton.jit
def _mixture_kernel(
    logits,
    teacher,
    p_max,
    p_log_z,
    q_max,
    q_log_z,
    sums,
    logits_stride,
    teacher_stride,
    columns,
    chunk,
    bits,
    nats_to_bits,
    weight,
    BLOCK: tl.constexpr,
):
    """Program (row, split) sums ``chunk`` columns of a row. ``sums``: float32 ``[2, splits, rows]``."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.num_programs(0)
    begin = split * chunk
    end = tl.minimum(begin + chunk, columns)
    z_row = logits + row.to(tl.int64) * logits_stride
    x_row = teacher + row.to(tl.int64) * teacher_stride
    z_max = tl.load(p_max + row)
    x_max = tl.load(q_max + row)
    z_log_z = tl.load(p_log_z + row)
    x_log_z = tl.load(q_log_z + row)
    offsets = tl.arange(0, BLOCK)
    student = tl.full([BLOCK], 0.0, tl.float32)
    other = student
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        z = tl.load(z_row + (start + offsets)).to(tl.float32)
        x = tl.load(x_row + (start + offsets)).to(tl.float32)
        log_p, log_q, gap = _log_probs(z, x, z_max, x_max, z_log_z, x_log_z, bits, nats_to_bits)
        p, q, p_to_m, q_to_m = _mixture(log_p, log_q, gap, weight)
        student += p * p_to_m
        other += q * q_to_m
    if whole < end:
        inside = whole + offsets < end
        z = tl.load(z_row + (whole + offsets), inside, -float("inf")).to(tl.float32)
        x = tl.load(x_row + (whole + offsets), inside, -float("inf")).to(tl.float32)
        log_p, log_q, gap = _log_probs(z, x, z_max, x_max, z_log_z, x_log_z, bits, nats_to_bits)
        p, q, p_to_m, q_to_m = _mixture(log_p, log_q, gap, weight)
        student += p * p_to_m
        other += q * q_to_m
    slot = sums + split * rows + row
    tl.store(slot, tl.sum(student, 0))
    tl.store(slot + rows * tl.num_programs(1), tl.sum(other, 0))


@triton.jit
def _load_block(row, cols, begin, columns, BLOCK: tl.constexpr):
    """Load logits ``[BLOCK]`` of a row from column ``begin`` on; -inf past the vocabulary.

    Blocks inside the vocabulary load without a mask: one whose edge is not a multiple of the vector makes the access
    scalar.
    """
    if begin + BLOCK <= columns:
        block = tl.load(row + cols).to(tl.float32)
    else:
        block = tl.load(row + cols, cols < columns, -float("inf")).to(tl.float32)
    return block


@triton.jit
def _backward_kernel(
    logits,
    teacher,
    out,
    targets,
    p_max,
    p_log_z,
    q_max,
    q_log_z,
    constant,
    linear,
    cross,
    teacher_share,
    one_hot,
    mixture_weight,
    logits_stride,
    teacher_stride,
    out_stride,
    columns,
    width,
    first_column,
    blocks,
    bits,
    nats_to_bits,
    BLOCK: tl.constexpr,
):
    """Program ``row * blocks + block`` writes ``BLOCK`` columns of a row. A coefficient that is None compiles to
    nothing."""
    row = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * BLOCK
    cols = begin + tl.arange(0, BLOCK)
    z_row = logits + row.to(tl.int64) * logits_stride
    NEEDS_TEACHER: tl.constexpr = cross is not None or teacher_share is not None

    z = _load_block(z_row, cols, begin, columns, BLOCK)
    x = z
    x_max = 0.0
    x_log_z = 0.0
    if NEEDS_TEACHER:
        x = _load_block(teacher + row.to(tl.int64) * teacher_stride, cols, begin, columns, BLOCK)
        x_max = tl.load(q_max + row)
        x_log_z = tl.load(q_log_z + row)
    log_p, log_q, gap = _log_probs(
        z, x, tl.load(p_max + row), x_max, tl.load(p_log_z + row), x_log_z, bits, nats_to_bits
    )

    # constant + linear log p - cross X is evaluated as constant + (linear - cross) log p + cross (log p - X): the two
    # terms of a divergence nearly cancel where p is close to q.
    factor = tl.load(constant + row)
    slope = 0.0
    if linear is not None:
        slope += tl.load(linear + row)
    if mixture_weight is not None:
        p, q, p_to_m, _ = _mixture(log_p, log_q, gap, mixture_weight)
    else:
        p = tl.exp2(log_p)
        q = tl.exp2(log_q)
        p_to_m = gap * _LN2
    if cross is not None:
        weight = tl.load(cross + row)
        slope -= weight
        factor += weight * p_to_m
    if linear is not None or cross is not None:
        factor += (slope * _LN2) * log_p
    gradient = p * factor
    if teacher_share is not None:
        gradient -= tl.load(teacher_share + row) * q
    if one_hot is not None:
        target = (tl.load(targets + row) - first_column).to(tl.int32)
        gradient += tl.where(cols == target, tl.load(one_hot + row), 0.0)

    out_row = out + row.to(tl.int64) * out_stride
    if begin + BLOCK <= columns:
        tl.store(out_row + cols, gradient)
    else:
        tl.store(out_row + cols, tl.where(cols < columns, gradient, 0.0), cols < width)


def local_partials(
    logits: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    *,
    columns: int,
    first_column: int,
    inverse_temperature: float,
    divergence: str,
) -> Tensor:
    """Pass over a shard once: return what it knows of each token, relative to its own maxima.

    Args:
        logits: ``[T, V_local]``.
        teacher: ``[T, V_local]``, or None.
        targets: ``[T]`` int64 global token ids.
        columns: columns that belong to the vocabulary, from the left; the others are not read.
        first_column: global id of the first column.
        inverse_temperature: c.
        divergence: ``reverse_kl``, ``forward_kl`` or ``jsd``; without a teacher of no effect.

    Returns:
        float32 ``[4, T]``, ``[9, T]`` with a teacher. Sums are over this shard's columns; a column at -inf adds 0.

        0. maximum of z, not divided by the temperature; -inf without a finite logit, NaN where a logit is NaN or +inf
        1. Z = sum exp(d); 0 without mass. A maximum of -inf shifts by 0
        2. sum exp(d) d / Z; 0 without mass
        3. z at the target, 0 if another shard owns it
        4. to 7. the same of the teacher; its row 6 is 0 but for ``forward_kl``, which alone needs it
        8. ``reverse_kl``: sum exp(d) e / Z. ``forward_kl``: sum exp(e) d / Z_q. ``jsd``: 0. A column whose other logit
           is at -inf enters with -2.3e38 times its weight, hence not at all where that is 0
    """
    kind = DIVERGENCES[divergence]
    tokens = logits.shape[0]
    lanes, vector, warps = _lanes(columns, logits, teacher)
    tile = lanes * vector
    splits, chunk = _splits(tokens, columns, tile)
    parts = torch.empty(4 if teacher is None else 9, splits, tokens, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _partials_kernel[(tokens, splits)](
            logits,
            teacher,
            targets.contiguous(),
            parts,
            logits.stride(0),
            0 if teacher is None else teacher.stride(0),
            columns,
            first_column,
            chunk,
            inverse_temperature * _BITS,
            WEIGHTED_BY=kind.weighted_by,
            LANES=lanes,
            VECTOR=vector,
            num_warps=warps,
            **_OPTIONS,
        )
    return parts[:, 0] if splits == 1 else merge_partials(parts.transpose(0, 1), kind, inverse_temperature)


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
) -> Tensor:
    """Return a shard's part of the two Kullback-Leibler divergences from the mixture m = w p + (1 - w) q.

    Args:
        logits, teacher: ``[T, V_local]``.
        p_max, q_max: ``[T]`` float32, maxima over all shards, not divided by the temperature.
        p_log_z, q_log_z: ``[T]`` float32, logarithms of the sums over all shards about these maxima.
        columns: columns that belong to the vocabulary; the others are not read.
        inverse_temperature: c.
        weight: w, between 0 and 1.

    Returns:
        float32 ``[2, T]``: sum p log(p / m) and sum q log(q / m), in nats. Columns with p = 0, or q = 0, add 0 to that
        sum.
    """
    tokens = logits.shape[0]
    # The logarithm makes this the one kernel that computes for longer than it loads: fewer registers, more threads.
    block, warps = _block(columns, 8)
    splits, chunk = _splits(tokens, columns, block)
    sums = torch.empty(2, splits, tokens, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _mixture_kernel[(tokens, splits)](
            logits,
            teacher,
            p_max.contiguous(),
            p_log_z.contiguous(),
            q_max.contiguous(),
            q_log_z.contiguous(),
            sums,
            logits.stride(0),
            teacher.stride(0),
            columns,
            chunk,
            inverse_temperature * _BITS,
            _BITS,
            weight,
            BLOCK=block,
            num_warps=warps,
            **_OPTIONS,
        )
    return sums[:, 0] if splits == 1 else sums.sum(1)


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
) -> None:
    """Write a shard's gradient into all of ``out``, ``[T, V_local]``, which may be ``logits`` itself:

        out = p (constant + linear log p - cross X) - teacher_share q + [column is the target] one_hot

    with X = log q, or log(w p + (1 - w) q) where ``mixture_weight`` is w. Columns without probability get 0 from the
    first term, columns at or past ``columns`` get 0.

    Args:
        logits, teacher: ``[T, V_local]``; the teacher is not read, and may be None, without ``cross`` and
            ``teacher_share``.
        out: ``[T, V_local]``; its memory may be that of ``logits``, element by element, or must not overlap it.
        targets: ``[T]`` int64 global token ids.
        columns: columns that belong to the vocabulary; the others are not read.
        first_column: global id of the first column.
        inverse_temperature: c; the result is not multiplied by it.
        p_max, p_log_z, q_max, q_log_z: as for ``mixture_sums``; the teacher's are needed where the teacher is.
        constant, linear, cross, teacher_share, one_hot: ``[T]``, per nat, used as float32; None for 0.
        mixture_weight: w, between 0 and 1, or None.
    """
    tokens, width = out.shape
    block, warps = _block(width, 16)
    blocks = triton.cdiv(width, block)
    # Triton compiles what reads the teacher only where it is given.
    read = teacher if cross is not None or teacher_share is not None else None
    rows = [p_max, p_log_z, q_max, q_log_z, constant, linear, cross, teacher_share, one_hot]
    with torch.cuda.device_of(logits):
        _backward_kernel[(tokens * blocks,)](
            logits,
            read,
            out,
            targets.contiguous(),
            *(None if row is None else row.to(torch.float32).contiguous() for row in rows),
            mixture_weight if cross is not None else None,
            logits.stride(0),
            0 if read is None else read.stride(0),
            out.stride(0),
            columns,
            width,
            first_column,
            blocks,
            inverse_temperature * _BITS,
            _BITS,
            BLOCK=block,
            num_warps=warps,
            **_OPTIONS,
        )


def _lanes(columns: int, logits: Tensor, teacher: Tensor | None) -> tuple[int, int, int]:
    """Return the lanes of a tile, the columns per lane and the warps per program. Each thread loads twice 16 bytes of
    each tensor, less for few columns."""
    itemsize = logits.itemsize if teacher is None else min(logits.itemsize, teacher.itemsize)
    vector = 16 // itemsize
    lanes = min(2 * _THREADS, triton.next_power_of_2(max(triton.cdiv(columns, vector), 1)))
    return lanes, vector, max(min(lanes // 2, _THREADS) // 32, 1)


def _block(columns: int, per_thread: int) -> tuple[int, int]:
    """Return columns per step and warps per program, fewer for few columns."""
    block = min(per_thread * _THREADS, triton.next_power_of_2(max(columns, 1)))
    return block, max(min(block // per_thread, _THREADS) // 32, 1)


def _splits(tokens: int, columns: int, tile: int) -> tuple[int, int]:
    """Return the programs per row, and the columns per program in whole tiles."""
    tiles = max(triton.cdiv(columns, tile), 1)
    if tokens >= _FEW_ROWS:
        return 1, tiles * tile
    wanted = min(triton.cdiv(_PROGRAMS_FOR_FEW_ROWS, max(tokens, 1)), triton.cdiv(tiles, _LEAST_TILES_PER_PROGRAM))
    chunk = triton.cdiv(tiles, wanted) * tile
    return max(triton.cdiv(columns, chunk), 1), chunk
