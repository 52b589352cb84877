"""Key-value cache and running batch of the embedded server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from dasd_megatron.rollout.embedded.requests import Row

PREFILL_TOKENS = 16384
"""Most tokens, padding included, of one forward pass over prompts; bounds its activations."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with spare columns.

    A decoding step then writes one column and copies nothing. ``keys`` and ``values`` are views
    [B, heads, length, head_dim] of the filled part.
    """

    keys: torch.Tensor
    values: torch.Tensor
    buffers: tuple[torch.Tensor, ...]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new columns; return those of all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            self.replace(key_states, value_states)
            return key_states, value_states
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if new > self.buffers[0].shape[-2]:
            columns = new + max(32, new // 4)
            self.buffers = tuple(_with_columns(states, old, columns) for states in self.buffers)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over keys and values of another batch or length."""
        self.keys, self.values = keys, values
        self.buffers = (keys, values)


def _with_columns(states: torch.Tensor, filled: int, columns: int) -> torch.Tensor:
    """Copy the first ``filled`` columns of [..., length, head_dim] into a buffer of ``columns`` columns."""
    buffer = states.new_empty(*states.shape[:-2], columns, states.shape[-1])
    buffer[..., :filled, :] = states[..., :filled, :]
    return buffer


class GrowingCache(DynamicCache):
    """An empty cache of full-length layers, even for sliding-window models.

    The attention mask still limits the window, and rows of unequal age can be merged.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.growing_layers = [GrowingLayer() for _ in range(num_layers)]
        self.layers = [*self.growing_layers]


class DecodingBatch:
    """Left-padded sequences that are decoded together.

    rows: B sequences, some of them finished (:meth:`compact` drops these); cache: keys and values, ``length`` columns;
    mask: [B, length] int64, 0 on padding; next_ids: [B] int64, drawn but not yet fed; positions: [B] int64, where
    next_ids stand in their own sequences.
    """

    def __init__(self, rows: list[Row], cache: GrowingCache, mask: torch.Tensor, positions: torch.Tensor):
        self.rows = rows
        self.cache = cache
        self.mask = mask
        self.positions = positions
        self.next_ids = torch.zeros(len(rows), dtype=torch.int64, device=mask.device)
        self._read_params()

    def _read_params(self) -> None:
        params = [row.params for row in self.rows]
        device = self.mask.device
        self.temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
        self.top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self.top_k = torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device)
        self.seeds = np.array([p.seed for p in params], dtype=np.int64)
        self.longest_minimum = max((p.min_new_tokens for p in params), default=0)

    def compact(self) -> bool:
        """Drop finished rows once they are an eighth of the batch, and columns that are then all padding.

        Returns False when no row remains.
        """
        keep = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if not keep:
            return False
        if 8 * (len(self.rows) - len(keep)) < len(self.rows):
            return True
        index = torch.tensor(keep, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).nonzero()[0])
        self.mask = mask[:, start:]
        for layer in self.cache.growing_layers:
            layer.replace(layer.keys[index, :, start:], layer.values[index, :, start:])
        self.positions, self.next_ids = self.positions[index], self.next_ids[index]
        self.rows = [self.rows[i] for i in keep]
        self._read_params()
        return True

    def join(self, other: DecodingBatch) -> None:
        """Append another batch's rows; the shorter cache is padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def pad(t: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - t.shape[dim]
            return t if missing == 0 else torch.nn.functional.pad(t, (0, 0, missing, 0) if dim == -2 else (missing, 0))

        # All is computed before anything is changed. Where memory runs out, this batch stays as it was.
        layers = [
            [torch.cat([pad(a, -2), pad(b, -2)]) for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))]
            for mine, theirs in zip(self.cache.growing_layers, other.cache.growing_layers, strict=True)
        ]
        mask = torch.cat([pad(self.mask, -1), pad(other.mask, -1)])
        positions = torch.cat([self.positions, other.positions])
        next_ids = torch.cat([self.next_ids, other.next_ids])
        for layer, (keys, values) in zip(self.cache.growing_layers, layers, strict=True):
            layer.replace(keys, values)
        self.mask, self.positions, self.next_ids = mask, positions, next_ids
        self.rows = self.rows + other.rows
        self._read_params()


def prefill_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows into neighbours whose distinct prompts, padded to the longest, make at most PREFILL_TOKENS tokens."""
    groups: list[list[Row]] = []
    distinct: set[tuple[int, ...]] = set()
    longest = 0
    for row in rows:
        prompt = tuple(row.prompt)
        if not groups or (
            len(distinct | {prompt}) * max(longest, len(prompt)) > PREFILL_TOKENS and prompt not in distinct
        ):
            groups.append([])
            distinct, longest = set(), 0
        groups[-1].append(row)
        distinct.add(prompt)
        longest = max(longest, len(prompt))
    return groups


def pad_left(
    sequences: Sequence[Sequence[int]], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both [B, length] int64 on ``device``, of sequences of at most ``length`` tokens; 0 on
    padding."""
    # They are filled on the host: on a GPU each row would be a copy of its own.
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, length - len(sequence) :] = sequence
        mask[i, length - len(sequence) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its own sequence, [B, length] int64; 0 on padding."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def record_prompt_log_probs(row: Row, logits: torch.Tensor, first: int) -> None:
    """Record raw log-probs of the prompt's tokens from ``logprob_start`` on; the first has none (SGLang's rule).

    logits: [positions, V], those of the prompt from position ``first`` on. Parts of a prompt come in order.
    """
    start, end = max(row.logprob_start, first), min(first + len(logits), len(row.prompt) - 1)
    if row.logprob_start < len(row.prompt) and not row.input_log_probs:
        row.input_log_probs = [None]
        row.input_top = [None] if row.top_logprobs else []
    if start >= end:
        return
    log_probs = torch.log_softmax(logits[start - first : end - first].double(), dim=-1)
    targets = torch.tensor(row.prompt[start + 1 : end + 1], dtype=torch.int64, device=logits.device)
    row.input_log_probs += log_probs.gather(-1, targets[:, None])[:, 0].tolist()
    if row.top_logprobs:
        values, ids = (t.tolist() for t in log_probs.topk(row.top_logprobs))
        row.input_top += [list(zip(v, i, strict=True)) for v, i in zip(values, ids, strict=True)]
