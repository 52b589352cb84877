"""Token statistics on one process against dense float64 references, gradcheck, and properties over random shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.losses import DIVERGENCES, TokenStats, vocab_parallel_token_stats
from tests.support.token_stats_reference import dense, weighted_sum


def assert_matches_dense(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    *,
    rtol: float,
    atol: float,
    message: str = "",
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    jsd_weight: float = 0.5,
    **extra: object,
) -> None:
    """Statistics and gradient against the float64 reference; ``extra`` goes to the function under test."""
    vocab_size = vocab_size or logits.shape[1]
    before = logits.clone()
    own = logits.detach().clone().requires_grad_()
    stats = vocab_parallel_token_stats(
        own * 1 if extra.get("inplace_backward") else own,
        targets,
        teacher_logits=teacher,
        divergence=divergence,
        temperature=temperature,
        vocab_size=vocab_size,
        jsd_weight=jsd_weight,
        **extra,
    )
    weights = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(0))
    weighted_sum(stats, weights).backward()
    reference_logits = logits.double().requires_grad_()
    reference = dense(reference_logits, targets, teacher, divergence, temperature, vocab_size, jsd_weight)
    weighted_sum(reference, weights.double()).backward()
    for name, got, want in zip(TokenStats._fields, stats, reference, strict=True):
        if want is None:
            assert got is None
            continue
        assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            got.double(), want.detach(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{message} {name}: {m}"
        )
    # Element by element for the rounding of the output's dtype; beyond that relative to the token's largest entry, and
    # to the size of the divergence, which the gradient of the reverse KL contains as one of two terms that nearly
    # cancel.
    want = reference_logits.grad
    bound = want.abs() * {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(logits.dtype, rtol) + rtol * want.abs().amax(
        -1, keepdim=True
    )
    if reference.divergence is not None:
        bound = bound + 3e-7 * reference.divergence.detach()[:, None]
    error = (own.grad.double() - want).abs()
    assert (error <= bound + 1e-7).all(), (
        f"{message} gradient: off by {error.max():.2e}, {(error / bound).max():.2f} of the bound"
    )
    assert own.grad.dtype == logits.dtype
    assert torch.equal(own.detach(), before), f"{message}: the caller's logits changed"


@pytest.fixture
def seed() -> int:
    value = torch.seed() % 2**31
    torch.manual_seed(value)
    return value


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_float32_within_1e_5_of_float64(seed: int, divergence: str, temperature: float) -> None:
    logits, teacher = torch.randn(2, 17, 4099) * 3
    targets = torch.randint(0, 4000, (17,))
    assert_matches_dense(
        logits,
        targets,
        teacher,
        divergence=divergence,
        temperature=temperature,
        vocab_size=4000,
        jsd_weight=0.3,
        rtol=1e-5,
        atol=1e-6,
        message=f"seed {seed}",
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_vocabulary_keeps_precision(seed: int, divergence: str) -> None:
    """PyTorch's softmax alone is off by 1e-5 at this width."""
    logits, teacher = torch.randn(2, 3, 151_936) * 3
    targets = torch.randint(0, 151_936, (3,))
    assert_matches_dense(
        logits, targets, teacher, divergence=divergence, temperature=0.7, rtol=2e-6, atol=1e-6, message=f"seed {seed}"
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(seed: int, divergence: str, dtype: torch.dtype) -> None:
    logits, teacher = (torch.randn(2, 9, 1000) * 3).to(dtype)
    logits[0, 5] += 12  # a probability near 1, whose gradient p - 1 must not be rounded before the subtraction
    targets = torch.randint(0, 1000, (9,))
    targets[0] = 5
    assert_matches_dense(logits, targets, teacher, divergence=divergence, rtol=1e-5, atol=2e-6, message=f"seed {seed}")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_gradcheck(seed: int, divergence: str, chunk_size: int | None) -> None:
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 11, dtype=torch.float64)
    targets = torch.randint(0, 9, (4,))

    def function(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stats = vocab_parallel_token_stats(
            z,
            targets,
            teacher_logits=teacher,
            divergence=divergence,
            vocab_size=9,
            temperature=1.3,
            chunk_size=chunk_size,
            jsd_weight=0.2,
        )
        return stats.log_prob, stats.entropy, stats.divergence

    assert torch.autograd.gradcheck(function, logits), f"seed {seed}"


@given(
    data=st.data(),
    tokens=st.integers(0, 7),
    width=st.integers(1, 40),
    temperature=st.floats(0.3, 3.0),
    divergence=st.sampled_from([None, *DIVERGENCES]),
    weight=st.floats(0.05, 0.95),
    scale=st.floats(0.01, 30.0),
    chunk_size=st.one_of(st.none(), st.integers(1, 9)),
    inplace=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=120, deadline=None)
def test_property_matches_dense(
    data, tokens, width, temperature, divergence, weight, scale, chunk_size, inplace, seed
) -> None:
    vocab_size = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) * scale
    # Padding holds whatever the matrix product left there, and must never be read.
    logits[:, vocab_size:], teacher[:, vocab_size:] = math.nan, math.inf
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    reference_logits = logits.clone()
    reference_logits[:, vocab_size:] = 0
    own = logits.clone().requires_grad_()
    stats = vocab_parallel_token_stats(
        own * 1,
        targets,
        teacher_logits=None if divergence is None else teacher,
        divergence=divergence or "reverse_kl",
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_size=chunk_size,
        inplace_backward=inplace,
        jsd_weight=weight,
    )
    weights = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    weighted_sum(stats, weights).backward()
    reference_logits.requires_grad_()
    reference = dense(
        reference_logits,
        targets,
        None if divergence is None else teacher,
        divergence or "reverse_kl",
        temperature,
        vocab_size,
        weight,
    )
    weighted_sum(reference, weights).backward()
    for got, want in zip(stats, reference, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want.detach(), rtol=1e-8, atol=1e-9)
            assert got.shape == (tokens,)
    torch.testing.assert_close(own.grad, reference_logits.grad, rtol=1e-7, atol=1e-9)
    assert (own.grad[:, vocab_size:] == 0).all()
    assert (stats.entropy >= 0).all() and (stats.entropy <= math.log(vocab_size) + 1e-9).all()
    if divergence is not None:
        assert (stats.divergence >= 0).all()


def test_each_output_alone_has_its_own_gradient(seed: int) -> None:
    logits, teacher = torch.randn(2, 5, 23, dtype=torch.float64)
    targets = torch.randint(0, 23, (5,))
    for divergence in DIVERGENCES:
        for name in ("log_prob", "entropy", "divergence"):
            own, reference_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, divergence=divergence)
            getattr(stats, name).sum().backward()
            getattr(dense(reference_logits, targets, teacher, divergence, 1.0, 23, 0.5), name).sum().backward()
            torch.testing.assert_close(
                own.grad, reference_logits.grad, msg=lambda m, n=name, d=divergence: f"seed {seed} {d} {n}: {m}"
            )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_columns(seed: int, divergence: str) -> None:
    """The same columns at -inf, or at the most negative finite number, in student and teacher; whole groups of columns
    too."""
    for mask in (-math.inf, torch.finfo(torch.float32).min):
        logits, teacher = torch.randn(2, 6, 50) * 2
        logits[:, 10:30], teacher[:, 10:30] = mask, mask
        logits[2, 31:], teacher[2, 31:] = mask, mask
        targets = torch.randint(0, 10, (6,))
        for temperature in (0.5, 1.0):
            assert_matches_dense(
                logits,
                targets,
                teacher,
                divergence=divergence,
                temperature=temperature,
                rtol=1e-5,
                atol=1e-6,
                message=f"seed {seed} {mask}",
            )


def test_student_masked_alone(seed: int) -> None:
    """A token that only the student rules out: no part in the reverse KL, an infinite forward KL, a finite JSD."""
    logits, teacher = torch.randn(2, 4, 20)
    logits[:, 3] = -math.inf
    targets = torch.randint(4, 20, (4,))
    for divergence in ("reverse_kl", "jsd"):
        assert_matches_dense(
            logits, targets, teacher, divergence=divergence, rtol=1e-5, atol=1e-6, message=f"seed {seed}"
        )
    own = logits.clone().requires_grad_()
    stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, divergence="forward_kl")
    assert (stats.divergence == math.inf).all()
    stats.divergence.sum().backward()
    torch.testing.assert_close(own.grad, logits.softmax(-1) - teacher.softmax(-1), rtol=1e-5, atol=1e-6)


def test_teacher_masked_alone(seed: int) -> None:
    """A token that only the teacher rules out: an infinite reverse KL without gradient for that token, and nothing for
    its neighbours."""
    logits, teacher = torch.randn(2, 4, 20)
    teacher[1, 3] = -math.inf
    targets = torch.tensor([3, 3, 3, 3])
    for divergence in ("forward_kl", "jsd"):
        assert_matches_dense(
            logits, targets, teacher, divergence=divergence, rtol=1e-5, atol=1e-6, message=f"seed {seed}"
        )
    own, reference_logits = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher)
    assert stats.divergence[1] == math.inf and stats.teacher_log_prob[1] == -math.inf
    (stats.divergence.clamp_max(50.0).sum() + stats.log_prob.sum()).backward()
    others = torch.tensor([0, 2, 3])
    reference = dense(reference_logits[others], targets[others], teacher[others], "reverse_kl", 1.0, 20, 0.5)
    torch.testing.assert_close(stats.divergence[others].double(), reference.divergence.detach(), rtol=1e-5, atol=1e-6)
    (reference.divergence.sum() + dense(reference_logits, targets, None, "", 1.0, 20, 0.5).log_prob.sum()).backward()
    torch.testing.assert_close(own.grad.double(), reference_logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_huge_logits(seed: int, divergence: str, size: float) -> None:
    """All logits far from zero, and a few far from each other."""
    logits, teacher = torch.randn(2, 6, 64)
    logits, teacher = (logits + size).round(decimals=2), (teacher - size).round(decimals=2)
    targets = torch.randint(0, 64, (6,))
    assert_matches_dense(logits, targets, teacher, divergence=divergence, rtol=1e-5, atol=1e-6, message=f"seed {seed}")
    logits, teacher = torch.randn(2, 6, 64) * size
    assert_matches_dense(logits, targets, teacher, divergence=divergence, rtol=1e-5, atol=1e-6, message=f"seed {seed}")


def test_divergence_of_a_distribution_from_itself_is_zero(seed: int) -> None:
    logits = torch.randn(5, 300) * 3
    targets = torch.randint(0, 300, (5,))
    for divergence in DIVERGENCES:
        own = logits.clone().requires_grad_()
        stats = vocab_parallel_token_stats(own, targets, teacher_logits=logits, divergence=divergence)
        stats.divergence.sum().backward()
        assert stats.divergence.max() < 1e-6 and own.grad.abs().max() < 1e-6, f"seed {seed} {divergence}"
        assert torch.equal(stats.log_prob, stats.teacher_log_prob)


def test_one_column_and_no_tokens() -> None:
    own = torch.randn(2, 1).requires_grad_()
    stats = vocab_parallel_token_stats(own, torch.zeros(2, dtype=torch.int64), teacher_logits=torch.randn(2, 1))
    weighted_sum(stats, torch.ones(3, 2)).backward()
    assert all(value.tolist() == pytest.approx([0.0, 0.0], abs=5e-7) for value in stats) and own.grad.abs().max() < 5e-7
    empty = torch.empty(0, 7).requires_grad_()
    for divergence in DIVERGENCES:
        stats = vocab_parallel_token_stats(
            empty, torch.empty(0, dtype=torch.int64), teacher_logits=torch.empty(0, 7), divergence=divergence
        )
        weighted_sum(stats, torch.ones(3, 0)).backward()
        assert all(value.shape == (0,) for value in stats) and empty.grad.shape == (0, 7)


def test_nan_stays_in_its_token(seed: int) -> None:
    logits, teacher = torch.randn(2, 3, 12)
    logits[1, 4] = math.nan
    targets = torch.tensor([0, 1, 2])
    for divergence in DIVERGENCES:
        own = logits.clone().requires_grad_()
        stats = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, divergence=divergence)
        weighted_sum(stats, torch.ones(3, 3)).backward()
        for value in (stats.log_prob, stats.entropy, stats.divergence, own.grad.sum(-1)):
            assert value.isnan().tolist() == [False, True, False], f"seed {seed} {divergence}"


def test_inplace_backward_writes_into_the_logits_and_only_then(seed: int) -> None:
    leaf, teacher = torch.randn(2, 6, 40)
    leaf = leaf.requires_grad_()
    targets = torch.randint(0, 38, (6,))
    grads = {}
    for inplace in (False, True):
        leaf.grad = None
        logits = leaf * 1
        before = logits.detach().clone()
        stats = vocab_parallel_token_stats(
            logits, targets, teacher_logits=teacher, vocab_size=38, inplace_backward=inplace
        )
        assert torch.equal(logits.detach(), before)
        weighted_sum(stats, torch.ones(3, 6)).backward(retain_graph=inplace)
        grads[inplace] = leaf.grad.clone()
        assert torch.equal(logits.detach(), grads[True] if inplace else before)
    assert torch.equal(grads[False], grads[True]), f"seed {seed}"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_sum(stats, torch.ones(3, 6)).backward()


def test_the_teacher_gets_no_gradient() -> None:
    logits, teacher = torch.randn(2, 4, 9).unbind()
    logits, teacher = logits.requires_grad_(), teacher.requires_grad_()
    stats = vocab_parallel_token_stats(logits, torch.zeros(4, dtype=torch.int64), teacher_logits=teacher)
    assert not stats.teacher_log_prob.requires_grad
    stats.divergence.sum().backward()
    assert teacher.grad is None and logits.grad is not None


def test_non_contiguous_logits(seed: int) -> None:
    whole = torch.randn(30, 8)
    targets = torch.randint(0, 30, (8,))
    assert_matches_dense(whole.t(), targets, torch.randn(30, 8).t(), rtol=1e-5, atol=1e-6, message=f"seed {seed}")
    assert_matches_dense(
        torch.randn(8, 60)[:, ::2],
        targets,
        torch.randn(8, 30),
        inplace_backward=True,
        rtol=1e-5,
        atol=1e-6,
        message=f"seed {seed}",
    )


def test_invariant_to_padding_and_token_order(seed: int) -> None:
    logits, teacher = torch.randn(2, 6, 40)
    targets = torch.randint(0, 40, (6,))
    plain = vocab_parallel_token_stats(logits, targets, teacher_logits=teacher, chunk_size=2)
    wide = vocab_parallel_token_stats(
        torch.nn.functional.pad(logits, (0, 24), value=99.0),
        targets,
        teacher_logits=torch.nn.functional.pad(teacher, (0, 24), value=99.0),
        vocab_size=40,
    )
    order = torch.randperm(6)
    permuted = vocab_parallel_token_stats(logits[order], targets[order], teacher_logits=teacher[order], chunk_size=5)
    for a, b, c in zip(plain, wide, permuted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a[order], c, rtol=1e-6, atol=1e-7)


def test_a_descent_step_lowers_the_divergence(seed: int) -> None:
    logits, teacher = torch.randn(2, 8, 30)
    targets = torch.randint(0, 30, (8,))
    for divergence in DIVERGENCES:
        own = logits.clone().requires_grad_()
        before = vocab_parallel_token_stats(own, targets, teacher_logits=teacher, divergence=divergence).divergence
        before.sum().backward()
        for sign, compare in ((-1, torch.lt), (1, torch.gt)):
            moved = logits + sign * 0.05 * own.grad
            after = vocab_parallel_token_stats(moved, targets, teacher_logits=teacher, divergence=divergence).divergence
            assert compare(after, before.detach()).all(), f"seed {seed} {divergence} {sign}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(2, 3, 4)}, r"logits has shape \(2, 3, 4\)"),
        ({"logits": torch.ones(3, 8, dtype=torch.int64)}, "logits has dtype torch.int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \(2,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets has dtype torch.int32"),
        ({"targets": torch.tensor([0, 8, 1])}, r"targets\[1\] is 8, outside the vocabulary of 8"),
        ({"targets": torch.tensor([0, 1, -100])}, r"targets\[2\] is -100"),
        ({"targets": torch.tensor([0, 6, 1]), "vocab_size": 6}, r"targets\[1\] is 6, outside the vocabulary of 6"),
        ({"teacher_logits": torch.randn(3, 9)}, r"teacher_logits has shape \(3, 9\)"),
        ({"teacher_logits": torch.ones(3, 8, dtype=torch.bool)}, "teacher_logits has dtype torch.bool"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"vocab_size": 9}, "vocab_size is 9"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"jsd_weight": 1.0}, "jsd_weight is 1.0"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {"logits": torch.randn(3, 8), "targets": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_token_stats(arguments.pop("logits"), arguments.pop("targets"), **arguments)
