"""The Triton kernels on the CPU, through Triton's interpreter, against float64 formulas."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dasd_megatron.losses
from dasd_megatron.losses import DIVERGENCES, linear_token_stats, vocab_parallel_token_stats
from tests.support.kernel_reference import (
    COEFFICIENTS,
    CROSS,
    MAX,
    MEAN,
    TARGET,
    TEACHER_MAX,
    Z,
    check_backward,
    check_mixture_sums,
    check_partials,
    interpreted_kernels,
    make_case,
    normalisers,
    reference_partials,
)
from tests.support.token_stats_reference import weighted_sum

pytest.importorskip("triton", reason="triton is not installed")

# The interpreter computes with NumPy, which warns where the kernels mean it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted_kernels() as module:
        yield module


@pytest.fixture
def small_tiles(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 to 128 columns, so that short rows have several, and one program per tile of a row."""
    monkeypatch.setattr(kernels, "_THREADS", 8)
    monkeypatch.setattr(kernels, "_LEAST_TILES_PER_PROGRAM", 1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.seed() % 2**31)


def described(generator: torch.Generator, *parts: object) -> str:
    return " ".join(map(str, (f"seed {generator.initial_seed()}", *parts)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_partials(kernels: ModuleType, generator: torch.Generator, divergence: str | None, dtype: torch.dtype) -> None:
    for temperature in (1.0, 0.7):
        case = make_case(generator, 3, 1237, dtype=dtype, temperature=temperature)
        check_partials(kernels, case, divergence, described(generator, dtype, temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [0.5, 0.1])
def test_mixture_sums(kernels: ModuleType, generator: torch.Generator, weight: float, dtype: torch.dtype) -> None:
    for temperature in (1.0, 0.7):
        case = make_case(generator, 3, 1237, dtype=dtype, temperature=temperature)
        for others in (False, True):
            norm = normalisers(case, generator, others=others)
            check_mixture_sums(kernels, case, norm, weight, described(generator, dtype, weight, temperature, others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_backward(kernels: ModuleType, generator: torch.Generator, dtype: torch.dtype, inplace: bool) -> None:
    for names in COEFFICIENTS:
        for weight in (None, 0.3) if "cross" in names else (None,):
            case = make_case(generator, 3, 1237, dtype=dtype, temperature=0.7)
            norm = normalisers(case, generator)
            check_backward(
                kernels,
                case,
                norm,
                names,
                generator,
                mixture_weight=weight,
                inplace=inplace,
                message=described(generator, dtype),
            )


def test_dtypes_may_differ(kernels: ModuleType, generator: torch.Generator) -> None:
    for dtype, teacher_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        case = make_case(generator, 2, 300, dtype=dtype, teacher_dtype=teacher_dtype)
        norm = normalisers(case, generator)
        message = described(generator, dtype, teacher_dtype)
        check_partials(kernels, case, "forward_kl", message)
        check_mixture_sums(kernels, case, norm, 0.4, message)
        check_backward(kernels, case, norm, COEFFICIENTS[-1], generator, message=message)


@pytest.mark.usefixtures("small_tiles")
@given(
    tokens=st.integers(0, 3),
    columns=st.integers(0, 300),
    padding=st.integers(0, 70),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    divergence=st.sampled_from([None, *DIVERGENCES]),
    names=st.sampled_from(COEFFICIENTS),
    temperature=st.floats(0.3, 3.0),
    weight=st.floats(0.05, 0.95),
    scale=st.floats(0.01, 30.0),
    level=st.sampled_from([0.0, 100.0, -1000.0]),
    masked=st.floats(0.0, 1.0),
    first_column=st.integers(0, 2000),
    inplace=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_property_matches_float64(
    kernels,
    tokens,
    columns,
    padding,
    gap,
    dtype,
    divergence,
    names,
    temperature,
    weight,
    scale,
    level,
    masked,
    first_column,
    inplace,
    seed,
) -> None:
    """Any shape, several tiles and programs a row, with columns that the student, the teacher or both rule out."""
    generator = torch.Generator().manual_seed(seed)
    padding += columns + padding == 0
    case = make_case(
        generator,
        tokens,
        columns,
        padding=padding,
        gap=gap,
        dtype=dtype,
        scale=scale,
        level=level,
        temperature=temperature,
        first_column=first_column,
    )
    for side in (case.logits, case.teacher):
        side[:, :columns][torch.rand(tokens, columns, generator=generator) < masked - 0.3] = -math.inf
    check_partials(kernels, case, divergence)
    norm = normalisers(case, generator)
    check_mixture_sums(kernels, case, norm, weight)
    names = tuple(name for name in names if name != "cross" or not (case.teacher[:, :columns] == -math.inf).any())
    check_backward(
        kernels, case, norm, names, generator, mixture_weight=weight if divergence == "jsd" else None, inplace=inplace
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_split_rows(
    kernels: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, divergence: str | None
) -> None:
    """One program per row and one per tile, the largest logits in the first, a middle or the last tile, or several
    programs empty."""
    case = make_case(generator, 5, 250, temperature=0.7)
    case.logits[0, 3], case.logits[1, 120], case.logits[2, 249] = 50.0, 40.0, 30.0
    case.teacher[0, 200], case.teacher[1, 7], case.teacher[2, 130] = 50.0, 40.0, 30.0
    case.logits[3, 40:230], case.teacher[3, 40:] = -math.inf, -math.inf
    case.logits[4, :250] = -math.inf
    message = described(generator)
    norm = normalisers(case, generator)
    split = check_partials(kernels, case, divergence, message), check_mixture_sums(kernels, case, norm, 0.3, message)
    monkeypatch.setattr(kernels, "_FEW_ROWS", 0)
    whole = check_partials(kernels, case, divergence, message), check_mixture_sums(kernels, case, norm, 0.3, message)
    # Different orders of summation: were they bit-equal, nothing would have been split.
    assert any(not torch.equal(a, b) for a, b in zip(split, whole, strict=True)), message


def test_number_of_programs(kernels: ModuleType) -> None:
    """Few rows share their columns among programs without gap or overlap, whole tiles each; many rows do not."""
    for tokens in (1, 7, 64, 511, 512, 70_000):
        for columns in (0, 1, 2048, 2049, 18_992, 151_936, 262_144):
            splits, chunk = kernels._splits(tokens, columns, 2048)
            assert chunk % 2048 == 0 and chunk * splits >= columns > chunk * (splits - 1) - (columns == 0), (
                tokens,
                columns,
            )
            assert splits == 1 or tokens < 512 and chunk >= 4 * 2048 and (splits - 1) * tokens <= 1024, (
                tokens,
                columns,
            )
    assert kernels._splits(64, 151_936, 2048)[0] > 8 and kernels._splits(512, 151_936, 2048)[0] == 1


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@pytest.mark.parametrize("scale", [0.001, 3.0])
def test_wide_rows_keep_precision(
    kernels: ModuleType, generator: torch.Generator, divergence: str | None, scale: float
) -> None:
    """Sums of many terms of one size: added one by one in float32 they would lose three digits."""
    case = make_case(generator, 1, 50_001, scale=scale)
    check_partials(kernels, case, divergence, described(generator))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rising_maxima(kernels: ModuleType, generator: torch.Generator, divergence: str) -> None:
    """Every tile moves the maxima of what was summed before, the teacher's by another step or in the other
    direction."""
    for up, teacher_up in ((0.1, 0.04), (0.3, -0.1), (-0.1, 0.2), (5.0, 300.0)):
        case = make_case(generator, 2, 230, temperature=0.8)
        slope = torch.arange(230)
        case.logits[:, :230] += up * slope
        case.teacher[:, :230] += teacher_up * slope
        check_partials(kernels, case, divergence, described(generator, up, teacher_up))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_huge_logits(kernels: ModuleType, generator: torch.Generator, divergence: str, size: float) -> None:
    """All far from zero, and far from each other."""
    for scale, level in ((1.0, size), (1.0, -size), (size, 0.0)):
        case = make_case(generator, 2, 150, scale=scale, level=level)
        message = described(generator, scale, level)
        check_partials(kernels, case, divergence, message)
        norm = normalisers(case, generator)
        check_mixture_sums(kernels, case, norm, 0.3, message)
        weight = 0.3 if divergence == "jsd" else None
        for names in (("linear", "cross", "one_hot"), ("teacher_share",)):
            check_backward(kernels, case, norm, names, generator, mixture_weight=weight, message=message)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_columns(kernels: ModuleType, generator: torch.Generator, divergence: str, mask: float) -> None:
    """The same columns of both ruled out: single ones, whole tiles, all but the last column."""
    case = make_case(generator, 4, 200, temperature=0.5)
    for side in (case.logits, case.teacher):
        side[0, 1:200:7], side[1, :130], side[2, 70:200], side[3, :199] = mask, mask, mask, mask
    message = described(generator, mask)
    got = check_partials(kernels, case, divergence, message)
    assert got[3, 0] == case.logits[0, 0] and (got[CROSS] > -1e3).all(), message
    norm = normalisers(case, generator)
    check_mixture_sums(kernels, case, norm, 0.3, message)
    check_backward(
        kernels,
        case,
        norm,
        COEFFICIENTS[-1],
        generator,
        mixture_weight=0.3 if divergence == "jsd" else None,
        message=message,
    )


@pytest.mark.usefixtures("small_tiles")
def test_one_side_masked_alone(kernels: ModuleType, generator: torch.Generator) -> None:
    """Mass where the other distribution has none makes its own cross term -inf, or nearly so, and no other."""
    for divergence, weighing, other in (("reverse_kl", 0, 1), ("forward_kl", 1, 0)):
        case = make_case(generator, 5, 200)
        sides = case.logits, case.teacher
        sides[other][0, 150] = -math.inf
        sides[other][1, :64] = -math.inf
        sides[other][2, :200] = -math.inf
        sides[weighing][3, 20:90] = -math.inf
        sides[other][4, 150], sides[weighing][4, 150] = -math.inf, -200.0
        cross = check_partials(kernels, case, divergence, described(generator))[CROSS]
        assert (cross < -1e30).tolist() == [True, True, True, False, False], described(generator)
        assert (cross[3:] > -100.0).all() and not cross.isnan().any(), described(generator)
        norm = normalisers(case, generator)
        check_mixture_sums(kernels, case, norm, 0.3, described(generator))
        check_backward(
            kernels, case, norm, ("linear", "cross"), generator, mixture_weight=0.3, message=described(generator)
        )
        check_backward(kernels, case, norm, ("teacher_share", "one_hot"), generator, message=described(generator))


def test_no_gradient_where_the_coefficient_is_zero(kernels: ModuleType, generator: torch.Generator) -> None:
    """The reverse KL of a token whose teacher rules out what the student holds likely is switched off by its
    coefficient."""
    case = make_case(generator, 2, 90)
    case.teacher[:, 10:20] = -math.inf
    norm = normalisers(case, generator)
    zero = torch.zeros(2)
    out = torch.empty_like(case.logits)
    kernels.backward(
        case.logits,
        case.teacher,
        out,
        case.targets,
        constant=zero,
        linear=zero,
        cross=zero,
        **norm._asdict(),
        **case.place,
    )
    assert (out == 0).all(), described(generator)


@pytest.mark.parametrize("few_rows", [512, 0], ids=["split", "whole"])
@pytest.mark.usefixtures("small_tiles")
def test_rows_without_mass(
    kernels: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, few_rows: int
) -> None:
    """A row that is -inf throughout, in the student, the teacher or both, among others that are not."""
    monkeypatch.setattr(kernels, "_FEW_ROWS", few_rows)
    case = make_case(generator, 4, 200)
    case.logits[0, :200], case.teacher[1, :200], case.logits[2, :200], case.teacher[2, :200] = (-math.inf,) * 4
    for divergence in DIVERGENCES:
        got = check_partials(kernels, case, divergence, described(generator))
        assert got[[MAX, Z, MEAN], 0].tolist() == [-math.inf, 0.0, 0.0] and got[TEACHER_MAX, 1] == -math.inf
    norm = normalisers(case, generator)
    check_mixture_sums(kernels, case, norm, 0.3, described(generator))
    check_backward(kernels, case, norm, COEFFICIENTS[-1], generator, mixture_weight=0.3, message=described(generator))
    check_backward(kernels, case, norm, ("linear", "teacher_share", "one_hot"), generator, message=described(generator))


@pytest.mark.parametrize("few_rows", [512, 0], ids=["split", "whole"])
@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_row(
    kernels: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, few_rows: int
) -> None:
    """The first value of a lane, one among others, a whole row; the student's statistics do not learn of the teacher's
    NaN."""
    monkeypatch.setattr(kernels, "_FEW_ROWS", few_rows)
    case = make_case(generator, 5, 200)
    case.logits[0, 0], case.logits[1, 133], case.logits[2, :200], case.teacher[3, 70] = (math.nan,) * 4
    for divergence in (None, "jsd"):
        check_partials(kernels, case, divergence, described(generator))
    for divergence in ("reverse_kl", "forward_kl"):
        got = kernels.local_partials(case.logits, case.teacher, case.targets, divergence=divergence, **case.place)
        assert got[[MAX, Z, MEAN]].isnan().tolist() == [[True, True, True, False, False]] * 3, described(generator)
        assert got[[TEACHER_MAX, TEACHER_MAX + 1]].isnan().tolist() == [[False, False, False, True, False]] * 2, (
            described(generator)
        )
        want, bound = reference_partials(case, divergence)
        assert ((got[:, 4] - want[:, 4]).abs() <= bound[:, 4]).all(), described(generator)
    norm = normalisers(case, generator)
    sums = kernels.mixture_sums(case.logits, case.teacher, *norm, columns=200, inverse_temperature=1.0, weight=0.3)
    out = torch.empty_like(case.logits)
    kernels.backward(
        case.logits,
        case.teacher,
        out,
        case.targets,
        constant=norm.p_log_z,
        cross=norm.p_log_z,
        **norm._asdict(),
        **case.place,
    )
    assert sums.isnan().tolist() == [[True, True, True, True, False]] * 2, described(generator)
    assert out.isnan().any(1).tolist() == [True, True, True, True, False], described(generator)
    assert (out[:, 200:] == 0).all(), described(generator)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("columns", [0, 1])
def test_smallest_shapes(kernels: ModuleType, generator: torch.Generator, tokens: int, columns: int) -> None:
    """No tokens, one token, a shard that is all padding, one column."""
    for padding in (1, 40):
        for divergence in (None, *DIVERGENCES):
            case = make_case(generator, tokens, columns, padding=padding)
            got = check_partials(kernels, case, divergence, described(generator))
            if columns == 0:
                assert (got[MAX] == -math.inf).all() and (got[[Z, MEAN, TARGET]] == 0).all()
        norm = normalisers(case, generator)
        check_mixture_sums(kernels, case, norm, 0.3, described(generator))
        for inplace in (False, True):
            check_backward(
                kernels, case, norm, COEFFICIENTS[-1], generator, inplace=inplace, message=described(generator)
            )


def test_mixture_of_nearly_equal_distributions(kernels: ModuleType, generator: torch.Generator) -> None:
    case = make_case(generator, 3, 400, scale=1.0)
    case.teacher[:, :400] = case.logits[:, :400] + 0.02 * torch.randn(3, 400, generator=generator)
    norm = normalisers(case, generator, others=False)
    sums = check_mixture_sums(kernels, case, norm, 0.3, described(generator)).double()
    log_p, log_q = (side[:, :400].double().log_softmax(-1) for side in (case.logits, case.teacher))
    log_m = torch.logaddexp(log_p + math.log(0.3), log_q + math.log(0.7))
    value = 0.3 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.7 * (log_q.exp() * (log_q - log_m)).sum(-1)
    assert (0.3 * sums[0] + 0.7 * sums[1] - value).abs().max() < 1e-7 < value.min() / 100, described(generator)

    same = case._replace(teacher=case.logits.clone())
    norm = norm._replace(q_max=norm.p_max, q_log_z=norm.p_log_z)
    assert (check_mixture_sums(kernels, same, norm, 0.3, described(generator)) == 0).all()
    # No gradient either: linear log p and cross log m cancel exactly.
    ones = torch.ones(3)
    for weight in (0.3, None):
        out = torch.empty_like(case.logits)
        kernels.backward(
            same.logits,
            same.teacher,
            out,
            case.targets,
            constant=torch.zeros(3),
            linear=ones,
            cross=ones,
            mixture_weight=weight,
            **norm._asdict(),
            **case.place,
        )
        assert (out == 0).all(), described(generator, weight)


def test_shards_combine_to_the_whole(kernels: ModuleType, generator: torch.Generator) -> None:
    """Two shards' sums, finished about common maxima, are those of one wide shard; targets are found by exactly one."""
    case = make_case(generator, 3, 120, padding=0, first_column=0)._replace(targets=torch.tensor([59, 60, 119]))
    halves = [
        case._replace(
            logits=case.logits[:, i : i + 60], teacher=case.teacher[:, i : i + 60], columns=60, first_column=i
        )
        for i in (0, 60)
    ]
    whole, *parts = (check_partials(kernels, shard, "reverse_kl", described(generator)) for shard in (case, *halves))
    assert torch.equal(parts[0][TARGET] + parts[1][TARGET], whole[TARGET]) and parts[0][TARGET].count_nonzero() == 1
    z = sum(part[Z] * (part[MAX] - whole[MAX]).exp() for part in parts)
    torch.testing.assert_close(z, whole[Z], rtol=1e-6, atol=0.0)
    norm = normalisers(case, generator, others=False)
    sums = [check_mixture_sums(kernels, shard, norm, 0.3, described(generator)) for shard in (case, *halves)]
    torch.testing.assert_close(sums[1] + sums[2], sums[0], rtol=1e-5, atol=1e-6)


def test_coefficients_need_not_be_contiguous(kernels: ModuleType, generator: torch.Generator) -> None:
    case = make_case(generator, 3, 50)
    norm = normalisers(case, generator)
    case = case._replace(targets=torch.stack([case.targets] * 2, 1)[:, 0])
    norm = type(norm)(*(torch.stack([row, row + 1], 1)[:, 0] for row in norm))
    check_partials(kernels, case, "jsd", described(generator))
    check_mixture_sums(kernels, case, norm, 0.3, described(generator))
    check_backward(kernels, case, norm, COEFFICIENTS[-1], generator, message=described(generator))
    outs = [torch.empty_like(case.logits) for _ in range(2)]
    for out, constant in zip(outs, (torch.full((3,), 2.0), torch.tensor(2.0).expand(3)), strict=True):
        kernels.backward(
            case.logits,
            None,
            out,
            case.targets,
            p_max=norm.p_max,
            p_log_z=norm.p_log_z,
            constant=constant,
            **case.place,
        )
    assert torch.equal(*outs), described(generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_public_functions_agree_with_the_pytorch_kernels(
    kernels: ModuleType,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    divergence: str | None,
    dtype: torch.dtype,
) -> None:
    """Statistics and gradients of both functions, through the same collective-free path that a GPU takes."""
    monkeypatch.setitem(sys.modules, "dasd_megatron.losses.triton_kernels", kernels)
    monkeypatch.setattr(dasd_megatron.losses, "triton_kernels", kernels, raising=False)
    logits, teacher = (torch.randn(5, 333, generator=generator).mul(3).to(dtype) for _ in range(2))
    hidden, head, teacher_hidden = (torch.randn(rows, 8, generator=generator).to(dtype) for rows in (5, 333, 5))
    targets = torch.randint(0, 300, (5,), generator=generator)
    weights = torch.randn(3, 5, generator=generator)
    common = dict(vocab_size=300, temperature=0.7, divergence=divergence or "reverse_kl", jsd_weight=0.3)

    def run(implementation: str) -> list[Tensor]:
        results = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            stats = vocab_parallel_token_stats(
                leaf * 1, targets, teacher_logits=None if divergence is None else teacher, inplace_backward=inplace,
                implementation=implementation, **common,
            )  # fmt: skip
            weighted_sum(stats, weights).backward()
            results += [*(tensor for tensor in stats if tensor is not None), leaf.grad]
        # The first three of five tokens have logits that are kept, or none has.
        for keep_bytes in (0, 3 * 300 * dtype.itemsize):
            leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
            stats = linear_token_stats(
                *leaves,
                targets,
                teacher_hidden=None if divergence is None else teacher_hidden,
                chunk_size=3,
                vocab_chunk_size=100,
                keep_bytes=keep_bytes,
                implementation=implementation,
                **common,
            )
            weighted_sum(stats, weights).backward()
            results += [*(tensor for tensor in stats if tensor is not None), *(leaf.grad for leaf in leaves)]
        return results

    for got, want in zip(run("triton"), run("torch"), strict=True):
        # Relative to the largest entry: a gradient's entries are sums of rounded numbers of either sign.
        bound = (2e-2 if want.dtype == torch.bfloat16 else 2e-5) * want.abs().max()
        assert (got - want).abs().max() <= bound, described(generator, got, want)


def test_autograd_notices_that_the_logits_were_overwritten(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dasd_megatron.losses.triton_kernels", kernels)
    monkeypatch.setattr(dasd_megatron.losses, "triton_kernels", kernels, raising=False)
    logits = torch.randn(2, 8, requires_grad=True) * 1
    other = logits.square().sum()
    stats = vocab_parallel_token_stats(logits, torch.tensor([1, 2]), inplace_backward=True, implementation="triton")
    stats.log_prob.sum().backward(retain_graph=True)
    for loss in (other, stats.log_prob.sum()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_the_kernels_cannot_take_is_refused_or_left_to_pytorch() -> None:
    targets = torch.zeros(3, dtype=torch.int64)
    for logits in (torch.randn(3, 8, dtype=torch.float64), torch.randn(8, 3).t()):
        with pytest.raises(ValueError, match="implementation is 'triton'"):
            vocab_parallel_token_stats(logits, targets, implementation="triton")
        vocab_parallel_token_stats(logits, targets)
