"""Micro-batches hold every token once, where the caller can find it again."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import (
    BatchLayout,
    MicroBatch,
    balanced_shares,
    make_micro_batches,
    replica_shares,
    sequence_parts,
)

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=9)


def masks_of(response: list[int]) -> st.SearchStrategy[tuple[list[int], list[int] | None]]:
    """A response with None or a mask, which may leave nothing."""
    mask = st.lists(st.integers(0, 1), min_size=len(response), max_size=len(response))
    return st.tuples(st.just(response), st.none() | mask)


SEQUENCES = st.lists(st.tuples(TOKENS, TOKENS.flatmap(masks_of)), min_size=4, max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    SEQUENCES,
    st.booleans(),
    st.booleans(),
    st.integers(1, 7),
    st.none() | st.integers(1, 60),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_every_sampled_token_has_its_inputs_and_its_place(
    sequences: list[tuple[list[int], tuple[list[int], list[int] | None]]],
    packing: bool,
    masked: bool,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    pad_multiple: int,
    count_multiple: int,
    more: int,
) -> None:
    prompts, responses, masks = (
        [prompt for prompt, _ in sequences],
        *zip(*(pair for _, pair in sequences), strict=True),
    )
    needed: list[int] = []

    def same_count(count: int) -> int:
        needed.append(count)
        return min(count + more, len(sequences))

    batches = make_micro_batches(
        prompts,
        responses,
        BatchLayout(
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            pad_multiple=pad_multiple,
            count_multiple=count_multiple,
            packing=packing,
            same_count=same_count,
        ),
        response_mask=masks if masked else None,
    )
    asked = min(needed[0] + more, len(sequences))
    assert len(batches) == min(-(-asked // count_multiple), len(sequences) // count_multiple) * count_multiple
    seen: list[int] = []
    packed, context_of, widths = [], [], []
    for prompt, (response, mask) in sequences:
        for place, token in enumerate(response):
            if not masked or mask is None or mask[place]:
                packed.append(token)
                context_of.append(prompt + response[:place])
    for batch in batches:
        assert batch.tokens.shape[1] % pad_multiple == 0
        rounded_down = len(batches) < asked
        widths.append(sequences_of(batch))
        size, used = len(widths[-1]), sum(widths[-1]) if packing else batch.tokens.numel()
        assert size <= micro_batch_size or rounded_down
        assert micro_batch_tokens is None or size == 1 or used <= micro_batch_tokens or rounded_down
        for row, column, target, index in zip(
            batch.rows, batch.columns, batch.targets, batch.packed_index, strict=True
        ):
            assert packed[index] == target
            # All that a causal model sees at this place, from where its positions begin, is exactly what came before
            # the token.
            position = int(batch.position_ids[row, column])
            assert batch.tokens[row, column - position : column + 1].tolist() == context_of[index]
            assert not packing or int(column) - position in batch.starts.tolist()
            seen.append(index.item())
    assert sorted(seen) == list(range(len(packed)))
    assert sum(map(len, widths)) == len(sequences)
    if packing:
        assert max(map(sum, widths)) - min(map(sum, widths)) <= max(map(max, widths))


def sequences_of(batch: MicroBatch) -> list[int]:
    """Tokens of each sequence: padded ones, or in a pack those it has, without the filling at the end."""
    if batch.starts is None:
        return [batch.tokens.shape[1]] * len(batch.tokens)
    assert batch.tokens.shape == (1, batch.starts[-1]) and batch.starts.dtype == torch.int32
    sizes = [end - start for start, end in itertools.pairwise(batch.starts.tolist())]
    assert batch.longest == max(sizes)
    # Tokens are above 0, so that what fills the pack up can be told from them.
    return [size for size, start in zip(sizes, batch.starts.tolist(), strict=False) if batch.tokens[0, start] != 0]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 12))
def test_shares_have_equal_counts_and_nearly_equal_totals(data: st.DataObject, shares: int, rounds: int) -> None:
    count = shares * rounds
    lengths = data.draw(st.lists(st.integers(1, 10_000), min_size=count, max_size=count))
    dealt = balanced_shares(lengths, shares)
    assert sorted(index for share in dealt for index in share) == list(range(count))
    assert {len(share) for share in dealt} == {rounds} and all(share == sorted(share) for share in dealt)
    totals = [sum(lengths[index] for index in share) for share in dealt]
    ordered = sorted(lengths, reverse=True)
    widest_round = max(ordered[first] - ordered[first + shares - 1] for first in range(0, count, shares))
    assert max(totals) - min(totals) <= widest_round
    assert balanced_shares(lengths, 1) == [list(range(count))]


def test_shares_that_do_not_come_out_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="5 sequences do not divide into 2 shares"):
        balanced_shares([1] * 5, 2)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_replicas_get_every_sample_of_a_minibatch_once(data: st.DataObject, minibatches: int, rounds: int) -> None:
    count = 4 * rounds * minibatches
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 500)), min_size=count, max_size=count))
    samples = [
        Sample(
            index // 4,
            index % 4,
            0,
            "p",
            "",
            "",
            "",
            [1] * prompt,
            [1] * response,
            [],
            "",
            "stop",
            [["v", 1]],
            float(index),
            None,
            False,
        )
        for index, (prompt, response) in enumerate(lengths)
    ]
    share = count // minibatches
    for replicas in (1, 2, 4):
        shares = replica_shares(samples, replicas=replicas, minibatches=minibatches)
        each = share // replicas
        for replica in shares:
            assert [samples[place] for place in replica.places] == replica.samples and replica.rewards == [
                sample.reward for sample in samples
            ]
        for minibatch in range(minibatches):
            mine = [replica.places[minibatch * each : (minibatch + 1) * each] for replica in shares]
            assert sorted(place for part in mine for place in part) == list(
                range(minibatch * share, (minibatch + 1) * share)
            )
            totals = [sum(sum(lengths[place]) for place in part) for part in mine]
            assert max(totals) - min(totals) < max(map(sum, lengths))
    assert replica_shares(samples, replicas=1, minibatches=minibatches)[0].places == list(range(count))


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.booleans(), st.sampled_from([2, 4]), st.sampled_from([1, 2]))
def test_context_parallel_ranks_share_every_token(
    sequences: list[tuple[list[int], tuple[list[int], list[int] | None]]],
    packing: bool,
    size: int,
    tensor_parallel: int,
) -> None:
    prompts, responses = [prompt for prompt, _ in sequences], [response for _, (response, _) in sequences]
    layouts = [
        BatchLayout(
            micro_batch_size=3,
            packing=packing,
            pad_multiple=2 * size * tensor_parallel,
            context_parallel_rank=rank,
            context_parallel_size=size,
        )
        for rank in range(size)
    ]
    ranks = [make_micro_batches(prompts, responses, layout) for layout in layouts]
    targets = [token for response in responses for token in response]
    pairs = list(zip(prompts, responses, strict=True))
    contexts = [prompt + response[:place] for prompt, response in pairs for place in range(len(response))]
    for shards in zip(*ranks, strict=True):
        assert len({shard.tokens.shape for shard in shards}) == 1 and shards[0].tokens.shape[1] % tensor_parallel == 0
        width = shards[0].tokens.shape[1] * size
        sizes = (
            [width] if not packing else [end - start for start, end in itertools.pairwise(shards[0].starts.tolist())]
        )
        assert sum(sizes) == width
        joined, positions = torch.zeros_like(shards[0].tokens).repeat(1, size), torch.zeros(width, dtype=torch.int64)
        places = [sequence_parts(sizes, rank, size) for rank in range(size)]
        assert sorted(int(place) for part in places for place in part) == list(range(width))
        for shard, part in zip(shards, places, strict=True):
            joined[:, part], positions[part] = shard.tokens, shard.position_ids[0]
        expected = [torch.arange(size) for size in sizes]
        assert torch.equal(positions, torch.cat(expected))
        for shard, part in zip(shards, places, strict=True):
            for row, column, target, index in zip(
                shard.rows, shard.columns, shard.targets, shard.packed_index, strict=True
            ):
                at = int(part[column])
                begin = at - int(positions[at])
                assert joined[row, begin : at + 1].tolist() == contexts[index] and target == targets[index]
    seen = sorted(int(index) for batches in ranks for batch in batches for index in batch.packed_index)
    assert seen == list(range(len(targets)))


def test_parts_of_a_sequence_pair_an_early_with_a_late_one() -> None:
    assert sequence_parts([8, 16], 0, 2).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert sequence_parts([8, 16], 1, 2).tolist() == [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19]
    assert sequence_parts([3, 4], 0, 1).tolist() == list(range(7))


def test_longest_sequences_come_first_and_are_padded_little() -> None:
    prompts = [[1] * length for length in (2, 30, 3, 28)]
    batches = make_micro_batches(prompts, [[5]] * 4, BatchLayout(micro_batch_size=2))
    assert [batch.tokens.shape[1] for batch in batches] == [30, 3]


def test_one_long_sequence_does_not_take_others_along() -> None:
    prompts = [[1] * length for length in (100, 9, 8, 7, 6, 5)]
    batches = make_micro_batches(prompts, [[5]] * 6, BatchLayout(micro_batch_size=4, micro_batch_tokens=40))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 100), (4, 9), (1, 5)]


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a response of 3 tokens has a mask of 2"):
        make_micro_batches([[1], [1]], [[5], [5, 6, 7]], BatchLayout(micro_batch_size=2), response_mask=[None, [1, 1]])
