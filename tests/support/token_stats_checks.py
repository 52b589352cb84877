"""Checks that every process of a group makes: agreement with one process, bit-equal ranks, collectives counted. Run
through ``gloo_pool``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dasd_megatron.algorithms import context_parallel_credit, direction_adaptive_credit, gather_packed_tokens
from dasd_megatron.losses import (
    DIVERGENCES,
    TokenStats,
    linear_token_stats,
    top_k_divergence,
    vocab_parallel_token_stats,
)

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "broadcast",
    "reduce", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv", "barrier",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[Counter]:
    """Count every collective that runs through torch.distributed."""
    calls: Counter = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def wrap(name: str):
        def call(*args, **kwargs):
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, wrap(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def backward_of_all(stats: TokenStats, weights: torch.Tensor) -> None:
    total = (stats.log_prob * weights[0] + stats.entropy * weights[1]).sum()
    if stats.divergence is not None:
        total = total + (stats.divergence * weights[2]).sum()
    total.backward()


def assert_equal_on_all_ranks(value: torch.Tensor, message: str) -> None:
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value.contiguous())
    assert all(torch.equal(gathered[0], other) for other in gathered), f"{message}: ranks differ"


def check_case(rank: int, world_size: int, case: dict, message: str) -> None:
    """One group of processes against one process on the whole vocabulary, which the unit tests hold against float64."""
    generator = torch.Generator().manual_seed(case["seed"])
    width, tokens, vocab_size = case["width"], case["tokens"], case["vocab_size"]
    logits, teacher = (
        torch.randn(2, tokens, width * world_size, generator=generator, dtype=torch.float64) * case["scale"]
        + case["shift"]
    )
    # One shard of the teacher so far below the others that its share of the mass underflows, while the student's does
    # not.
    teacher[:, :width] -= case["gap"]
    if case["masked"]:
        logits[:, 1:3], teacher[:, 1:3] = -math.inf, -math.inf
        # A whole shard of one token without mass.
        logits[:1, 3:width], teacher[:1, 3:width] = -math.inf, -math.inf
        logits[:1, 0], teacher[:1, 0] = -math.inf, -math.inf
    logits, teacher = logits.to(case["dtype"]), teacher.to(case["dtype"])
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    # Shard borders, first and last id of the vocabulary.
    borders = torch.tensor([0, width - 1, width, vocab_size - 1]).clamp_max(vocab_size - 1)[:tokens]
    targets[: len(borders)] = borders
    if case["masked"]:
        targets[(targets < 3) | (torch.arange(tokens) == 0)] = vocab_size - 1
    weights = torch.randn(3, tokens, generator=generator)
    divergence = case["divergence"]
    extra = dict(
        divergence=divergence or "reverse_kl",
        vocab_size=vocab_size,
        temperature=case["temperature"],
        jsd_weight=0.3,
        entry_clip=case.get("entry_clip"),
    )

    whole = logits.clone().requires_grad_()
    expected = vocab_parallel_token_stats(
        whole, targets, teacher_logits=None if divergence is None else teacher, **extra
    )
    backward_of_all(expected, weights)

    columns = slice(rank * width, (rank + 1) * width)
    leaf = logits[:, columns].contiguous().requires_grad_()
    own = leaf * 1
    before = own.detach().clone()
    with counted() as forward_calls:
        stats = vocab_parallel_token_stats(
            own, targets, teacher_logits=None if divergence is None else teacher[:, columns], group=dist.group.WORLD,
            inplace_backward=case["inplace"], chunk_size=case["chunk_size"], **extra,
        )  # fmt: skip
    assert torch.equal(own.detach(), before), f"{message}: forward changed the logits"
    with counted() as backward_calls:
        backward_of_all(stats, weights)
    twice = divergence == "jsd" or (divergence is not None and case.get("entry_clip") is not None)
    allowed = 0 if world_size == 1 or tokens == 0 else 2 if twice else 1
    assert forward_calls.total() == allowed, f"{message}: {forward_calls}"
    assert not backward_calls, f"{message}: {backward_calls}"

    exact = case["dtype"] == torch.float64
    tolerance = dict(rtol=1e-9, atol=1e-10) if exact else dict(rtol=2e-6, atol=2e-6)
    for name, got, want in zip(TokenStats._fields, stats, expected, strict=True):
        if want is None:
            assert got is None
            continue
        torch.testing.assert_close(got, want, **tolerance, msg=lambda m, name=name: f"{message} {name}: {m}")
        if tokens:
            assert_equal_on_all_ranks(got.detach(), f"{message} {name}")
    # Sums in another order: of sixty seeds one differs by 9e-6 at temperature 0.6, where logits reach 13.
    gradient = {torch.float64: dict(rtol=1e-8, atol=1e-10), torch.float32: dict(rtol=1e-5, atol=2e-5)}
    torch.testing.assert_close(
        leaf.grad,
        whole.grad[:, columns],
        **gradient.get(case["dtype"], dict(rtol=1e-2, atol=1e-4)),
        msg=lambda m: f"{message} gradient: {m}",
    )
    padding = max(vocab_size - rank * width, 0)
    assert (leaf.grad[:, padding:] == 0).all(), f"{message}: gradient in the padding"


def check_linear_case(rank: int, world_size: int, case: dict, message: str) -> None:
    """linear_token_stats on the group's shards against one process with the whole head; the gradient of hidden reduced
    here or by us."""
    generator = torch.Generator().manual_seed(case["seed"])
    width, tokens, vocab_size, hidden_size = case["width"], case["tokens"], case["vocab_size"], case["hidden_size"]
    hidden, teacher_hidden = (
        torch.randn(2, tokens, hidden_size, generator=generator, dtype=torch.float64) * case["scale"]
    )
    head, teacher_head = torch.randn(2, width * world_size, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    weights = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    divergence = case["divergence"]
    common = dict(
        vocab_size=vocab_size, temperature=case["temperature"], jsd_weight=0.3, divergence=divergence or "reverse_kl"
    )

    whole = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    teacher = {} if divergence is None else dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_head)
    expected = linear_token_stats(*whole, targets, **teacher, **common)
    backward_of_all(expected, weights)

    rows = slice(rank * width, (rank + 1) * width)
    own = [hidden.clone().requires_grad_(), head[rows].clone().requires_grad_()]
    if divergence is not None:
        teacher = dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_head[rows])
    with counted() as forward_calls:
        stats = linear_token_stats(
            *own, targets, group=dist.group.WORLD, chunk_size=case["chunk_size"],
            vocab_chunk_size=case["vocab_chunk_size"],
            reduce_hidden_grad=case["reduces"], **teacher, **common,
        )  # fmt: skip
    with counted() as backward_calls:
        backward_of_all(stats, weights)
    alone = world_size == 1
    assert forward_calls.total() == (0 if alone or tokens == 0 else 2 if divergence == "jsd" else 1), (
        f"{message}: {forward_calls}"
    )
    assert backward_calls == Counter({"all_reduce": 1} if case["reduces"] and not alone else {}), (
        f"{message}: {backward_calls}"
    )
    for name, got, want in zip(TokenStats._fields, stats, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(
                got, want, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{message} {name}: {m}"
            )
            if tokens:
                assert_equal_on_all_ranks(got.detach(), f"{message} {name}")
    gradient = own[0].grad.clone()
    if not case["reduces"]:
        dist.all_reduce(gradient)
    torch.testing.assert_close(
        gradient, whole[0].grad, rtol=1e-8, atol=1e-9, msg=lambda m: f"{message} gradient of hidden: {m}"
    )
    torch.testing.assert_close(
        own[1].grad, whole[1].grad[rows], rtol=1e-8, atol=1e-9, msg=lambda m: f"{message} gradient of weight: {m}"
    )


def check_top_k(rank: int, world_size: int, case: dict, message: str) -> None:
    """The most probable entries over all shards, and the divergence over them with its gradients, against one process
    with the whole head. Shards have fewer columns than entries are asked for, and the last one is padding."""
    generator = torch.Generator().manual_seed(case["seed"])
    width, tokens, k = 5, 8, 7
    vocab_size = width * world_size - (width if world_size > 2 else 1)
    hidden, teacher_hidden = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    head, teacher_head = torch.randn(2, width * world_size, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)

    def divergence(rows: slice, group: dist.ProcessGroup | None) -> tuple[list[torch.Tensor], list[Counter]]:
        common = dict(group=group, vocab_size=vocab_size, temperature=0.8, chunk_size=3, vocab_chunk_size=4)
        own = [hidden.clone().requires_grad_(), head[rows].clone().requires_grad_()]
        with counted() as finding:
            teacher = linear_token_stats(teacher_hidden, teacher_head[rows], targets, top_k=k, **common).top
        with counted() as reading:
            top = linear_token_stats(*own, targets, entry_ids=teacher.ids, **common).top
        value = top_k_divergence(top.log_prob, teacher.log_prob, divergence="jsd", tail=True)
        value.sum().backward()
        results = [teacher.ids, teacher.log_prob, top.log_prob.detach(), value.detach(), own[0].grad, own[1].grad]
        return results, [finding, reading]

    rows = slice(rank * width, (rank + 1) * width)
    found, counts = divergence(rows, dist.group.WORLD)
    expected, _ = divergence(slice(None), None)
    expected[-1] = expected[-1][rows]
    # One all-gather of the partial sums, two of the best entries, one all-reduce of the given ones.
    assert [calls.total() for calls in counts] == ([0, 0] if world_size == 1 else [3, 2]), f"{message}: {counts}"
    assert torch.equal(found[0], expected[0]), f"{message}: {found[0]} instead of {expected[0]}"
    for got, want in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m: f"{message}: {m}")
    for value in found[:-1]:
        assert_equal_on_all_ranks(value, message)


def check_features(rank: int, world_size: int, case: dict, message: str) -> None:
    for feature_case in feature_cases(world_size, case["seed"]):
        check_case(rank, world_size, feature_case, f"{message}, {feature_case}")


def feature_cases(world_size: int, seed: int) -> Iterator[dict]:
    """Every divergence with every feature on its own."""
    base = dict(
        width=13, tokens=9, vocab_size=13 * world_size, scale=2.0, shift=0.0, gap=0.0, masked=False,
        dtype=torch.float32,
        temperature=1.0, inplace=False, chunk_size=None, divergence=None, seed=seed,
    )  # fmt: skip
    features = (
        {}, {"vocab_size": 13 * world_size - 5}, {"vocab_size": 7}, {"vocab_size": 1, "scale": 1.0},
        {"masked": True}, {"shift": 1e4},
        {"temperature": 0.6}, {"inplace": True, "chunk_size": 2}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
        {"dtype": torch.float64}, {"tokens": 0}, {"tokens": 1}, {"width": 1, "vocab_size": world_size},
        {"width": 4000, "vocab_size": 3990 * world_size}, {"scale": 60.0, "dtype": torch.float64}, {"gap": 2000.0,
        "dtype": torch.float64}, {"entry_clip": 0.05, "dtype": torch.float64},
    )  # fmt: skip
    for divergence in (None, *DIVERGENCES):
        for feature in features:
            if feature.get("masked") and world_size == 1:
                continue
            yield base | {"divergence": divergence} | feature


def check_target_refused_everywhere(rank: int, world_size: int, case: dict, message: str) -> None:
    """All ranks refuse a wrong target before the collective, so none is left waiting."""
    with counted() as calls:
        try:
            vocab_parallel_token_stats(torch.randn(2, 4), torch.tensor([0, 4 * world_size]), group=dist.group.WORLD)
        except ValueError as error:
            assert "targets[1]" in str(error)
        else:
            raise AssertionError("a target outside the vocabulary was accepted")
    assert not calls


def check_context_parallel(rank: int, world_size: int, case: dict, message: str) -> None:
    """Credit of sharded tokens is bit-equal to that of whole rollouts for any split, an empty shard included, with one
    collective."""
    generator = torch.Generator().manual_seed(case["seed"])
    lengths = torch.tensor([5, 0, 1, 17, 8])
    total = int(lengths.sum())
    entropy, delta = torch.rand(total, generator=generator) * 3, torch.randn(total, generator=generator)
    delta[4] = -math.inf
    settings = dict(beta=0.3, scale_floor=0.2, entropy_floor=1.5)
    whole = direction_adaptive_credit(entropy, delta, lengths, **settings)
    owners = (
        torch.arange(total) % world_size,
        torch.randint(0, world_size, (total,), generator=generator),
        torch.zeros(total).long(),
    )
    for owner in owners:
        positions = (owner == rank).nonzero()[:, 0]
        positions = positions[torch.randperm(len(positions))]
        with counted() as calls:
            credit = context_parallel_credit(
                entropy[positions], delta[positions], lengths, positions, group=dist.group.WORLD, **settings
            )
        assert calls == Counter({"all_reduce": 1} if world_size > 1 else {}), calls
        for name in ("omega", "delta_bar", "advantage_term"):
            assert torch.equal(getattr(credit, name), getattr(whole, name)[positions]), f"{message}: {name}"
        assert torch.equal(credit.tau, whole.tau) and torch.equal(credit.sigma, whole.sigma), message
    # One rank's mistake is refused by all of them.
    positions = (owners[0] == rank).nonzero()[:, 0]
    if rank == 0:
        positions[0] = total
    try:
        gather_packed_tokens(torch.zeros(1, len(positions)), positions, total, dist.group.WORLD)
    except ValueError as error:
        assert "place 0 is held 0 times" in str(error), error
    else:
        raise AssertionError("positions that do not cover the pack were accepted")
