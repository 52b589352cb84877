"""Division of sequences into replicas and micro-batches, padded and sorted by length or packed end to end, with the way
back to response tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from dasd_megatron import backend
from dasd_megatron.config import BatchConfig, ParallelConfig, PrecisionConfig
from dasd_megatron.samples import Sample

FP8_TOKEN_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""For each ``precision.fp8``, the number that divides the tokens in each rank's matrix products: the size of the blocks
that share a scale, or of the tensor cores' tiles."""


Tokens = Sequence[int] | np.ndarray
"""Token ids of a sequence, or its mask."""


@dataclass(frozen=True)
class BatchLayout:
    """The division of sequences into micro-batches, which the configuration and the parallel layout ask for.

    Attributes:
        micro_batch_size: most sequences of one micro-batch.
        micro_batch_tokens: most tokens of one micro-batch, padding included; None for no bound.
        packing: sequences stand end to end in one row, and are not padded to one length.
        pad_multiple: every rank's number of tokens is a multiple of it, times the context-parallel ranks' parts; a
            multiple of twice the number of context-parallel ranks, and of more under sequence parallelism.
        count_multiple: the number of micro-batches is a multiple of it.
        same_count: from the number of micro-batches that this replica needs to the one that all replicas take, of which
            none has fewer sequences; a collective where there are several. None: this replica's own.
        context_parallel_rank, context_parallel_size: this rank among those that share each sequence. Of a sequence cut
            into twice that many parts, rank r holds parts r and 2 size - 1 - r, so that under a causal mask all have
            as much to do.
        device: where the tensors go.
    """

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    packing: bool = False
    pad_multiple: int = 1
    count_multiple: int = 1
    same_count: Callable[[int], int] | None = None
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of_this_rank(cls, batch: BatchConfig, parallel: ParallelConfig, precision: PrecisionConfig) -> BatchLayout:
        """Return the layout of a run's training batches. Needs the parallel state initialised."""
        # Megatron-Core takes seconds to import, and the rest of this module does without it.
        from megatron.core import parallel_state

        from dasd_megatron.training.parallel import largest_of_replicas

        # Sequence parallelism divides what a context-parallel rank holds, which is two parts of every sequence.
        parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        parts *= 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        return cls(
            micro_batch_size=batch.micro_batch_size,
            micro_batch_tokens=batch.micro_batch_tokens,
            packing=batch.packing,
            pad_multiple=parts * FP8_TOKEN_MULTIPLE[precision.fp8],
            # Megatron's interleaved schedule works through micro-batches in rounds of one per pipeline stage.
            count_multiple=parallel.pipeline_model_parallel_size if interleaved else 1,
            same_count=largest_of_replicas,
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            context_parallel_size=parallel.context_parallel_size,
            device=backend.current().device(),
        )

    @property
    def sequence_multiple(self) -> int:
        """The multiple that each sequence's width is rounded up to. In a pack each sequence is cut into the parts of
        the context-parallel ranks by itself, and only the whole pack is filled up to ``pad_multiple``."""
        if not self.packing:
            return self.pad_multiple
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1


@dataclass(slots=True)
class MicroBatch:
    """One forward pass: B sequences padded to S tokens, or packed into one row (B = 1) one behind the other.

    Under context parallelism S counts this rank's tokens alone, and so does what follows. R is the number of response
    tokens, without the masked ones.

    Attributes:
        tokens: [B, S] int64; padding is 0 and stands only after a sequence's last token, where a causal mask hides it,
            or in a sequence of its own at the end of a pack.
        position_ids: [B, S] int64, counted from the begin of each sequence.
        rows, columns: [R] int64; the logits at ``[rows[i], columns[i]]`` predict response token i.
        targets: [R] int64, the response tokens.
        packed_index: [R] int64, place of each response token among all response tokens of the batch (again without the
            masked ones), in the callers' order of sequences.
        starts: int32 [sequences + 1], where each sequence of a pack begins and the last one ends, padding included and
            over all context-parallel ranks; None without packing.
        longest: tokens of the longest sequence of a pack, padding included.
        least_target, largest_target: of ``targets`` over all context-parallel ranks, known without asking the device;
            0 and -1 where there are none.
        sequences: int64, places of the sequences among the callers', in the order of their response tokens.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    packed_index: torch.Tensor
    starts: torch.Tensor | None = None
    longest: int = 0
    least_target: int = 0
    largest_target: int = -1
    sequences: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def balanced_shares(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Deal items to ``shares`` of equal count and nearly equal total length; returns each share's indices in ascending
    order.

    The items are dealt in rounds, the longest first. In each round the longer items go to the shares that have less so
    far. The totals then differ by no more than two items of one round do, and so by less than the longest item.

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
    """The samples that one data-parallel replica trains on in a step."""

    samples: list[Sample]
    """Minibatch after minibatch."""
    places: list[int]
    """Place of each sample among all of the step, which are in order of (group, sample)."""
    rewards: list[float]
    """Rewards of all samples of the step: an advantage needs those of its group, which may be on other replicas."""


def replica_shares(samples: list[Sample], *, replicas: int, minibatches: int) -> list[ReplicaShare]:
    """Deal a step's samples to the data-parallel replicas, so that in every minibatch all have equally many of them and
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
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    layout: BatchLayout,
    *,
    response_mask: Sequence[Tokens | None] | None = None,
) -> list[MicroBatch]:
    """Cut ``prompts[i] + responses[i]`` into micro-batches, those with the longest sequences first, so that a batch
    which does not fit in memory fails at once.

    A micro-batch holds at most ``micro_batch_size`` sequences and ``micro_batch_tokens`` tokens, padding included, but
    at least one sequence. Without ``packing`` it is made of neighbours in length and padded to its own longest
    sequence, rounded up to ``pad_multiple``. With ``packing``, the longest sequences go to as many micro-batches and
    the others to those with the fewest tokens, so that all hold nearly equally many. The pack is filled up to
    ``pad_multiple`` with a sequence of padding, which the bound does not count.

    The number of micro-batches is a multiple of ``count_multiple``, for which there must be at least as many sequences,
    and at least what ``same_count`` makes of what this replica needs. Where there are too few sequences to round it up,
    it is rounded down and micro-batches exceed the bounds.

    Args:
        prompts, responses: token ids, as arrays or lists.
        layout: the names above, of which :class:`BatchLayout` says more.
        response_mask: for each response None, or 1 for the tokens that the policy sampled and 0 for others, like a
            tool's answer. Others are inputs to what follows them, as the prompt is, and no response tokens.

    Collectives: what ``layout.same_count`` does, one all-reduce in a run with several replicas.

    Raises:
        ValueError: a mask is of another length than its response.
    """
    # The sort is stable, so that sequences of one length keep the callers' order.
    sequences = sorted(_sequences(prompts, responses, response_mask), key=lambda sequence: -len(sequence.inputs))
    multiple = layout.sequence_multiple
    widths = [-(-max(len(sequence.inputs), 1) // multiple) * multiple for sequence in sequences]
    return [
        _micro_batch([sequences[place] for place in group], [widths[place] for place in group], layout)
        for group in _cut(widths, layout)
    ]


def batch_samples(samples: Sequence[Sample], prompts: Sequence[Tokens], layout: BatchLayout) -> list[MicroBatch]:
    """Cut the responses of ``samples`` behind ``prompts``, which are the student's or the teacher's, into
    micro-batches; see :func:`make_micro_batches`."""
    responses = [sample.response_ids for sample in samples]
    return make_micro_batches(prompts, responses, layout, response_mask=[sample.response_mask for sample in samples])


class _Sequence(NamedTuple):
    """A prompt with its response. R is the number of its response tokens, without the masked ones.

    ``place``: its place among the callers' sequences; ``inputs``: all tokens but the last, which predicts nothing;
    ``predictors``: [R], places in ``inputs`` whose logits predict the response tokens; ``targets``: [R], these tokens;
    ``packed_index``: [R], see :class:`MicroBatch`.
    """

    place: int
    inputs: np.ndarray
    predictors: np.ndarray
    targets: np.ndarray
    packed_index: np.ndarray


def _sequences(
    prompts: Sequence[Tokens], responses: Sequence[Tokens], response_mask: Sequence[Tokens | None] | None
) -> list[_Sequence]:
    masks = [None] * len(responses) if response_mask is None else response_mask
    sequences: list[_Sequence] = []
    end = 0
    for prompt, response, mask in zip(prompts, responses, masks, strict=True):
        places = _sampled_places(response, mask)
        begin, end = end, end + len(places)
        sequences.append(
            _Sequence(
                place=len(sequences),
                inputs=np.concatenate([np.asarray(part, dtype=np.int32) for part in (prompt, response)])[:-1],
                predictors=places + len(prompt) - 1,
                targets=np.asarray(response, dtype=np.int64)[places],
                packed_index=np.arange(begin, end),
            )
        )
    return sequences


def _sampled_places(response: Tokens, mask: Tokens | None) -> np.ndarray:
    """Return the places of the tokens in ``response`` that the policy sampled."""
    if mask is None:
        return np.arange(len(response))
    if len(mask) != len(response):
        raise ValueError(f"a response of {len(response)} tokens has a mask of {len(mask)}")
    return np.flatnonzero(mask)


def _micro_batch(sequences: list[_Sequence], widths: list[int], layout: BatchLayout) -> MicroBatch:
    """Make one forward pass of ``sequences``, whose padded widths are ``widths``, the widest first."""
    if layout.packing:
        grid = _lay_end_to_end(sequences, widths, layout.pad_multiple)
    else:
        grid = _pad_to_width(sequences, widths[0])
    own = sequence_parts(grid.sizes, layout.context_parallel_rank, layout.context_parallel_size)
    # Each column of the grid gets its place on this rank, -1 where another context-parallel rank holds it.
    local = np.full(grid.tokens.shape[1], -1)
    local[own] = np.arange(len(own))
    here = local[grid.columns] >= 0
    targets = np.concatenate([sequence.targets for sequence in sequences])
    packed_index = np.concatenate([sequence.packed_index for sequence in sequences])

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(layout.device)

    return MicroBatch(
        tokens=on_device(grid.tokens[:, own]),
        position_ids=torch.from_numpy(grid.positions[own]).expand(len(grid.tokens), -1).to(layout.device),
        rows=on_device(grid.rows[here]),
        columns=on_device(local[grid.columns[here]]),
        targets=on_device(targets[here]),
        packed_index=on_device(packed_index[here]),
        starts=None if grid.starts is None else on_device(grid.starts.astype(np.int32)),
        longest=max(grid.sizes),
        least_target=int(targets.min()) if targets.size else 0,
        largest_target=int(targets.max(initial=-1)),
        sequences=on_device(np.array([sequence.place for sequence in sequences], dtype=np.int64)),
    )


class _Grid(NamedTuple):
    """The tokens of a micro-batch over all context-parallel ranks: ``tokens`` [B, S], ``positions`` [S], and ``rows``
    and ``columns`` [R] of what predicts its response tokens, sequence after sequence. ``sizes``: the widths of the
    sequences in one row; ``starts``: see :class:`MicroBatch`."""

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    sizes: list[int]
    starts: np.ndarray | None


def _pad_to_width(sequences: list[_Sequence], width: int) -> _Grid:
    tokens = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.inputs)] = sequence.inputs
    rows = np.repeat(np.arange(len(sequences)), [len(sequence.predictors) for sequence in sequences])
    columns = np.concatenate([sequence.predictors for sequence in sequences])
    return _Grid(tokens, np.arange(width), rows, columns, [width], None)


def _lay_end_to_end(sequences: list[_Sequence], widths: list[int], pad_multiple: int) -> _Grid:
    filling = -sum(widths) % pad_multiple
    sizes = [*widths, filling] if filling else widths
    starts = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.zeros((1, starts[-1]), dtype=np.int64)
    for sequence, start in zip(sequences, starts, strict=False):
        tokens[0, start : start + len(sequence.inputs)] = sequence.inputs
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    columns = np.concatenate([sequence.predictors + start for sequence, start in zip(sequences, starts, strict=False)])
    return _Grid(tokens, positions, np.zeros_like(columns), columns, sizes, starts)


def _cut(widths: list[int], layout: BatchLayout) -> Sequence[Sequence[int]]:
    """Divide sequences of these padded widths, the widest first, into micro-batches as ``layout`` asks; returns each
    one's places in ``widths``."""
    cut = _cut_packs if layout.packing else _cut_neighbours
    groups = cut(widths, layout.micro_batch_size, layout.micro_batch_tokens)
    count = len(groups) if layout.same_count is None else layout.same_count(len(groups))
    multiple = layout.count_multiple
    count = min(-(-count // multiple), len(widths) // multiple) * multiple
    if count != len(groups):
        groups = cut(widths, layout.micro_batch_size, layout.micro_batch_tokens, count)
    return groups


def sequence_parts(sizes: Sequence[int], rank: int, size: int) -> np.ndarray:
    """Return the places of a row that context-parallel ``rank`` of ``size`` holds.

    In the row sequences of ``sizes`` tokens, each a multiple of ``2 * size``, stand one behind the other. Of every
    sequence cut into that many parts the rank holds the parts ``rank`` and ``2 * size - 1 - rank``.
    """
    if size == 1:
        return np.arange(sum(sizes))
    places, start = [], 0
    for width in sizes:
        part = width // (2 * size)
        places += [np.arange(start + index * part, start + (index + 1) * part) for index in (rank, 2 * size - 1 - rank)]
        start += width
    return np.concatenate(places)


def _cut_neighbours(
    widths: list[int], micro_batch_size: int, micro_batch_tokens: int | None, count: int | None = None
) -> list[range]:
    """Make micro-batches of neighbours among sequences of these padded widths, the widest first: as few as the bounds
    allow, or ``count``."""
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
        # The one with the most tokens among those that can be halved is halved.
        begin, end = max(
            itertools.pairwise(bounds), key=lambda pair: (pair[1] - pair[0] > 1, (pair[1] - pair[0]) * widths[pair[0]])
        )
        bounds = sorted([*bounds, (begin + end) // 2])
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def _cut_packs(
    widths: list[int], micro_batch_size: int, micro_batch_tokens: int | None, count: int | None = None
) -> list[list[int]]:
    """Make packs of sequences of these widths, the widest first, with nearly equal totals: as few as the bounds allow,
    or ``count``."""
    total = len(widths)
    least = -(-total // micro_batch_size)
    if micro_batch_tokens is not None:
        least = max(least, -(-sum(widths) // micro_batch_tokens))
    for tried in range(min(least, total), total + 1) if count is None else [count]:
        # Places of no length make the number of sequences divisible, and are left out again.
        shares = balanced_shares([*widths, *[0] * (-total % tried)], tried)
        packs = [[place for place in share if place < total] for share in shares]
        if micro_batch_tokens is None or all(
            len(pack) == 1 or sum(widths[place] for place in pack) <= micro_batch_tokens for pack in packs
        ):
            break
    return sorted(packs, key=lambda pack: -sum(widths[place] for place in pack))
