"""The Triton kernels on one GPU at the width of a real vocabulary, against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dasd_megatron.losses import DIVERGENCES, linear_token_stats, top_k_divergence
from dasd_megatron.losses.linear_stats import _matmul
from tests.support.kernel_reference import (
    COEFFICIENTS,
    CROSS,
    MAX,
    Case,
    check_backward,
    check_mixture_sums,
    check_partials,
    make_case,
    normalisers,
)
from tests.support.token_stats_reference import clipped_sum, dense, weighted_sum

pytest.importorskip("triton", reason="triton is not installed")

from dasd_megatron.losses import triton_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

VOCABULARY, WIDTH = 151_669, 151_936
# Columns of the vocabulary, padding and elements between the rows: every access by whole vectors, rows on odd
# addresses.
LAYOUTS = {
    "aligned": (151_936, 0, 0),
    "padded": (VOCABULARY, WIDTH - VOCABULARY, 0),
    "odd rows": (VOCABULARY, WIDTH - VOCABULARY, 3),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(torch.seed() % 2**31)


def wide_case(
    generator: torch.Generator, tokens: int, layout: str = "padded", dtype: torch.dtype = torch.bfloat16, **options
) -> Case:
    columns, padding, gap = LAYOUTS[layout]
    return make_case(generator, tokens, columns, padding=padding, gap=gap, dtype=dtype, **options)


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_statistics_and_gradients_do_not_wait_for_the_device(
    generator: torch.Generator, divergence: str | None
) -> None:
    hidden, head = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_()
        for shape in ((300, 64), (9000, 64))
    )
    targets = torch.randint(0, 9000, (300,), device="cuda", generator=generator)
    teacher = {} if divergence is None else {"teacher_hidden": hidden.detach() + 1, "divergence": divergence}

    def call() -> None:
        stats = linear_token_stats(hidden, head, targets, check_targets=False, **teacher)
        weighted_sum(stats, torch.ones(3, 300, device="cuda")).backward()

    # The first call compiles, and looks once for what torch offers.
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_added_to_a_wider_sum(generator: torch.Generator, dtype: torch.dtype) -> None:
    left, right = (torch.randn(64, 64, device="cuda", generator=generator).to(dtype) for _ in range(2))
    total = torch.randn(64, 64, device="cuda", generator=generator)
    expected = total.double() + left.double() @ right.double()
    assert _matmul(left, right, total, add=True) is total
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_partials(generator: torch.Generator, divergence: str | None, layout: str, dtype: torch.dtype) -> None:
    """A few rows that several programs share, and more rows than that."""
    for tokens in (1, 40, 513):
        case = wide_case(generator, tokens, layout, dtype, temperature=0.7)
        check_partials(kernels, case, divergence, f"seed {generator.initial_seed()} {tokens}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixture_sums(generator: torch.Generator, layout: str, dtype: torch.dtype) -> None:
    for tokens in (1, 40, 513):
        case = wide_case(generator, tokens, layout, dtype, temperature=0.7)
        check_mixture_sums(
            kernels, case, normalisers(case, generator), 0.3, f"seed {generator.initial_seed()} {tokens}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_backward(generator: torch.Generator, inplace: bool, layout: str, dtype: torch.dtype) -> None:
    for names in COEFFICIENTS:
        for weight in (None, 0.3) if "cross" in names else (None,):
            case = wide_case(generator, 24, layout, dtype, temperature=0.7)
            norm = normalisers(case, generator)
            message = f"seed {generator.initial_seed()}"
            check_backward(
                kernels, case, norm, names, generator, mixture_weight=weight, inplace=inplace, message=message
            )


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 7, 8, 9, 100, 2047, 2048, 2049, 8193, 18_992])
def test_sizes(generator: torch.Generator, columns: int, tokens: int) -> None:
    """Nothing, the sizes of tiles and one more or less, and the arguments equal to 1 that Triton compiles in."""
    for dtype, padding, gap in (
        (torch.bfloat16, 8, 0),
        (torch.float32, 1, 0),
        (torch.bfloat16, 0 if columns else 1, 0),
    ):
        case = make_case(generator, tokens, columns, padding=padding, gap=gap, dtype=dtype)
        message = f"seed {generator.initial_seed()} {dtype} {padding}"
        for divergence in (None, *DIVERGENCES):
            check_partials(kernels, case, divergence, message)
        norm = normalisers(case, generator)
        check_mixture_sums(kernels, case, norm, 0.3, message)
        check_backward(kernels, case, norm, COEFFICIENTS[-1], generator, message=message)
        check_backward(
            kernels, case, norm, COEFFICIENTS[-1], generator, mixture_weight=0.3, inplace=True, message=message
        )


def test_dtypes_may_differ(generator: torch.Generator) -> None:
    for dtype, teacher_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        case = wide_case(generator, 9, dtype=dtype, teacher_dtype=teacher_dtype)
        norm = normalisers(case, generator)
        message = f"seed {generator.initial_seed()} {dtype}"
        check_partials(kernels, case, "forward_kl", message)
        check_mixture_sums(kernels, case, norm, 0.4, message)
        check_backward(kernels, case, norm, COEFFICIENTS[-1], generator, message=message)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_nan_and_huge_logits(generator: torch.Generator, divergence: str) -> None:
    """Rows with columns or everything at -inf, with a NaN, far from zero and far apart; some of them split among
    programs."""
    for tokens in (9, 600):
        case = wide_case(generator, tokens, dtype=torch.float32)
        logits, teacher = case.logits, case.teacher
        logits[0, :100_000], teacher[0, :100_000] = -math.inf, -math.inf
        logits[1, :VOCABULARY], teacher[2, :VOCABULARY] = -math.inf, -math.inf
        logits[3, 140_000], teacher[4, 12] = math.nan, math.nan
        logits[5] += 1e4
        teacher[6] *= 1e4
        logits[7] *= 1e4
        weighing, other = (teacher, logits) if divergence == "forward_kl" else (logits, teacher)
        other[8, 77_777], weighing[8, 77_777] = -math.inf, 5.0
        message = f"seed {generator.initial_seed()} {tokens}"
        finite = torch.ones(tokens, dtype=torch.bool, device="cuda")
        finite[3:5] = False
        whole = case._replace(logits=logits[finite], teacher=teacher[finite], targets=case.targets[finite])
        got = check_partials(kernels, whole, divergence, message)
        assert divergence == "jsd" or got[CROSS, 6] < -1e30, message
        norm = normalisers(whole, generator)
        check_mixture_sums(kernels, whole, norm, 0.3, message)
        names, weight = (
            (("linear", "cross"), 0.3) if divergence == "jsd" else (("linear", "teacher_share", "one_hot"), None)
        )
        check_backward(kernels, whole, norm, names, generator, mixture_weight=weight, message=message)
        every = kernels.local_partials(logits, teacher, case.targets, divergence=divergence, **case.place)
        assert every[MAX].isnan().nonzero().tolist() == [[3]], message
        assert every[:CROSS].isnan().any(0).nonzero().tolist() == [[3], [4]], message


def test_a_distribution_against_itself(generator: torch.Generator) -> None:
    case = wide_case(generator, 30)
    case = case._replace(teacher=case.logits.clone())
    norm = normalisers(case, generator, others=False)
    norm = norm._replace(q_max=norm.p_max, q_log_z=norm.p_log_z)
    assert (check_mixture_sums(kernels, case, norm, 0.3) == 0).all(), f"seed {generator.initial_seed()}"
    ones = torch.ones(30, device="cuda")
    for weight in (None, 0.3):
        out = torch.empty_like(case.logits)
        kernels.backward(
            case.logits, case.teacher, out, case.targets, constant=ones - 1, linear=ones, cross=ones,
            mixture_weight=weight,
            **norm._asdict(), **case.place,
        )  # fmt: skip
        assert (out == 0).all(), f"seed {generator.initial_seed()} {weight}"


def test_more_than_2_to_the_31_elements(generator: torch.Generator) -> None:
    """The last rows, beyond what 32-bit offsets reach, come out as they do alone."""
    last = wide_case(generator, 12)
    rows = 2**31 // WIDTH
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")

    def below_zeros(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])

    case = last._replace(
        logits=below_zeros(last.logits), teacher=below_zeros(last.teacher), targets=below_zeros(last.targets)
    )
    alone = check_partials(kernels, last, "reverse_kl", f"seed {generator.initial_seed()}")
    among = kernels.local_partials(case.logits, case.teacher, case.targets, divergence="reverse_kl", **case.place)
    torch.testing.assert_close(among[:, rows:], alone, rtol=1e-5, atol=0.0)

    norm = normalisers(last, generator)
    alone = check_mixture_sums(kernels, last, norm, 0.3, f"seed {generator.initial_seed()}")
    options = {"columns": case.columns, "inverse_temperature": 1.0, "weight": 0.3}
    among = kernels.mixture_sums(case.logits, case.teacher, *map(below_zeros, norm), **options)
    torch.testing.assert_close(among[:, rows:], alone, rtol=1e-5, atol=1e-6)

    coefficients = dict(zip(("constant", "linear", "cross", "one_hot"), torch.randn(4, 12, device="cuda"), strict=True))
    options = coefficients | norm._asdict()
    alone = torch.empty_like(last.logits)
    kernels.backward(last.logits, last.teacher, alone, last.targets, **options, **last.place)
    options = {name: below_zeros(value) for name, value in options.items()}
    kernels.backward(case.logits, case.teacher, case.logits, case.targets, **options, **case.place)
    assert torch.equal(case.logits[rows:], alone) and not case.logits[:rows].any()


@pytest.mark.parametrize("kept_tokens", [0, 128, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_linear_token_stats(
    generator: torch.Generator, divergence: str | None, dtype: torch.dtype, kept_tokens: int
) -> None:
    """Several blocks of tokens and columns, with padding, against the definitions in float64; and no tokens at all."""
    shapes = ((300, 64), (20_100, 64), (300, 96), (20_100, 96))
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype) / 4 for shape in shapes
    )
    extra = {} if divergence is None else dict(teacher_weight=teacher_head, divergence=divergence)
    for tokens in (300, 0):
        targets = torch.randint(0, 20_000, (tokens,), generator=generator, device="cuda")
        weights = torch.randn(3, tokens, generator=generator, device="cuda")
        own = [hidden[:tokens].clone().requires_grad_(), head.clone().requires_grad_()]
        if divergence is not None:
            extra["teacher_hidden"] = teacher_hidden[:tokens]
        stats = linear_token_stats(
            *own,
            targets,
            vocab_size=20_000,
            temperature=0.7,
            chunk_size=128,
            vocab_chunk_size=4096,
            keep_bytes=kept_tokens * 20_000 * dtype.itemsize,
            jsd_weight=0.3,
            **extra,
        )
        weighted_sum(stats, weights).backward()
        exact = [tensor.detach().double().requires_grad_() for tensor in own]
        teacher_logits = None if divergence is None else teacher_hidden[:tokens].double() @ teacher_head.double().t()
        reference = dense(
            exact[0] @ exact[1].t(), targets, teacher_logits, divergence or "reverse_kl", 0.7, 20_000, 0.3
        )
        weighted_sum(reference, weights.double()).backward()
        for got, want in zip(stats, reference, strict=True):
            if want is not None:
                torch.testing.assert_close(got.double(), want.detach(), rtol=1e-4, atol=1e-4)
        for got, want in zip(own, exact, strict=True):
            bound = (2e-2 if dtype == torch.bfloat16 else 1e-3) * want.grad.abs().amax() if tokens else 0.0
            assert not tokens or (got.grad.double() - want.grad).abs().max() <= bound, (
                f"seed {generator.initial_seed()}"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_clipped_and_most_probable_entries(generator: torch.Generator, divergence: str, dtype: torch.dtype) -> None:
    """PyTorch's kernels beside Triton's: entries that are clipped, and the teacher's most probable ones."""
    shapes = ((300, 64), (20_100, 64), (300, 96), (20_100, 96))
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype) / 4 for shape in shapes
    )
    targets = torch.randint(0, 20_000, (300,), generator=generator, device="cuda")
    common = dict(vocab_size=20_000, temperature=0.7, chunk_size=128, vocab_chunk_size=4096)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    log_p, log_q = (
        (states.double() @ weight.double().t() / 0.7)[:, :20_000].log_softmax(-1)
        for states, weight in (exact, (teacher_hidden, teacher_head))
    )
    top = linear_token_stats(teacher_hidden, teacher_head, targets, top_k=50, **common).top
    for entries in (False, True):
        own = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        if entries:
            student = linear_token_stats(*own, targets, entry_ids=top.ids, **common).top.log_prob
            value = top_k_divergence(
                student, top.log_prob, divergence=divergence, tail=False, jsd_weight=0.3, entry_clip=0.05
            )
            reference = (part.gather(1, top.ids).log_softmax(-1) for part in (log_p, log_q))
        else:
            value = linear_token_stats(
                *own, targets, teacher_hidden=teacher_hidden, teacher_weight=teacher_head, divergence=divergence,
                jsd_weight=0.3, entry_clip=1e-4, **common,
            ).divergence  # fmt: skip
            reference = (log_p, log_q)
        want = clipped_sum(*reference, divergence, weight=0.3, clip=0.05 if entries else 1e-4)
        message = f"seed {generator.initial_seed()} entries {entries}"
        torch.testing.assert_close(value.double(), want.detach(), rtol=1e-4, atol=1e-5, msg=message)
        value.sum().backward()
        gradients = torch.autograd.grad(want.sum(), exact, retain_graph=True)
        for got, expected in zip(own, gradients, strict=True):
            bound = (2e-2 if dtype == torch.bfloat16 else 1e-3) * expected.abs().amax()
            assert (got.grad.double() - expected).abs().max() <= bound, message
