"""Sequences to micro-batches: right-padded, sorted by length, with the way back to packed response tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class MicroBatch:
    """One forward pass. B sequences padded to S; R is the number of their response tokens, without the masked ones.

    Attributes:
        tokens: [B, S] int64; padding is 0 and stands only after the last token, where a causal mask hides it.
        position_ids: [B, S] int64.
        rows, columns: [R] int64; the logits at ``[rows[i], columns[i]]`` predict response token i.
        targets: [R] int64, the response tokens.
        packed_index: [R] int64, place of each response token among all response tokens of the batch (again without the masked ones), in the
            callers' order of sequences.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    packed_index: torch.Tensor


def make_micro_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    response_mask: Sequence[Sequence[int] | None] | None = None,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    pad_multiple: int,
    count_multiple: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Cut ``prompts[i] + responses[i]`` into micro-batches of neighbours in length, the longest first.

    The longest come first so that a batch which does not fit in memory fails at once. Each micro-batch is padded to its own longest
    sequence, rounded up to ``pad_multiple`` (what sequence parallelism and FP8 ask for), and holds at most ``micro_batch_size``
    sequences and ``micro_batch_tokens`` padded tokens, but at least one sequence. The number of micro-batches is a multiple of
    ``count_multiple``, for which there must be at least as many sequences; where there are too few to round the number up, it is rounded
    down and micro-batches exceed these bounds.

    ``response_mask`` has for each response None, or 1 for the tokens that the policy sampled and 0 for others, like a tool's answer: those
    are inputs to what follows them, as the prompt is, and no response tokens.

    Raises:
        ValueError: a mask is of another length than its response.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    masks = [None] * len(lengths) if response_mask is None else response_mask
    # Places of the sampled tokens in their response.
    places = [_sampled_places(response, mask) for response, mask in zip(responses, masks, strict=True)]
    ends = np.cumsum([len(one) for one in places])
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # The last response token predicts nothing, so it is a target but never an input.
    widths = [-(-max(lengths[index] - 1, 1) // pad_multiple) * pad_multiple for index in order]
    bounds = _cut(widths, micro_batch_size, micro_batch_tokens, count_multiple)
    batches = []
    for begin, end in itertools.pairwise(bounds):
        members = order[begin:end]
        tokens = np.zeros((len(members), widths[begin]), dtype=np.int64)
        for row, index in enumerate(members):
            sequence = [*prompts[index], *responses[index]][:-1]
            tokens[row, : len(sequence)] = sequence
        counts = np.array([len(places[index]) for index in members])
        rows = np.repeat(np.arange(len(members)), counts)
        columns = np.concatenate([places[index] for index in members]) + np.repeat([len(prompts[index]) - 1 for index in members], counts)
        targets = np.concatenate([np.asarray(responses[index], dtype=np.int64)[places[index]] for index in members])
        # Where the sequence ends among all tokens, less where it ends among those of this micro-batch.
        packed_index = np.arange(counts.sum()) + np.repeat(ends[members] - counts.cumsum(), counts)
        batches.append(
            MicroBatch(
                torch.from_numpy(tokens).to(device),
                torch.arange(tokens.shape[1]).expand(len(members), -1).to(device),
                *(torch.from_numpy(part).to(device) for part in (rows, columns, targets, packed_index)),
            )
        )
    return batches


def _sampled_places(response: Sequence[int], mask: Sequence[int] | None) -> np.ndarray:
    if mask is None:
        return np.arange(len(response))
    if len(mask) != len(response):
        raise ValueError(f"a response of {len(response)} tokens has a mask of {len(mask)}")
    return np.flatnonzero(mask)


def _cut(widths: list[int], micro_batch_size: int, micro_batch_tokens: int | None, count_multiple: int) -> list[int]:
    """Where micro-batches of sequences with these padded widths, the widest first, begin and end."""
    total = len(widths)
    bounds = [0]
    while bounds[-1] < total:
        begin = bounds[-1]
        size = micro_batch_size if micro_batch_tokens is None else min(micro_batch_size, max(micro_batch_tokens // widths[begin], 1))
        bounds.append(min(begin + size, total))
    count = min(-(-(len(bounds) - 1) // count_multiple), total // count_multiple) * count_multiple
    if count < len(bounds) - 1:
        return [total * index // count for index in range(count + 1)]
    while len(bounds) - 1 < count:
        # Halve the one with the most tokens that can be halved.
        begin, end = max(itertools.pairwise(bounds), key=lambda pair: (pair[1] - pair[0] > 1, (pair[1] - pair[0]) * widths[pair[0]]))
        bounds = sorted([*bounds, (begin + end) // 2])
    return bounds
