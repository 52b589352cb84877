"""Divergences whose entries are clipped, from logits and from hidden states, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.losses import DIVERGENCES, linear_token_stats, vocab_parallel_token_stats
from tests.support.token_stats_reference import clipped_divergence, dense

WEIGHT = 0.3


def reference(
    logits: Tensor, teacher: Tensor, targets: Tensor, weights: Tensor, divergence: str, **settings_: float
) -> tuple[Tensor, Tensor]:
    """The clipped divergence, and the gradient by ``logits`` of its sum with log-prob and entropy under ``weights``."""
    own = logits.detach().double().clone().requires_grad_()
    value = clipped_divergence(own, teacher.double(), divergence, weight=WEIGHT, **settings_)
    plain = dense(own, targets, None, divergence, settings_["temperature"], settings_["vocab_size"], WEIGHT)
    (weights[0] * plain.log_prob + weights[1] * plain.entropy + weights[2] * value).sum().backward()
    return value.detach(), own.grad


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 6),
    width=st.integers(1, 30),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.floats(0.3, 3.0),
    divergence=st.sampled_from(list(DIVERGENCES)),
    clip=st.sampled_from([1e-4, 0.01, 0.05, 0.3, 1e9]),
    masked=st.booleans(),
    inplace=st.booleans(),
    chunk_size=st.none() | st.integers(1, 7),
    seed=st.integers(0, 2**31 - 1),
)
def test_property_matches_the_definition(
    data, tokens, width, scale, temperature, divergence, clip, masked, inplace, chunk_size, seed
) -> None:
    vocab_size = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    if masked and vocab_size > 2:
        # One column without mass under the teacher, and one under the student.
        teacher[:, 0], logits[:, 1] = -math.inf, -math.inf
        targets[targets == 1] = 2
    weights = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    want, want_grad = reference(
        logits, teacher, targets, weights, divergence, temperature=temperature, vocab_size=vocab_size, clip=clip
    )
    leaf = logits.clone().requires_grad_()
    stats = vocab_parallel_token_stats(
        leaf * 1, targets, teacher_logits=teacher, divergence=divergence, vocab_size=vocab_size,
        temperature=temperature, jsd_weight=WEIGHT, entry_clip=clip, inplace_backward=inplace, chunk_size=chunk_size,
    )  # fmt: skip
    (weights[0] * stats.log_prob + weights[1] * stats.entropy + weights[2] * stats.divergence).sum().backward()
    torch.testing.assert_close(stats.divergence.detach(), want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(leaf.grad[:, :vocab_size], want_grad[:, :vocab_size], rtol=1e-7, atol=1e-9)
    assert (leaf.grad[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_from_hidden_states_in_blocks(divergence: str, dtype: torch.dtype) -> None:
    """A teacher of another width; blocks of tokens and of columns; padding in the head."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    message = f"seed {generator.initial_seed()}"
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2
        for shape in ((19, 8), (60, 8), (19, 16), (60, 16))
    )
    targets = torch.randint(0, 50, (19,), generator=generator)
    weights = torch.randn(3, 19, generator=generator, dtype=torch.float64)
    own = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    stats = linear_token_stats(
        *own, targets, teacher_hidden=teacher_hidden, teacher_weight=teacher_head, divergence=divergence,
        vocab_size=50, temperature=0.8, jsd_weight=WEIGHT, entry_clip=0.05, chunk_size=7, vocab_chunk_size=20,
    )  # fmt: skip
    (weights[0] * stats.log_prob + weights[1] * stats.entropy + weights[2] * stats.divergence).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in own]
    logits = exact[0] @ exact[1].t()
    want, grad = reference(
        logits.detach(), teacher_hidden.double() @ teacher_head.double().t(), targets, weights, divergence,
        temperature=0.8, vocab_size=50, clip=0.05,
    )  # fmt: skip
    logits.backward(grad)
    tolerance = {torch.float64: 1e-8, torch.float32: 2e-6, torch.bfloat16: 5e-6}[dtype]
    torch.testing.assert_close(stats.divergence.detach().double(), want, rtol=tolerance, atol=tolerance, msg=message)
    for got, expected in zip(own, exact, strict=True):
        bound = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (got.grad.double() - expected.grad).abs().max() <= bound * expected.grad.abs().max(), message


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_near_and_far(divergence: str) -> None:
    """Values and gradients of float32 where teacher and student are nearly the same, and where they are far apart."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    targets = torch.zeros(20, dtype=torch.int64)
    weights = torch.tensor([0.0, 0.0, 1.0]).double()[:, None].expand(3, 20)
    for gap in (1e-4, 1e-2, 1.0, 30.0):
        logits = torch.randn(20, 400, generator=generator) * 3
        teacher = logits + torch.randn(20, 400, generator=generator) * gap
        want, want_grad = reference(
            logits, teacher, targets, weights, divergence, temperature=1.0, vocab_size=400, clip=0.05
        )
        leaf = logits.clone().requires_grad_()
        stats = vocab_parallel_token_stats(
            leaf, targets, teacher_logits=teacher, divergence=divergence, jsd_weight=WEIGHT, entry_clip=0.05
        )
        stats.divergence.sum().backward()
        message = f"seed {generator.initial_seed()} gap {gap}"
        assert (stats.divergence.detach() - want).abs().max() <= 2e-6, message
        # An entry within rounding of the bound may fall on either side of it.
        off = (leaf.grad - want_grad).abs().amax(-1)
        assert (off > 2e-6 + 1e-5 * want_grad.abs().amax(-1)).sum() <= 1, (message, off)


def test_a_bound_that_nothing_reaches_changes_nothing() -> None:
    logits, teacher = torch.randn(2, 7, 40, dtype=torch.float64)
    targets = torch.randint(0, 40, (7,))
    for divergence in DIVERGENCES:
        found = []
        for clip in (None, 1e6):
            leaf = logits.clone().requires_grad_()
            stats = vocab_parallel_token_stats(
                leaf, targets, teacher_logits=teacher, divergence=divergence, entry_clip=clip
            )
            stats.divergence.sum().backward()
            found.append((stats.divergence.detach(), leaf.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_nan_stays_in_its_token_and_the_bound_is_checked() -> None:
    logits, teacher = torch.randn(2, 4, 9)
    logits[1, 3], teacher[2, 4] = math.nan, math.nan
    targets = torch.zeros(4, dtype=torch.int64)
    stats = vocab_parallel_token_stats(logits, targets, teacher_logits=teacher, entry_clip=0.05)
    assert stats.divergence.isnan().tolist() == [False, True, True, False]
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="entry_clip is"):
            vocab_parallel_token_stats(logits, targets, teacher_logits=teacher, entry_clip=clip)
