"""Micro-batches hold every token once, where the caller can find it again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.training.batching import make_micro_batches

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.lists(st.integers(1, 99), min_size=1, max_size=9)),
    min_size=4,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 7), st.none() | st.integers(1, 60), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_every_response_token_has_its_inputs_and_its_place(
    sequences: list[tuple[list[int], list[int]]],
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    pad_multiple: int,
    count_multiple: int,
) -> None:
    prompts, responses = [one[0] for one in sequences], [one[1] for one in sequences]
    batches = make_micro_batches(
        prompts,
        responses,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        pad_multiple=pad_multiple,
        count_multiple=count_multiple,
        device=torch.device("cpu"),
    )
    assert len(batches) % count_multiple == 0
    assert sum(len(batch.tokens) for batch in batches) == len(sequences)
    packed = [token for response in responses for token in response]
    seen: list[int] = []
    context_of = []
    for prompt, response in sequences:
        context_of += [prompt + response[:place] for place in range(len(response))]
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
