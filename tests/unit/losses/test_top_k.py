"""Divergences over some entries of the vocabulary: the entries, their log-probs and gradients, and the values, against
plain definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasd_megatron.losses import DIVERGENCES, linear_token_stats, top_k_divergence
from tests.support.token_stats_reference import clipped_sum, dense


def make(tokens: int, hidden: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Student hidden, head, teacher hidden, teacher head; the teacher is wider."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, hidden), (vocabulary, hidden), (tokens, 2 * hidden), (vocabulary, 2 * hidden))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain_divergence(
    student: list[float], teacher: list[float], name: str, *, tail: bool, weight: float, clip: float
) -> float:
    """By loops over the entries of one token."""

    def complete(log_probs: list[float]) -> list[float]:
        probs = [math.exp(value) for value in log_probs]
        if tail:
            return [*probs, max(1.0 - sum(probs), 1e-7)]
        return [prob / sum(probs) for prob in probs]

    total = 0.0
    for p, q in zip(complete(student), complete(teacher), strict=True):
        m = weight * p + (1 - weight) * q

        def times_log(mass: float, ratio_of: float, to: float) -> float:
            return 0.0 if mass == 0 else math.inf if to == 0 else mass * math.log(ratio_of / to)

        summand = {
            "reverse_kl": lambda p=p, q=q: times_log(p, p, q),
            "forward_kl": lambda p=p, q=q: times_log(q, q, p),
            "jsd": lambda p=p, q=q, m=m: weight * times_log(p, p, m) + (1 - weight) * times_log(q, q, m),
        }[name]()
        total += min(summand, clip)
    return total


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 7),
    tokens=st.integers(0, 4),
    tail=st.booleans(),
    name=st.sampled_from(list(DIVERGENCES)),
    clip=st.sampled_from([0.01, 0.1, math.inf]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_property_divergence_is_the_plain_formula(k, tokens, tail, name, clip, masked, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(tokens, 12, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)[:, :k].clone()
        for _ in range(2)
    )
    if masked and k > 2:
        student[:, 0], teacher[:, 1] = -math.inf, -math.inf
    own = student.clone().requires_grad_()
    got = top_k_divergence(
        own, teacher, divergence=name, tail=tail, jsd_weight=0.3, entry_clip=None if clip == math.inf else clip
    )
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    want = [plain_divergence(p, q, name, tail=tail, weight=0.3, clip=clip) for p, q in rows]
    torch.testing.assert_close(got.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    got.sum().backward()
    # Infinite divergences have no gradient, and no other one is spoiled by what has no probability.
    assert torch.isfinite(own.grad).all() and (own.grad[got == math.inf] == 0).all()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient_by_finite_differences(name: str, tail: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).log_softmax(-1)[..., :4]
    for clip in (None, 0.05):
        assert torch.autograd.gradcheck(
            lambda values, clip=clip: top_k_divergence(
                values, teacher, divergence=name, tail=tail, jsd_weight=0.3, entry_clip=clip
            ),
            student.clone().requires_grad_(),
        )


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(0, 7),
    hidden=st.integers(1, 9),
    width=st.integers(1, 40),
    k=st.integers(1, 45),
    temperature=st.floats(0.4, 2.5),
    chunk_size=st.none() | st.integers(1, 8),
    vocab_chunk_size=st.none() | st.integers(1, 45),
    seed=st.integers(0, 2**31 - 1),
)
def test_property_entries_and_their_gradients(
    data, tokens, hidden, width, k, temperature, chunk_size, vocab_chunk_size, seed
) -> None:
    vocab_size = data.draw(st.integers(1, width))
    states, head = make(tokens, hidden, width, seed)[:2]
    targets = torch.arange(tokens) % vocab_size
    common = dict(
        vocab_size=vocab_size, temperature=temperature, chunk_size=chunk_size, vocab_chunk_size=vocab_chunk_size
    )
    log_probs = (states @ head.t() / temperature)[:, :vocab_size].log_softmax(-1)
    kept = min(k, vocab_size)
    best = log_probs.topk(kept, dim=1)
    top = linear_token_stats(states, head, targets, top_k=k, **common).top
    assert torch.equal(top.ids[:, :kept], best.indices)
    assert (top.ids[:, kept:] == -1).all() and (top.log_prob[:, kept:] == -math.inf).all()
    torch.testing.assert_close(top.log_prob[:, :kept], best.values, rtol=1e-9, atol=1e-9)

    # Any entries, in any order, beside the other statistics; some of them none.
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, vocab_size, (tokens, 4), generator=generator)
    weights = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    own = [states.clone().requires_grad_(), head.clone().requires_grad_()]
    stats = linear_token_stats(*own, targets, entry_ids=ids, **common)
    assert torch.equal(stats.top.ids, ids) and (stats.top.log_prob[ids < 0] == -math.inf).all()
    (
        (stats.top.log_prob.masked_fill(ids < 0, 0.0) * weights[:, :4]).sum()
        + (stats.log_prob * weights[:, 4] + stats.entropy * weights[:, 5]).sum()
    ).backward()
    exact = [states.clone().requires_grad_(), head.clone().requires_grad_()]
    logits = exact[0] @ exact[1].t()
    want = (logits / temperature)[:, :vocab_size].log_softmax(-1)
    at_ids = want.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    torch.testing.assert_close(stats.top.log_prob.masked_fill(ids < 0, 0.0), at_ids, rtol=1e-9, atol=1e-9)
    plain = dense(logits, targets, None, "reverse_kl", temperature, vocab_size, 0.5)
    (
        (at_ids * weights[:, :4]).sum() + (plain.log_prob * weights[:, 4] + plain.entropy * weights[:, 5]).sum()
    ).backward()
    for got, expected in zip(own, exact, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("of_teacher", [True, False], ids=["teacher's", "student's"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_reach_the_students_states(name: str, tail: bool, of_teacher: bool) -> None:
    """As the trainer does it: entries while scoring, their log-probs in the update. In float32, beside float64."""
    seed = torch.seed() % 2**31
    inputs = make(11, 6, 90, seed, torch.float32)
    states, head, teacher_states, teacher_head = inputs
    targets = torch.arange(11)
    common = dict(vocab_size=80, temperature=0.9, chunk_size=4, vocab_chunk_size=32)
    sides = [(teacher_states, teacher_head), (states, head)]
    ids = linear_token_stats(*sides[0 if of_teacher else 1], targets, top_k=8, **common).top.ids
    teacher = linear_token_stats(teacher_states, teacher_head, targets, entry_ids=ids, **common).top.log_prob
    own = [states.clone().requires_grad_(), head.clone().requires_grad_()]
    top = linear_token_stats(*own, targets, entry_ids=ids.int(), **common).top
    value = top_k_divergence(top.log_prob, teacher, divergence=name, tail=tail, jsd_weight=0.3)
    value.sum().backward()

    exact = [states.double().requires_grad_(), head.double().requires_grad_()]
    log_p, log_q = (
        (hidden.double() @ weight.double().t() / 0.9)[:, :80].log_softmax(-1)
        for hidden, weight in (exact, (teacher_states, teacher_head))
    )
    order = (log_q if of_teacher else log_p).detach().topk(8, dim=1).indices
    assert torch.equal(order, ids), f"seed {seed}"

    def complete(log_probs: Tensor) -> Tensor:
        chosen, rest = log_probs.gather(1, order), log_probs.scatter(1, order, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([chosen, rest], 1) if tail else chosen.log_softmax(-1)

    want = clipped_sum(complete(log_p), complete(log_q.detach()), name, weight=0.3, clip=1e9)
    want.sum().backward()
    torch.testing.assert_close(value.detach().double(), want.detach(), rtol=1e-4, atol=2e-6, msg=f"seed {seed}")
    for got, expected in zip(own, exact, strict=True):
        off = (got.grad.double() - expected.grad).abs().max()
        assert off <= 1e-4 * expected.grad.abs().max(), f"seed {seed}: {off}"


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_keeps_the_gradient_of_certain_tokens(name: str, tail: bool) -> None:
    """Where the policy is certain, the entries' part and the normaliser's nearly cancel."""
    states, head, *_ = make(64, 32, 90, 0)
    targets = (states @ head.t()).argmax(1)
    # Along the head's row of the target, so that its probability is nearly 1.
    own, teacher, head = (values.bfloat16() for values in (head[targets], 0.9 * head[targets], head))
    ids = linear_token_stats(teacher, head, targets, top_k=8, vocab_chunk_size=32).top.ids
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight = (values.to(dtype, copy=True).requires_grad_() for values in (own, head))
        common = dict(entry_ids=ids, vocab_chunk_size=32)
        log_q = linear_token_stats(teacher.to(dtype), head.to(dtype), targets, **common).top.log_prob
        stats = linear_token_stats(hidden, weight, targets, **common)
        assert stats.log_prob.median() > -1e-3
        top_k_divergence(stats.top.log_prob, log_q, divergence=name, tail=tail).sum().backward()
        gradients.append([hidden.grad.double(), weight.grad.double()])
    for exact, got in zip(*gradients, strict=True):
        assert (got - exact).norm() <= 0.02 * exact.norm()


def test_the_whole_vocabulary_as_entries_is_the_full_divergence() -> None:
    states, head, teacher_states, teacher_head = make(6, 5, 30, torch.seed() % 2**31)
    targets = torch.arange(6)
    for name in DIVERGENCES:
        teacher = dict(teacher_hidden=teacher_states, teacher_weight=teacher_head)
        full = linear_token_stats(states, head, targets, divergence=name, **teacher).divergence
        top = linear_token_stats(teacher_states, teacher_head, targets, top_k=30).top
        own = linear_token_stats(states, head, targets, entry_ids=top.ids).top.log_prob
        got = top_k_divergence(own, top.log_prob, divergence=name, tail=False)
        torch.testing.assert_close(got, full, rtol=1e-8, atol=1e-10)


def test_refusals() -> None:
    states, head, targets = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.int64)
    for change, message in (
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2, "entry_ids": torch.zeros(3, 2).long()}, "both given"),
        ({"entry_ids": torch.zeros(2, 2).long()}, r"entry_ids is torch.int64 \(2, 2\)"),
        ({"entry_ids": torch.zeros(3, 2)}, "entry_ids is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_token_stats(states, head, targets, **change)
    with pytest.raises(ValueError, match="expected the same entries"):
        top_k_divergence(torch.zeros(3, 2), torch.zeros(3, 4), divergence="jsd", tail=True)
