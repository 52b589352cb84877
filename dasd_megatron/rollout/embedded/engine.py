"""Engine of the embedded server: a queue of jobs and the one thread that works on it. It knows nothing of HTTP."""

from __future__ import annotations

import copy
import ctypes
import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from dasd_megatron.rollout.embedded.batch import (
    DecodingBatch,
    GrowingCache,
    pad_left,
    positions_of,
    prefill_groups,
    record_prompt_log_probs,
)
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError, load_model, load_tokenizer, message_in_one_line
from dasd_megatron.rollout.embedded.requests import (
    GenerateJob,
    InvalidRequestError,
    Row,
    build_job,
    running_future,
)
from dasd_megatron.rollout.embedded.sampling import counter_uniforms, sample_tokens
from dasd_megatron.rollout.weight_checksum import cpu_checksum

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
CLOSING_MESSAGE = "The server is shutting down."

PauseMode = Literal["abort", "retract", "in_place"]

# All modules of the embedded server log under the name of its entry point.
logger = logging.getLogger("dasd_megatron.rollout.server")


class EngineClosedError(RuntimeError):
    """Work for an engine that is shutting down."""

    def __init__(self) -> None:
        super().__init__(CLOSING_MESSAGE)


class UpdateResult(NamedTuple):
    """Outcome of a weight update, in SGLang's words."""

    success: bool
    message: str


@dataclass(slots=True, eq=False)
class UpdateJob:
    """A weight update that waits for its turn: ``load`` gives the new model. ``done`` resolves to an UpdateResult."""

    load: Callable[[], PreTrainedModel]
    model_path: str
    weight_version: str | None
    done: Future[UpdateResult] = field(default_factory=running_future)


class Engine:
    """A queue of jobs and the one thread that works on it.

    With ``deterministic`` a request is decoded alone, in batches of at most ``max_batch_size`` rows. Otherwise waiting
    rows join the running batch between decoding steps. Every public method may be called from any thread and returns
    without waiting for the model.
    """

    def __init__(
        self, model_path: str, *, dtype: torch.dtype, max_batch_size: int, weight_version: str, deterministic: bool
    ):
        self.model = load_model(model_path, dtype)
        self.tokenizer = load_tokenizer(model_path)
        self.config = copy.deepcopy(self.model.config)
        self.model_path = model_path
        self.weight_version = weight_version
        self.dtype = dtype
        self.max_batch_size = max_batch_size
        self.deterministic = deterministic
        embeddings: Any = self.model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        context_length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(context_length, int):
            raise ModelDirectoryError(
                f"{model_path}/config.json has no max_position_embeddings: the context length is unknown"
            )
        self.context_length = context_length
        self.eos_ids = self._end_of_sequence_ids()
        self.num_layers = self.config.get_text_config().num_hidden_layers
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._check_cache()

        self.steps = 0
        """Decoding steps until now. The number moves while the engine is alive and busy."""
        self._queue: deque[Row | UpdateJob] = deque()
        self._batch: DecodingBatch | None = None
        self._admitted: list[Row] = []
        """Rows whose prompts are being read, on their way into the batch."""
        self._paused: PauseMode | None = None
        self._released: set[str] = set()
        self._weights_lost = False
        """True while the weights are released and no others have come since."""
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def _end_of_sequence_ids(self) -> frozenset[int]:
        ids: set[int] = set()
        for source in (self.config, self.model.generation_config, self.tokenizer):
            given = getattr(source, "eos_token_id", None)
            ids |= set(given) if isinstance(given, (list, tuple)) else set() if given is None else {given}
        return frozenset(ids)

    @torch.inference_mode()
    def _check_cache(self) -> None:
        """Run one token through the model: its keys and values must land in our cache.

        Batched decoding would be silently wrong otherwise. Raises ModelDirectoryError.
        """
        cache = GrowingCache(self.num_layers)
        token = torch.zeros(1, 1, dtype=torch.int64)
        try:
            self._forward(token, torch.ones_like(token), torch.zeros_like(token), cache, last_only=True)
        except Exception as error:  # whatever the architecture trips over
            raise ModelDirectoryError(
                f"the embedded server cannot run {self.model_path}: {type(error).__name__}: "
                f"{message_in_one_line(error)}"
            ) from error
        if not all(layer.is_initialized and layer.keys.shape[-2] == 1 for layer in cache.growing_layers):
            raise ModelDirectoryError(
                f"{self.model_path} is not a pure attention model: it does not keep its state in a key/value cache. "
                "Serve it with SGLang."
            )

    # The following methods are called from the HTTP side.

    @property
    def alive(self) -> bool:
        """True while the worker thread runs and the engine is not closing."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Number of rows that are being decoded."""
        batch = self._batch
        return sum(row.finish_reason is None for row in self._admitted + (batch.rows if batch is not None else []))

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        with self._wake:
            return sum(isinstance(item, Row) for item in self._queue)

    @property
    def paused(self) -> PauseMode | None:
        """Mode of the pause; None while the engine is not paused."""
        return self._paused

    @property
    def missing_memory(self) -> str | None:
        """Message about what was released that requests need, and what to do; None while nothing is missing."""
        if self._released:
            return f"memory is released ({', '.join(sorted(self._released))}): call /resume_memory_occupation"
        return "the weights were released: send them again" if self._weights_lost else None

    def parse_request(self, body: Any) -> GenerateJob:
        """Turn a parsed /generate body into a job for this model; raises as :func:`requests.build_job`."""
        return build_job(
            body,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            eos_ids=self.eos_ids,
        )

    def submit(self, job: GenerateJob) -> None:
        """Queue a job.

        Raises InvalidRequestError when one of its ids is in use or memory is released, and EngineClosedError when the
        server is shutting down.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError
            missing = self.missing_memory
            if missing:
                raise InvalidRequestError(missing)
            live = {row.rid for row in self._live_rows()}
            for row in job.rows:
                if row.rid in live:
                    raise InvalidRequestError(f"Duplicate request ID detected: {row.rid}")
            self._queue.extend(job.rows)
            if not job.rows:
                job.done.set_result(None)
            self._wake.notify_all()

    def update_from_disk(self, model_path: str, weight_version: str | None) -> Future[UpdateResult]:
        """Queue a weight update behind the requests that came before it; raises EngineClosedError."""
        return self._queue_update(
            UpdateJob(lambda: load_model(model_path, self.dtype, self.config), model_path, weight_version)
        )

    def replace_model(self, model: PreTrainedModel) -> Future[UpdateResult]:
        """Queue an update to a model in memory, of the served one's architecture and dtype, under the old version.

        Raises EngineClosedError.
        """
        return self._queue_update(UpdateJob(lambda: model, self.model_path, None))

    def _queue_update(self, job: UpdateJob) -> Future[UpdateResult]:
        with self._wake:
            if self._closing:
                raise EngineClosedError
            self._queue.append(job)
            self._wake.notify_all()
        return job.done

    def abort(
        self, *, rid: str = "", everything: bool = False, job: GenerateJob | None = None, waiting: bool = True
    ) -> None:
        """End rows early: those of an id (a row's or its request's), of a job, or all.

        ``waiting=False`` spares rows that have not started.
        """

        def is_meant(row: Row) -> bool:
            return (
                everything
                or (job is not None and row.request is job)
                or (rid != "" and rid in (row.rid, row.request.rid))
            )

        with self._wake:
            for row in self._live_rows():
                if not is_meant(row):
                    continue
                if row.started:
                    row.abort = True
                elif waiting:
                    self._queue.remove(row)
                    self._finish_row(row, {"type": "abort", "message": "Abort in waiting queue"})
            self._wake.notify_all()

    def pause(self, mode: PauseMode) -> list[Future]:
        """Stop decoding. Mode ``abort`` also ends what runs or waits. Returns the jobs to wait for."""
        with self._wake:
            again, self._paused = self._paused is not None, mode
            if mode != "abort":
                return []
            jobs = [row.request.done for row in self._live_rows() if row.started or not again]
        # Requests that arrived during a pause wait for its end.
        self.abort(everything=True, waiting=not again)
        return jobs

    def resume(self) -> None:
        """End a pause."""
        with self._wake:
            self._paused = None
            self._wake.notify_all()

    def release_memory(self, tags: Sequence[str] | None) -> None:
        """Give memory back: that of the ``weights``, which are then gone, or what the key-value caches have left.

        None means all kinds. Raises InvalidRequestError while requests run or wait, and for an unknown tag.
        """
        tags = _known_tags(tags)
        with self._wake:
            if self._live_rows() and not (self._paused and self._batch is None and not self._admitted):
                raise InvalidRequestError("release_memory_occupation should be called only when server is idle.")
            self._released |= set(tags)
            if "weights" in tags:
                self._weights_lost = True
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.new_empty(0)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
        if trim is not None:
            trim(0)

    def resume_memory(self, tags: Sequence[str] | None) -> None:
        """End the release of these kinds of memory; weights come with the next update.

        Raises InvalidRequestError for a kind that is not released.
        """
        tags = _known_tags(tags)
        with self._wake:
            if not set(tags) <= self._released:
                raise InvalidRequestError(f"{', '.join(sorted(set(tags) - self._released))}: not released")
            self._released -= set(tags)

    def checksums(self, skip: Sequence[str]) -> dict[str, str]:
        """Return SGLang's checksum of each parameter's bytes, except where the name contains one of ``skip``."""
        return {
            name: cpu_checksum([parameter])
            for name, parameter in self.model.named_parameters()
            if not any(part in name for part in skip)
        }

    def name_weights(self, version: str) -> None:
        """Let what is sampled from now on carry ``version``."""
        with self._wake:
            for row in self._live_rows():
                if row.started and version != row.weight_version:
                    if row.output_ids:
                        row.earlier_versions.append((row.weight_version, len(row.output_ids)))
                    row.weight_version = version
            self.weight_version = version

    def close(self) -> None:
        """Abort everything and refuse what comes; the thread ends after the step that it is in."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()

    def _live_rows(self) -> list[Row]:
        active = self._admitted + (self._batch.rows if self._batch is not None else [])
        return [row for row in active if row.finish_reason is None] + [
            item for item in self._queue if isinstance(item, Row)
        ]

    # The following methods are called from the worker thread.

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                work = self._next_work()
                while work is None:
                    self._wake.wait()
                    work = self._next_work()
            if work == "close":
                return
            if isinstance(work, UpdateJob):
                self._apply_update(work)
                continue
            try:
                self._step(work)
            # One failed batch must not take the server down: its requests get a 500, the rest goes on.
            except Exception as error:
                logger.exception("decoding failed")
                self._fail_rows(f"decoding failed: {type(error).__name__}: {message_in_one_line(error)}")

    def _fail_rows(self, message: str) -> None:
        """End the rows of a step that failed."""
        with self._wake:
            # A failure while prompts were read has not touched the running batch.
            if self._admitted:
                failed, self._admitted = self._admitted, []
            else:
                failed, self._batch = self._batch.rows if self._batch is not None else [], None
            for row in failed:
                self._finish_row(row, _internal_error(message))

    def _next_work(self) -> None | Literal["close"] | UpdateJob | list[Row]:
        """Return what to do now; the caller has the lock.

        A list (perhaps empty) of rows to admit means a decoding step, and None means to wait.
        """
        self._drop_ended_rows()
        if self._closing:
            for row in self._live_rows():
                self._finish_row(row, {"type": "abort", "message": CLOSING_MESSAGE})
            for item in self._queue:
                if isinstance(item, UpdateJob):
                    item.done.set_result(UpdateResult(False, CLOSING_MESSAGE))
            self._queue.clear()
            self._batch = None
            return "close"
        update = next((item for item in self._queue if isinstance(item, UpdateJob)), None)
        if update is not None and (self._paused or (self._batch is None and self._queue[0] is update)):
            self._queue.remove(update)
            return update
        if self._paused:
            return None
        admitted = self._admit_rows()
        return admitted if admitted or self._batch is not None else None

    def _drop_ended_rows(self) -> None:
        """Finish aborted rows, and drop the batch when all of its rows are finished."""
        if self._batch is None:
            return
        for row in self._batch.rows:
            if row.abort and row.finish_reason is None:
                self._finish_row(row, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})
        if all(row.finish_reason is not None for row in self._batch.rows):
            self._batch = None

    def _admit_rows(self) -> list[Row]:
        """Take rows that fit into the batch from the head of the queue; an update at the head holds them back."""
        if self.deterministic and self._batch is not None:
            return []
        rows: list[Row] = []
        free = self.max_batch_size - self.running
        while self._queue and len(rows) < free:
            row = self._queue[0]
            if isinstance(row, UpdateJob) or (self.deterministic and rows and row.request is not rows[0].request):
                break
            self._queue.popleft()
            row.started, row.weight_version = True, self.weight_version
            rows.append(row)
        self._admitted = rows
        return rows

    def _finish_row(self, row: Row, reason: dict[str, Any]) -> None:
        if row.finish_reason is not None:
            return
        row.finish_reason, row.finished_at = reason, time.perf_counter()
        if not row.started:
            row.weight_version = self.weight_version
        row.request.unfinished -= 1
        if row.request.unfinished == 0:
            row.request.done.set_result(None)

    def _apply_update(self, job: UpdateJob) -> None:
        try:
            model = job.load()
        except ModelDirectoryError as error:
            logger.error("update_weights_from_disk refused: %s", error)
            message = f"Failed to update weights: {error}. The served weights are unchanged."
            job.done.set_result(UpdateResult(False, message))
            return
        message = "Succeeded to update model weights."
        with self._wake:
            self.model, self.model_path, self._weights_lost = model, job.model_path, False
            if job.weight_version is not None:
                self.name_weights(job.weight_version)
                message += f" Weight version updated to {job.weight_version}."
            if self._batch is not None and self._paused == "retract":
                self._recompute_cache(self._batch)
        job.done.set_result(UpdateResult(True, message))

    def _recompute_cache(self, batch: DecodingBatch) -> None:
        """Compute the keys and values of what the batch has read and drawn under the weights that are served now."""
        length = batch.mask.shape[1]
        # The last token of each row is drawn, but not yet read.
        ids, _ = pad_left([[*row.prompt, *row.output_ids[:-1]][-length:] for row in batch.rows], length)
        cache = GrowingCache(self.num_layers)
        self._forward(ids, batch.mask, positions_of(batch.mask), cache, last_only=True)
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
            cache_position=torch.arange(past, mask.shape[1]),
            use_cache=True,
            **({"logits_to_keep": 1} if last_only and self._keeps_last_logits else {}),
        )
        return output.logits[:, -1:] if last_only else output.logits

    def _step(self, admitted: list[Row]) -> None:
        """Read the admitted prompts and let them join; without any, draw one token of every running row."""
        batch = self._join(admitted) if admitted else self._decode()
        self.steps += 1
        if not batch.compact():
            self._batch = None

    def _join(self, admitted: list[Row]) -> DecodingBatch:
        """Read the rows' prompts, draw their first tokens and add them to the running batch, which is returned."""
        batch = self._prefill(admitted)
        if self._batch is not None:
            self._batch.join(batch)
            batch = self._batch
        with self._wake:
            self._batch, self._admitted = batch, []
        return batch

    def _decode(self) -> DecodingBatch:
        """Draw one token of every row of the running batch, which is returned."""
        batch = self._batch
        assert batch is not None, "a step without admitted rows needs a running batch"
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        ids, positions = batch.next_ids[:, None], batch.positions[:, None]
        logits = self._forward(ids, batch.mask, positions, batch.cache, last_only=True)[:, -1]
        # Finished rows stay in the batch until they are dropped. They must not run off a learned position table.
        batch.positions = (batch.positions + 1).clamp_(max=self.context_length - 1)
        self._draw_tokens(batch, logits)
        return batch

    def _prefill(self, rows: list[Row]) -> DecodingBatch:
        """Read the rows' prompts, each distinct one once, and draw the first tokens."""
        batches = map(self._prefill_group, prefill_groups(rows))
        joined = next(batches)
        for batch in batches:
            joined.join(batch)
        return joined

    def _prefill_group(self, rows: list[Row]) -> DecodingBatch:
        distinct = list(dict.fromkeys(tuple(row.prompt) for row in rows))
        index = {prompt: i for i, prompt in enumerate(distinct)}
        longest = max(map(len, distinct))
        ids, mask = pad_left(distinct, longest)
        cache = GrowingCache(self.num_layers)
        wants_prompt = any(row.logprob_start < len(row.prompt) for row in rows)
        logits = self._forward(ids, mask, positions_of(mask), cache, last_only=not wants_prompt)
        select = torch.tensor([index[tuple(row.prompt)] for row in rows])
        if wants_prompt:
            for row, i in zip(rows, select.tolist(), strict=True):
                record_prompt_log_probs(row, logits[i, longest - len(row.prompt) :])
        for layer in cache.growing_layers:
            layer.replace(layer.keys[select], layer.values[select])
        batch = DecodingBatch(rows, cache, mask[select], mask.sum(-1)[select])
        self._draw_tokens(batch, logits[select, -1])
        return batch

    def _draw_tokens(self, batch: DecodingBatch, logits: torch.Tensor) -> None:
        """Draw the next token of every row from [B, V] logits, record it and decide which rows are finished."""
        if batch.longest_minimum:
            logits = _bar_stops(batch.rows, logits)
        uniforms = torch.from_numpy(counter_uniforms(batch.seeds, batch.positions.numpy()))
        tokens, log_probs = sample_tokens(logits, batch.temperature, batch.top_k, batch.top_p, uniforms)
        batch.next_ids = tokens
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0].tolist()
        top: list[list[tuple[float, int]]] = [[] for _ in batch.rows]
        if batch.top_logprobs:
            values, ids = (t.tolist() for t in log_probs.topk(min(batch.top_logprobs, log_probs.shape[-1])))
            top = [list(zip(v, i, strict=True)) for v, i in zip(values, ids, strict=True)]
        finished: list[tuple[Row, dict[str, Any]]] = []
        for row, token, log_prob, best in zip(batch.rows, tokens.tolist(), chosen, top, strict=True):
            if row.finish_reason is not None:
                continue
            if math.isnan(log_prob):
                finished.append((row, _internal_error("the model returned NaN logits")))
                continue
            if row.params.max_new_tokens > 0:
                row.output_ids.append(token)
                row.log_probs.append(log_prob)
                if row.top_logprobs:
                    row.top.append(best[: row.top_logprobs])
            reason = self._finish_reason(row)
            if reason is not None:
                finished.append((row, reason))
        if finished:
            with self._wake:
                for row, reason in finished:
                    self._finish_row(row, reason)

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


def _known_tags(tags: Sequence[str] | None) -> Sequence[str]:
    unknown = sorted(set(tags or ()) - set(MEMORY_TAGS))
    if unknown:
        raise InvalidRequestError(f"unknown memory tag {unknown[0]!r}; {', '.join(MEMORY_TAGS)} are known")
    return tags or MEMORY_TAGS


def _internal_error(message: str) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": 500, "err_type": "InternalServerError"}


def _bar_stops(rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
    """Return [B, V] logits without mass on the stop tokens of rows that have too few tokens."""
    logits = logits.clone()
    for i, row in enumerate(rows):
        if len(row.output_ids) < row.params.min_new_tokens:
            logits[i, [token for token in row.params.stop_ids if 0 <= token < logits.shape[-1]]] = -math.inf
    return logits
