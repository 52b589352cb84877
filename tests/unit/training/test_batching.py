"""Micro-batches hold every token once, where the caller can find it again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.training.batching import make_micro_batches

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=9)


def masks_of(response: list[int]) -> st.SearchStrategy[tuple[list[int], list[int] | None]]:
    """A response with None or a mask, which may leave nothing."""
    mask = st.lists(st.integers(0, 1), min_size=len(response), max_size=len(response))
    return st.tuples(st.just(response), st.none() | mask)


SEQUENCES = st.lists(st.tuples(TOKENS, TOKENS.flatmap(masks_of)), min_size=4, max_size=20)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.booleans(), st.integers(1, 7), st.none() | st.integers(1, 60), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_every_sampled_token_has_its_inputs_and_its_place(
    sequences: list[tuple[list[int], tuple[list[int], list[int] | None]]],
    masked: bool,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    pad_multiple: int,
    count_multiple: int,
) -> None:
    prompts, responses, masks = ([prompt for prompt, _ in sequences], *zip(*(one for _, one in sequences), strict=True))
    batches = make_micro_batches(
        prompts,
        responses,
        response_mask=masks if masked else None,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        pad_multiple=pad_multiple,
        count_multiple=count_multiple,
        device=torch.device("cpu"),
    )
    assert len(batches) % count_multiple == 0
    assert sum(len(batch.tokens) for batch in batches) == len(sequences)
    seen: list[int] = []
    packed, context_of = [], []
    for prompt, (response, mask) in sequences:
        for place, token in enumerate(response):
            if not masked or mask is None or mask[place]:
                packed.append(token)
                context_of.append(prompt + response[:place])
    for batch in batches:
        assert batch.tokens.shape[1] % pad_multiple == 0
        rounded_down = len(batches) + count_multiple > len(sequences)
        assert len(batch.tokens) <= micro_batch_size or rounded_down
        assert micro_batch_tokens is None or len(batch.tokens) == 1 or batch.tokens.numel() <= micro_batch_tokens or rounded_down
        assert torch.equal(batch.position_ids, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens))
        for row, column, target, index in zip(batch.rows, batch.columns, batch.targets, batch.packed_index, strict=True):
            assert packed[index] == target
            # All that a causal model sees at this place is exactly what came before the token.
            assert batch.tokens[row, : column + 1].tolist() == context_of[index]
            seen.append(index.item())
    assert sorted(seen) == list(range(len(packed)))


def test_longest_sequences_come_first_and_are_padded_little() -> None:
    prompts = [[1] * length for length in (2, 30, 3, 28)]
    batches = make_micro_batches(
        prompts, [[5]] * 4, micro_batch_size=2, micro_batch_tokens=None, pad_multiple=1, count_multiple=1, device=torch.device("cpu")
    )
    assert [batch.tokens.shape[1] for batch in batches] == [30, 3]


def test_one_long_sequence_does_not_take_others_along() -> None:
    prompts = [[1] * length for length in (100, 9, 8, 7, 6, 5)]
    batches = make_micro_batches(
        prompts, [[5]] * 6, micro_batch_size=4, micro_batch_tokens=40, pad_multiple=1, count_multiple=1, device=torch.device("cpu")
    )
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 100), (4, 9), (1, 5)]


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a response of 3 tokens has a mask of 2"):
        make_micro_batches(
            [[1], [1]], [[5], [5, 6, 7]], response_mask=[None, [1, 1]], micro_batch_size=2, micro_batch_tokens=None, pad_multiple=1,
            count_multiple=1, device=torch.device("cpu"),
        )  # fmt: skip
