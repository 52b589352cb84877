"""The served model at work: it reads prompts into a batch and draws tokens for rows. It knows no queue and no lock."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dasd_megatron.rollout.embedded.batch import (
    PREFILL_TOKENS,
    DecodingBatch,
    GrowingCache,
    pad_left,
    positions_of,
    prefill_groups,
    record_prompt_log_probs,
)
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError, message_in_one_line
from dasd_megatron.rollout.embedded.requests import Row
from dasd_megatron.rollout.embedded.sampling import counter_uniforms, sample_tokens

MAX_PROMPT_LOGITS = 1 << 26
"""Most logits of one forward pass over prompts whose log-probs are wanted."""

# All modules of the embedded server log under the name of its entry point.
logger = logging.getLogger("dasd_megatron.rollout.server")

Ending = tuple[Row, dict[str, Any]]
"""A row that is finished, and its finish reason."""


class Reading(NamedTuple):
    """Rows whose prompts were read: the batch of them, None where no prompt could be read, and the rows that ended."""

    batch: DecodingBatch | None
    endings: list[Ending]


class Decoder:
    """A model with its tokenizer. ``model`` may be replaced by one of the same architecture and dtype between calls.

    Raises ModelDirectoryError, which names ``model_path``, where the model does not keep its state in our cache.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context_length: int, model_path: str
    ):
        self.model = model
        self.tokenizer = tokenizer
        self._context_length = context_length
        self._num_layers = model.config.get_text_config().num_hidden_layers
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache_token_bytes = self._measure_cache(model_path)
        """Bytes of one token's keys and values."""

    @torch.inference_mode()
    def _measure_cache(self, model_path: str) -> int:
        """Run one token through the model: its keys and values must land in our cache. Return their bytes.

        Batched decoding would be silently wrong otherwise. Raises ModelDirectoryError.
        """
        cache = GrowingCache(self._num_layers)
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        try:
            self._forward(token, torch.ones_like(token), torch.zeros_like(token), cache, last_only=True)
        except Exception as error:  # whatever the architecture trips over
            raise ModelDirectoryError(
                f"the embedded server cannot run {model_path}: {type(error).__name__}: {message_in_one_line(error)}"
            ) from error
        if not all(layer.is_initialized and layer.keys.shape[-2] == 1 for layer in cache.growing_layers):
            raise ModelDirectoryError(
                f"{model_path} is not a pure attention model: it does not keep its state in a key/value cache. "
                "Serve it with SGLang."
            )
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.growing_layers)

    def read_prompts(self, rows: Sequence[Row]) -> Reading:
        """Read the rows' prompts, each distinct one once, and draw the first tokens.

        A request whose prompts cannot be read ends alone.
        """
        return self._read_each(prefill_groups(rows))

    def _read_each(self, groups: Iterable[list[Row]]) -> Reading:
        """Read one group after another into a batch."""
        batch: DecodingBatch | None = None
        endings: list[Ending] = []
        for group in groups:
            reading = self._read_apart(group)
            endings += reading.endings
            if batch is None or reading.batch is None:
                batch = batch or reading.batch
            else:
                batch.join(reading.batch)
        return Reading(batch, endings)

    def _read_apart(self, rows: list[Row]) -> Reading:
        """Read a group. Where that fails, read it request by request to find out whose fault it is."""
        try:
            return self._read_group(rows)
        # A model or a tokenizer can fail in any way, and the other requests of the group are not to blame.
        except Exception as error:
            requests = {id(row.request): row.request for row in rows}
            if len(requests) == 1:
                logger.exception("prompts cannot be read")
                message = f"decoding failed: {type(error).__name__}: {message_in_one_line(error)}"
                return Reading(None, [(row, internal_error(message)) for row in rows])
        return self._read_each([row for row in rows if row.request is request] for request in requests.values())

    def _read_group(self, rows: list[Row]) -> Reading:
        distinct = list(dict.fromkeys(tuple(row.prompt) for row in rows))
        index = {prompt: i for i, prompt in enumerate(distinct)}
        longest = max(map(len, distinct))
        ids, mask = pad_left(distinct, longest, self.model.device)
        positions = positions_of(mask)
        cache = GrowingCache(self._num_layers)
        select = torch.tensor([index[tuple(row.prompt)] for row in rows], device=ids.device)
        wants_prompt = any(row.logprob_start < len(row.prompt) for row in rows)
        for row in rows:
            row.input_log_probs, row.input_top = [], []
        # A group is read in one pass, unless one prompt alone or the logits of all tokens would take too much memory.
        columns = PREFILL_TOKENS // len(distinct)
        if wants_prompt:
            columns = min(
                columns, MAX_PROMPT_LOGITS // (len(distinct) * self.model.config.get_text_config().vocab_size)
            )
        columns = max(1, columns)
        for start in range(0, longest, columns):
            part = slice(start, min(start + columns, longest))
            logits = self._forward(
                ids[:, part], mask[:, : part.stop], positions[:, part], cache, last_only=not wants_prompt
            )
            for row, i in zip(rows, select.tolist(), strict=True) if wants_prompt else ():
                padding = longest - len(row.prompt)
                record_prompt_log_probs(row, logits[i, max(0, padding - start) :], max(0, start - padding))
        for layer in cache.growing_layers:
            layer.replace(layer.keys[select], layer.values[select])
        batch = DecodingBatch(rows, cache, mask[select], mask.sum(-1)[select])
        return Reading(batch, self.draw_tokens(batch, logits[select, -1]))

    def decode(self, batch: DecodingBatch) -> list[Ending]:
        """Draw one token of every row of a batch; return the rows that end with it."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        ids, positions = batch.next_ids[:, None], batch.positions[:, None]
        logits = self._forward(ids, batch.mask, positions, batch.cache, last_only=True)[:, -1]
        # Finished rows stay in the batch until they are dropped. They must not run off a learned position table.
        batch.positions = (batch.positions + 1).clamp_(max=self._context_length - 1)
        return self.draw_tokens(batch, logits)

    def recompute_cache(self, batch: DecodingBatch) -> None:
        """Compute the keys and values of what a batch has read and drawn under the weights that are served now."""
        length = batch.mask.shape[1]
        # The last token of each row is drawn, but not yet read.
        read = [[*row.prompt, *row.output_ids[:-1]][-length:] for row in batch.rows]
        ids, _ = pad_left(read, length, self.model.device)
        positions = positions_of(batch.mask)
        cache = GrowingCache(self._num_layers)
        columns = max(1, PREFILL_TOKENS // len(batch.rows))
        for start in range(0, length, columns):
            part = slice(start, min(start + columns, length))
            self._forward(ids[:, part], batch.mask[:, : part.stop], positions[:, part], cache, last_only=True)
        batch.cache = cache

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: GrowingCache, last_only: bool
    ) -> torch.Tensor:
        """Run [B, S] tokens at the end of the cache; returns logits [B, S, V], or [B, 1, V] with ``last_only``."""
        past = mask.shape[1] - input_ids.shape[1]
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            cache_position=torch.arange(past, mask.shape[1], device=mask.device),
            use_cache=True,
            **({"logits_to_keep": 1} if last_only and self._keeps_last_logits else {}),
        )
        return output.logits[:, -1:] if last_only else output.logits

    def draw_tokens(self, batch: DecodingBatch, logits: torch.Tensor) -> list[Ending]:
        """Draw the next token of every row from [B, V] logits and record it; return the rows that end with it."""
        if batch.longest_minimum:
            logits = _bar_stops(batch.rows, logits)
        # Drawn on the host, so that a seed gives the same uniforms whatever the device.
        uniforms = torch.from_numpy(counter_uniforms(batch.seeds, batch.positions.cpu().numpy())).to(logits.device)
        tokens, log_probs = sample_tokens(logits, batch.temperature, batch.top_k, batch.top_p, uniforms)
        batch.next_ids = tokens
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0].tolist()
        endings: list[Ending] = []
        for i, (row, token, log_prob) in enumerate(zip(batch.rows, tokens.tolist(), chosen, strict=True)):
            if row.finish_reason is not None:
                continue
            if not math.isfinite(log_prob):
                endings.append((row, internal_error("the model returned NaN logits")))
                continue
            if row.params.max_new_tokens > 0:
                row.output_ids.append(token)
                row.log_probs.append(log_prob)
                if row.top_logprobs:
                    values, ids = (t.tolist() for t in log_probs[i].topk(row.top_logprobs))
                    row.top.append(list(zip(values, ids, strict=True)))
            try:
                reason = self._finish_reason(row)
            # A tokenizer that fails on the tokens of one row must not end the others.
            except Exception as error:
                reason = internal_error(f"decoding failed: {type(error).__name__}: {message_in_one_line(error)}")
            if reason is not None:
                endings.append((row, reason))
        return endings

    def _finish_reason(self, row: Row) -> dict[str, Any] | None:
        """Return why a row is finished, or None; in SGLang's order of stop strings, stop tokens and length.

        ``ignore_eos`` also silences stop_token_ids.
        """
        params = row.params
        if row.output_ids:
            if params.stop:
                tail = self.tokenizer.decode(row.output_ids[-params.stop_tail :], skip_special_tokens=False)
                for stop in params.stop:
                    if stop in tail:
                        return {"type": "stop", "matched": stop}
            if not params.ignore_eos and row.output_ids[-1] in params.stop_ids:
                return {"type": "stop", "matched": row.output_ids[-1]}
        if len(row.output_ids) >= params.max_new_tokens:
            return {"type": "length", "length": params.max_new_tokens}
        return None


def internal_error(message: str) -> dict[str, Any]:
    """Return the finish reason of a row that was given up."""
    return {"type": "abort", "message": message, "status_code": 500, "err_type": "InternalServerError"}


def _bar_stops(rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
    """Return [B, V] logits without mass on the stop tokens of rows that have too few tokens."""
    logits = logits.clone()
    for i, row in enumerate(rows):
        if len(row.output_ids) < row.params.min_new_tokens:
            logits[i, [token for token in row.params.stop_ids if 0 <= token < logits.shape[-1]]] = -math.inf
    return logits
