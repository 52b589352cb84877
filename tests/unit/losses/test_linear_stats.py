"""Token statistics from hidden states: the same numbers and gradients as with the logits, without the logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.losses import DIVERGENCES, GradientSum, TokenStats, linear_token_stats, vocab_parallel_token_stats
from tests.support.token_stats_reference import dense, weighted_sum


@pytest.fixture
def seed() -> int:
    value = torch.seed() % 2**31
    torch.manual_seed(value)
    return value


def make(
    tokens: int, hidden: int, vocabulary: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Student hidden, head, teacher hidden, teacher head."""
    shapes = ((tokens, hidden), (vocabulary, hidden), (tokens, hidden + 3), (vocabulary, hidden + 3))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def run_both(
    inputs: tuple[Tensor, ...],
    targets: Tensor,
    divergence: str | None,
    weights: Tensor,
    vocab_size: int,
    weight: float,
    **extra: object,
) -> tuple[tuple[TokenStats, Tensor, Tensor], tuple[TokenStats, Tensor, Tensor]]:
    """(statistics, gradient of hidden, gradient of weight) of the function under test, and by the definitions in
    float64."""
    hidden, head, teacher_hidden, teacher_head = inputs
    temperature = extra.pop("temperature", 1.0)
    own = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    teacher = (
        {}
        if divergence is None
        else dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_head, divergence=divergence)
    )
    stats = linear_token_stats(
        own[0] * 1,
        own[1],
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        jsd_weight=weight,
        **teacher,
        **extra,
    )
    weighted_sum(stats, weights).backward()
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    teacher_logits = None if divergence is None else teacher_hidden.double() @ teacher_head.double().t()
    reference = dense(
        exact[0] @ exact[1].t(), targets, teacher_logits, divergence or "reverse_kl", temperature, vocab_size, weight
    )
    weighted_sum(reference, weights.double()).backward()
    return (stats, own[0].grad, own[1].grad), (reference, exact[0].grad, exact[1].grad)


def assert_close(found: tuple, expected: tuple, rtol: float, atol: float, message: str) -> None:
    for name, got, want in zip(TokenStats._fields, found[0], expected[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(
                got.double(), want.detach(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{message} {n}: {m}"
            )
    for name, got, want in (("hidden", found[1], expected[1]), ("weight", found[2], expected[2])):
        scale = want.abs().max() if want.numel() else 0.0
        error = (got.double() - want).abs().max() if want.numel() else 0.0
        assert error <= rtol * scale + atol, (
            f"{message} gradient of {name}: off by {error:.2e}, its largest entry is {scale:.2e}"
        )


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 12),
    width=st.integers(1, 40),
    temperature=st.floats(0.3, 3.0),
    divergence=st.sampled_from([None, *DIVERGENCES]),
    weight=st.floats(0.05, 0.95),
    chunk_size=st.none() | st.integers(1, 10),
    vocab_chunk_size=st.none() | st.integers(1, 45),
    inplace=st.booleans(),
    keep_bytes=st.integers(0, 3000),
    seed=st.integers(0, 2**31 - 1),
)
def test_property_matches_dense(
    data,
    tokens,
    hidden,
    width,
    temperature,
    divergence,
    weight,
    chunk_size,
    vocab_chunk_size,
    inplace,
    keep_bytes,
    seed,
) -> None:
    vocab_size = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    inputs = make(tokens, hidden, width, generator)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    weights = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    found, expected = run_both(
        inputs, targets, divergence, weights, vocab_size, weight, temperature=temperature, chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size, inplace_backward=inplace, keep_bytes=keep_bytes,
    )  # fmt: skip
    assert_close(found, expected, 1e-8, 1e-9, "")
    assert (found[2][vocab_size:] == 0).all()


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@pytest.mark.parametrize("blocks", [{}, {"chunk_size": 7, "vocab_chunk_size": 1000}])
def test_float32_within_1e_5(seed: int, divergence: str | None, blocks: dict) -> None:
    inputs = make(29, 24, 4099, torch.Generator().manual_seed(seed), torch.float32)
    targets = torch.randint(0, 4000, (29,))
    found, expected = run_both(inputs, targets, divergence, torch.randn(3, 29), 4000, 0.3, temperature=0.8, **blocks)
    assert_close(found, expected, 1e-5, 2e-6, f"seed {seed}")


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_exact_statistics(seed: int, divergence: str | None, dtype: torch.dtype) -> None:
    """Logits are never rounded to half precision, so statistics are float32's; only the gradient is rounded."""
    inputs = make(17, 16, 700, torch.Generator().manual_seed(seed), dtype)
    targets = torch.randint(0, 700, (17,))
    found, expected = run_both(
        inputs, targets, divergence, torch.randn(3, 17), 700, 0.5, chunk_size=5, vocab_chunk_size=300
    )
    assert_close((found[0], *expected[1:]), expected, 1e-5, 5e-6, f"seed {seed}")
    assert_close((expected[0], *found[1:]), expected, 1e-2, 1e-3, f"seed {seed}")
    assert found[1].dtype == found[2].dtype == dtype


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(seed: int, divergence: str) -> None:
    hidden, head, teacher_hidden, teacher_head = make(4, 3, 11, torch.Generator().manual_seed(seed))
    targets = torch.randint(0, 9, (4,))

    def function(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stats = linear_token_stats(
            states,
            weight,
            targets,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_head,
            divergence=divergence,
            vocab_size=9,
            temperature=1.3,
            jsd_weight=0.2,
            chunk_size=3,
            vocab_chunk_size=4,
        )
        return stats.log_prob, stats.entropy, stats.divergence

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), head.requires_grad_())), f"seed {seed}"


def test_the_teacher_takes_the_students_head_and_no_gradient(seed: int) -> None:
    hidden, head = torch.randn(6, 8), torch.randn(40, 8)
    teacher = torch.randn(6, 8, requires_grad=True)
    targets = torch.randint(0, 40, (6,))
    shared = head.clone().requires_grad_()
    stats = linear_token_stats(hidden, shared, targets, teacher_hidden=teacher)
    stats.divergence.sum().backward()
    apart = head.clone().requires_grad_()
    same = linear_token_stats(hidden, apart, targets, teacher_hidden=teacher, teacher_weight=head)
    same.divergence.sum().backward()
    assert teacher.grad is None
    # The head's gradient is that of the student's use of it alone.
    assert torch.equal(shared.grad, apart.grad) and torch.equal(stats.divergence, same.divergence), f"seed {seed}"


def test_only_what_needs_a_gradient_gets_one() -> None:
    targets = torch.tensor([1, 2])
    for needs in ((True, False), (False, True)):
        inputs = [torch.randn(shape, requires_grad=flag) for shape, flag in zip(((2, 4), (9, 4)), needs, strict=True)]
        linear_token_stats(*inputs, targets).log_prob.sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == list(needs)
    assert not linear_token_stats(torch.randn(2, 4), torch.randn(9, 4), targets).log_prob.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_head_are_added_to_a_sum_of_the_callers(seed: int, dtype: torch.dtype) -> None:
    hidden, head = torch.randn(6, 8).to(dtype), torch.randn(30, 8).to(dtype).requires_grad_()
    targets, before = torch.randint(0, 28, (6,)), torch.randn(30, 8)
    options = dict(vocab_size=28, chunk_size=4, vocab_chunk_size=16)
    linear_token_stats(hidden, head, targets, **options).log_prob.sum().backward()
    expected, head.grad = head.grad, None
    instead, total = torch.full_like(head, 7.0), before.clone()
    calls = iter([None, instead])
    for times in (1, 2):
        gradient = GradientSum(total, lambda: next(calls))
        linear_token_stats(hidden, head, targets, weight_grad=gradient, **options).log_prob.sum().backward()
        assert head.grad is None if times == 1 else torch.equal(head.grad, instead)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(total, before + times * expected.float(), rtol=tolerance, atol=tolerance)
    assert next(calls, "none left") == "none left" and torch.equal(total[28:], before[28:])


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_the_gradients_of_projected_ones(
    seed: int, dtype: torch.dtype, divergence: str | None
) -> None:
    """The same bits where they are kept as they are. In half precision both are as far from float64."""
    inputs = make(29, 24, 4099, torch.Generator().manual_seed(seed), dtype)
    # Logits up to 60, where rounding them as they are would turn probabilities upside down.
    inputs = (inputs[0] * 4, *inputs[1:])
    targets, weights = torch.randint(0, 4000, (29,)), torch.randn(3, 29)
    options = dict(temperature=1.5, chunk_size=8, vocab_chunk_size=1000)
    projected, expected = run_both(inputs, targets, divergence, weights, 4000, 0.3, **options)
    # The first 16 of 29 tokens fit, in two of four blocks of rows.
    kept, _ = run_both(
        inputs, targets, divergence, weights, 4000, 0.3, **options, keep_bytes=17 * 4000 * dtype.itemsize
    )
    for part in (1, 2):
        if dtype == torch.float32:
            assert torch.equal(kept[part], projected[part]), f"seed {seed}"
        else:
            errors = [float((found[part].double() - expected[part]).norm()) for found in (kept, projected)]
            assert errors[0] <= 2 * errors[1] and not torch.equal(kept[part], projected[part]), f"seed {seed}: {errors}"


def test_kept_logits_serve_one_backward_pass(seed: int) -> None:
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8)
    stats = linear_token_stats(hidden, head, torch.randint(0, 30, (6,)), keep_bytes=1 << 20)
    first, second = (torch.autograd.grad(stats.log_prob.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second), f"seed {seed}"


def test_inplace_backward_writes_into_hidden(seed: int) -> None:
    leaf, head = torch.randn(6, 8).requires_grad_(), torch.randn(30, 8)
    targets = torch.randint(0, 30, (6,))
    grads = {}
    for inplace in (False, True):
        leaf.grad = None
        hidden = leaf * 1
        linear_token_stats(hidden, head, targets, chunk_size=4, inplace_backward=inplace).log_prob.sum().backward()
        grads[inplace] = leaf.grad.clone()
        assert torch.equal(hidden.detach(), grads[True] if inplace else leaf.detach())
    assert torch.equal(grads[False], grads[True]), f"seed {seed}"


def test_agrees_with_the_materialised_path_where_logits_are_infinite(seed: int) -> None:
    """A head row at -inf masks its token id, as a logit processor would; another row is NaN, and spoils every token."""
    hidden, head = torch.rand(5, 6) + 0.1, torch.randn(50, 6)
    head[7] = -float("inf")
    targets = torch.tensor([1, 2, 3, 4, 5])
    fused = linear_token_stats(hidden, head, targets, vocab_chunk_size=8)
    plain = vocab_parallel_token_stats(hidden @ head.t(), targets)
    torch.testing.assert_close(fused.entropy, plain.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.log_prob, plain.log_prob, rtol=1e-5, atol=1e-6)
    head[30] = float("nan")
    assert linear_token_stats(hidden, head, targets, vocab_chunk_size=8).log_prob.isnan().all(), f"seed {seed}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(3, 2, 8)}, r"hidden has shape \(3, 2, 8\)"),
        ({"hidden": torch.randn(3, 9)}, r"hidden is torch.float32 \(3, 9\) and weight"),
        ({"weight": torch.randn(20, 8, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"weight": torch.randn(0, 8)}, "weight has no rows"),
        ({"hidden": torch.ones(3, 8, dtype=torch.int64)}, "hidden has dtype torch.int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \(2,\)"),
        ({"targets": torch.tensor([0, 20, 1])}, r"targets\[1\] is 20, outside the vocabulary of 20"),
        ({"teacher_weight": torch.randn(20, 8)}, "without teacher_hidden"),
        ({"teacher_hidden": torch.randn(2, 8)}, "teacher_hidden of 2 tokens"),
        (
            {"teacher_hidden": torch.randn(3, 8), "teacher_weight": torch.randn(24, 8)},
            "teacher_weight has 24 rows and weight 20",
        ),
        ({"teacher_hidden": torch.randn(3, 5)}, "teacher_hidden is"),
        ({"weight_grad": GradientSum(torch.zeros(20, 9), lambda: None)}, r"weight_grad is torch.float32 \(20, 9\)"),
        ({"weight_grad": GradientSum(torch.zeros(20, 8).half(), lambda: None)}, "weight_grad is torch.float16"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"vocab_chunk_size": -1}, "vocab_chunk_size is -1"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"vocab_size": 21}, "vocab_size is 21"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.randn(3, 8),
        "weight": torch.randn(20, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_token_stats(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


def test_targets_that_the_caller_has_checked_are_not_looked_at() -> None:
    hidden, head, targets = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8), torch.tensor([0, 20, 1])
    for values in (linear_token_stats(hidden, head, targets, check_targets=False),
                   vocab_parallel_token_stats(hidden @ head.t(), targets, check_targets=False)):  # fmt: skip
        expected = (hidden @ head.t()).log_softmax(-1)
        torch.testing.assert_close(values.log_prob[[0, 2]], expected[[0, 2], [0, 1]])


_MEMORY = """
import resource, sys, torch
from dasd_megatron.losses import linear_token_stats
torch.set_num_threads(1)
tokens, hidden, vocabulary = 2048, 32, 50_000
states, head = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocabulary, hidden, requires_grad=True)
targets = torch.randint(0, vocabulary, (tokens,))
small = dict(chunk_size=256, vocab_chunk_size=4096)
linear_token_stats(states[:256], head, targets[:256], **small).log_prob.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stats = linear_token_stats(states, head, targets, teacher_hidden=states.detach(), divergence=sys.argv[1], **small)
(stats.log_prob + stats.entropy + stats.divergence).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(divergence: str) -> None:
    """The peak of a process of its own: 2,048 x 50,000 logits would be 410 MB."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, divergence],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
        check=True,
    )
    # Two blocks of 4 MB, a gradient of the head of 6 MB, and the allocator's slack.
    assert int(done.stdout) < 60e6, done.stdout
