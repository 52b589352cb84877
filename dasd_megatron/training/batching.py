"""Sequences to replicas and micro-batches, padded and sorted by length or packed end to end, with the way back to
response tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dasd_megatron.samples import Sample

FP8_TOKEN_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What the number of tokens in each rank's matrix products has to be a multiple of under each ``precision.fp8``: the
blocks that share a scale, or the tensor cores' tiles."""


@dataclass(slots=True)
class MicroBatch:
    """One forward pass: B sequences padded to S, or packed into one row (B = 1) one behind the other. Under context
    parallelism S counts this rank's tokens of them alone, and the rest speaks of those. R is the number of response
    tokens, without the masked ones.

    Attributes:
        tokens: [B, S] int64; padding is 0 and stands only after a sequence's last token, where a causal mask hides it,
            or in a sequence of its own at the end of a pack.
        position_ids: [B, S] int64, counted from each sequence's begin.
        rows, columns: [R] int64; the logits at ``[rows[i], columns[i]]`` predict response token i.
        targets: [R] int64, the response tokens.
        packed_index: [R] int64, place of each response token among all response tokens of the batch (again without the
            masked ones), in the callers' order of sequences.
        starts: where each sequence of a pack begins and the last one ends, padding included and over all
            context-parallel ranks,
            int32 [sequences + 1]; None without packing.
        longest: tokens of the longest sequence of a pack, padding included.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    packed_index: torch.Tensor
    starts: torch.Tensor | None = None
    longest: int = 0


def balanced_shares(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Deal items to ``shares`` of equal count and nearly equal total length; returns each share's indices in ascending
    order.

    The items go round by round, the longest first, in each round the longer to the share that has less so far. The
    totals then differ by no more than two items of one round do, and so by less than the longest item.

    Raises:
        ValueError: ``shares`` does not divide the number of items.
    """
    if len(lengths) % shares:
        raise ValueError(f"{len(lengths)} sequences do not divide into {shares} shares of equal count")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    members: list[list[int]] = [[] for _ in range(shares)]
    totals = [0] * shares
    for first in range(0, len(order), shares):
        emptiest = sorted(range(shares), key=totals.__getitem__)
        for share, index in zip(emptiest, order[first : first + shares], strict=True):
            members[share].append(index)
            totals[share] += lengths[index]
    return [sorted(share) for share in members]


class ReplicaShare(NamedTuple):
    """What one data-parallel replica trains on in a step."""

    samples: list[Sample]
    """Minibatch after minibatch."""
    places: list[int]
    """Of each sample among all of the step, which are in order of (group, sample)."""
    rewards: list[float]
    """Of all samples of the step: the advantage of one needs those of its group, which may be on other replicas."""


def replica_shares(samples: list[Sample], *, replicas: int, minibatches: int) -> list[ReplicaShare]:
    """Deal a step's samples to its data-parallel replicas, so that in every minibatch each has equally many of them and
    nearly the same number of tokens. A minibatch holds the same samples for any number of replicas."""
    share = len(samples) // minibatches
    places: list[list[int]] = [[] for _ in range(replicas)]
    for start in range(0, len(samples), share):
        lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples[start : start + share]]
        for mine, dealt in zip(places, balanced_shares(lengths, replicas), strict=True):
            mine += [start + place for place in dealt]
    rewards = [sample.reward for sample in samples]
    return [ReplicaShare([samples[place] for place in mine], mine, rewards) for mine in places]


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
    packing: bool = False,
    context_parallel: tuple[int, int] = (0, 1),
    same_count: Callable[[int], int] | None = None,
) -> list[MicroBatch]:
    """Cut ``prompts[i] + responses[i]`` into micro-batches, those with the longest sequences first, so that a batch
    which does not fit in memory fails at once.

    A micro-batch holds at most ``micro_batch_size`` sequences and ``micro_batch_tokens`` tokens, padding included, but
    at least one sequence. Without ``packing`` it is made of neighbours in length and padded to its own longest
    sequence, rounded up to
    ``pad_multiple``. With it, the longest sequences go to as many micro-batches and the others to those with the fewest
    tokens, so that all hold nearly equally many, and the pack is filled up to ``pad_multiple`` with a sequence of
    padding that the bound does not count.

    Their number is a multiple of ``count_multiple``, for which there must be at least as many sequences, and at least
    what ``same_count`` makes of what this replica needs; where there are too few sequences to round it up, it is
    rounded down and micro-batches exceed the bounds.

    Args:
        response_mask: for each response None, or 1 for the tokens that the policy sampled and 0 for others, like a
            tool's answer: those
            are inputs to what follows them, as the prompt is, and no response tokens.
        pad_multiple: a multiple of twice the number of context-parallel ranks, and of more under sequence parallelism.
        context_parallel: this rank among those that share each sequence, and their number. Of a sequence cut into twice
            that many parts, rank r holds parts r and 2 size - 1 - r: so all have as much to do under a causal mask.
        same_count: from the number of micro-batches that this replica needs to that which all replicas take, of which
            none has fewer sequences; a collective where there are several.

    Raises:
        ValueError: a mask is of another length than its response.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    masks = [None] * len(lengths) if response_mask is None else response_mask
    # Places of the sampled tokens in their response.
    places = [_sampled_places(response, mask) for response, mask in zip(responses, masks, strict=True)]
    ends = np.cumsum([len(one) for one in places])
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # In a pack each sequence is cut by itself, and only the whole is filled up for the tensor-parallel ranks.
    multiple = 2 * context_parallel[1] if packing and context_parallel[1] > 1 else 1 if packing else pad_multiple
    # The last response token predicts nothing, so it is a target but never an input.
    widths = [-(-max(lengths[index] - 1, 1) // multiple) * multiple for index in order]
    cut = _cut_packs if packing else _cut_neighbours
    groups = cut(widths, micro_batch_size, micro_batch_tokens)
    count = len(groups) if same_count is None else same_count(len(groups))
    count = min(-(-count // count_multiple), len(order) // count_multiple) * count_multiple
    if count != len(groups):
        groups = cut(widths, micro_batch_size, micro_batch_tokens, count)
    batches = []
    for group in groups:
        members = [order[place] for place in group]
        sizes = [widths[place] for place in group]
        counts = np.array([len(places[index]) for index in members])
        sequences = [[*prompts[index], *responses[index]][:-1] for index in members]
        # The place of each predicting token in its sequence.
        inside = np.concatenate([places[index] + len(prompts[index]) - 1 for index in members])
        owner = np.repeat(np.arange(len(members)), counts)
        targets = np.concatenate([np.asarray(responses[index], dtype=np.int64)[places[index]] for index in members])
        # Where the sequence ends among all tokens, less where it ends among those of this micro-batch.
        packed_index = np.arange(counts.sum()) + np.repeat(ends[members] - counts.cumsum(), counts)
        starts = None
        if packing:
            filling = -sum(sizes) % pad_multiple
            sizes += [filling] if filling else []
            starts = np.concatenate([[0], np.cumsum(sizes)])
            tokens = np.zeros((1, starts[-1]), dtype=np.int64)
            for sequence, start in zip(sequences, starts, strict=False):
                tokens[0, start : start + len(sequence)] = sequence
            positions = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
            rows, columns = np.zeros_like(owner), inside + starts[owner]
        else:
            tokens = np.zeros((len(members), sizes[0]), dtype=np.int64)
            for row, sequence in enumerate(sequences):
                tokens[row, : len(sequence)] = sequence
            positions = np.arange(sizes[0])
            rows, columns = owner, inside
        held = sequence_parts(sizes if packing else sizes[:1], *context_parallel)
        # Where each place of the row is on this rank.
        local = np.full(tokens.shape[1], -1)
        local[held] = np.arange(len(held))
        here = local[columns] >= 0
        arrays = (rows[here], local[columns[here]], targets[here], packed_index[here])
        batches.append(
            MicroBatch(
                torch.from_numpy(tokens[:, held]).to(device),
                torch.from_numpy(positions[held]).expand(len(tokens), -1).to(device),
                *(torch.from_numpy(part).to(device) for part in arrays),
                None if starts is None else torch.from_numpy(starts.astype(np.int32)).to(device),
                max(sizes),
            )
        )
    return batches


def sequence_parts(sizes: Sequence[int], rank: int, size: int) -> np.ndarray:
    """Places of a row that context-parallel ``rank`` of ``size`` holds, where sequences of ``sizes`` tokens stand one
    behind the other, each a multiple of ``2 * size``: of every sequence cut into that many parts the parts ``rank`` and
    ``2 * size - 1 - rank``."""
    if size == 1:
        return np.arange(sum(sizes))
    held, start = [], 0
    for width in sizes:
        part = width // (2 * size)
        held += [np.arange(start + index * part, start + (index + 1) * part) for index in (rank, 2 * size - 1 - rank)]
        start += width
    return np.concatenate(held)


def _sampled_places(response: Sequence[int], mask: Sequence[int] | None) -> np.ndarray:
    if mask is None:
        return np.arange(len(response))
    if len(mask) != len(response):
        raise ValueError(f"a response of {len(response)} tokens has a mask of {len(mask)}")
    return np.flatnonzero(mask)


def _cut_neighbours(
    widths: list[int], micro_batch_size: int, micro_batch_tokens: int | None, count: int | None = None
) -> list[range]:
    """Micro-batches of neighbours among sequences of these padded widths, the widest first: as few as the bounds allow,
    or ``count``."""
    total = len(widths)
    bounds = [0]
    while bounds[-1] < total:
        begin = bounds[-1]
        size = (
            micro_batch_size
            if micro_batch_tokens is None
            else min(micro_batch_size, max(micro_batch_tokens // widths[begin], 1))
        )
        bounds.append(min(begin + size, total))
    if count is not None and count < len(bounds) - 1:
        bounds = [total * index // count for index in range(count + 1)]
    while count is not None and len(bounds) - 1 < count:
        # Halve the one with the most tokens that can be halved.
        begin, end = max(
            itertools.pairwise(bounds), key=lambda pair: (pair[1] - pair[0] > 1, (pair[1] - pair[0]) * widths[pair[0]])
        )
        bounds = sorted([*bounds, (begin + end) // 2])
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def _cut_packs(
    widths: list[int], micro_batch_size: int, micro_batch_tokens: int | None, count: int | None = None
) -> list[list[int]]:
    """Packs of sequences of these widths, the widest first, with nearly equal totals: as few as the bounds allow, or
    ``count``."""
    total = len(widths)
    least = -(-total // micro_batch_size)
    if micro_batch_tokens is not None:
        least = max(least, -(-sum(widths) // micro_batch_tokens))
    for tried in range(min(least, total), total + 1) if count is None else [count]:
        # Sequences of no length fill up the last round.
        shares = balanced_shares([*widths, *[0] * (-total % tried)], tried)
        packs = [[place for place in share if place < total] for share in shares]
        if micro_batch_tokens is None or all(
            len(pack) == 1 or sum(widths[place] for place in pack) <= micro_batch_tokens for pack in packs
        ):
            break
    return sorted(packs, key=lambda pack: -sum(widths[place] for place in pack))
