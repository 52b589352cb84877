"""Engine of the embedded server: a queue of jobs and the one thread that works on it. It knows nothing of HTTP."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from dasd_megatron import backend
from dasd_megatron.rollout.embedded.batch import DecodingBatch
from dasd_megatron.rollout.embedded.decoder import Decoder, internal_error
from dasd_megatron.rollout.embedded.loading import (
    ModelDirectoryError,
    load_model,
    load_tokenizer,
    load_update,
    message_in_one_line,
)
from dasd_megatron.rollout.embedded.requests import (
    GenerateJob,
    InvalidRequestError,
    Row,
    build_job,
    running_future,
)
from dasd_megatron.rollout.embedded.schema import brief
from dasd_megatron.rollout.weight_checksum import cpu_checksum

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
CLOSING_MESSAGE = "The server is shutting down."
MAX_UPDATES = 16
"""Weight updates that may wait for their turn."""
CACHE_COPIES = 3
"""Times that a batch's keys and values may be in memory: with spare columns, and twice while rows join it."""
CACHE_SPARE = 1.25
"""Times that those of one sequence alone may be in memory: with spare columns."""

PauseMode = Literal["abort", "retract", "in_place"]

# All modules of the embedded server log under the name of its entry point.
logger = logging.getLogger("dasd_megatron.rollout.server")


class EngineClosedError(RuntimeError):
    """Work for an engine that is shutting down, or whose thread has ended."""


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
        self,
        model_path: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        weight_version: str,
        deterministic: bool,
        cache_bytes: int,
    ):
        model = load_model(model_path, dtype, device)
        self.tokenizer = load_tokenizer(model_path)
        self.config = copy.deepcopy(model.config)
        self.model_path = model_path
        self.weight_version = weight_version
        self.device = device
        self.dtype = dtype
        self.cache_bytes = cache_bytes
        self.max_batch_size = max_batch_size
        self.deterministic = deterministic
        embeddings: Any = model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        context_length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(context_length, int):
            raise ModelDirectoryError(
                f"{model_path}/config.json has no max_position_embeddings: the context length is unknown"
            )
        self.context_length = context_length
        self.eos_ids = _end_of_sequence_ids(self.config, model.generation_config, self.tokenizer)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._decoder = Decoder(model, self.tokenizer, context_length=context_length, model_path=model_path)
        self.cache_tokens = cache_bytes // (CACHE_COPIES * self._decoder.cache_token_bytes)
        """Tokens, padding included, whose keys and values a batch of several rows may hold."""
        self.longest_sequence = int(cache_bytes / (CACHE_SPARE * self._decoder.cache_token_bytes))

        self.steps = 0
        """Decoding steps until now. The number moves while the engine is alive and busy."""
        self._queue: deque[Row | UpdateJob] = deque()
        self._updates = 0
        """Number of updates in the queue."""
        self._batch: DecodingBatch | None = None
        self._admitted: list[Row] = []
        """Rows whose prompts are being read, on their way into the batch."""
        self._paused: PauseMode | None = None
        self._released: set[str] = set()
        self._weights_lost = False
        """True while the weights are released and no others have come since."""
        self._closed: str | None = None
        """Why nothing is done any more; None while the engine works."""
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def model(self) -> PreTrainedModel:
        """Model that is served now."""
        return self._decoder.model

    # The following methods are called from the HTTP side.

    @property
    def alive(self) -> bool:
        """True while the worker thread runs and the engine is not closing."""
        return self._thread.is_alive() and self._closed is None

    @property
    def running(self) -> int:
        """Number of rows that are being decoded."""
        batch = self._batch
        return sum(row.finish_reason is None for row in self._admitted + (batch.rows if batch is not None else []))

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        with self._wake:
            return len(self._queue) - self._updates

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

        Raises InvalidRequestError when one of its ids is in use, a row does not fit into the cache or memory is
        released, and EngineClosedError when the server is shutting down.
        """
        largest = max((row.most_tokens for row in job.rows), default=0)
        if largest > self.longest_sequence:
            raise InvalidRequestError(
                f"A sequence of {largest} tokens does not fit into the server's key-value cache of "
                f"{self.longest_sequence} tokens: ask for fewer tokens, or raise --cache-gib."
            )
        with self._wake:
            self._check_open()
            missing = self.missing_memory
            if missing:
                raise InvalidRequestError(missing)
            live = {row.rid for row in self._live_rows()}
            for row in job.rows:
                if row.rid in live:
                    raise InvalidRequestError(f"Duplicate request ID detected: {brief(row.rid, quote=False)}")
            self._queue.extend(job.rows)
            if not job.rows:
                job.done.set_result(None)
            self._wake.notify_all()

    def update_from_disk(self, model_path: str, weight_version: str | None) -> Future[UpdateResult]:
        """Queue a weight update behind the requests that came before it; raises EngineClosedError."""
        weights = sum(shape.numel() for shape in self.shapes.values())

        def load() -> PreTrainedModel:
            return load_update(model_path, self.dtype, self.device, self.config, weights)

        return self._queue_update(UpdateJob(load, model_path, weight_version))

    def replace_model(self, model: PreTrainedModel) -> Future[UpdateResult]:
        """Queue an update to a model in memory, of the served one's architecture and dtype, under the old version.

        Raises EngineClosedError.
        """
        return self._queue_update(UpdateJob(lambda: model, self.model_path, None))

    def _queue_update(self, job: UpdateJob) -> Future[UpdateResult]:
        with self._wake:
            self._check_open()
            if self._updates >= MAX_UPDATES:
                job.done.set_result(UpdateResult(False, f"{MAX_UPDATES} weight updates wait for their turn already."))
                return job.done
            self._queue.append(job)
            self._updates += 1
            self._wake.notify_all()
        return job.done

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(self._closed)

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
            ended = [row for row in self._live_rows() if is_meant(row)]
            for row in ended:
                if row.started:
                    row.abort = True
                elif waiting:
                    self._finish_row(row, {"type": "abort", "message": "Abort in waiting queue"})
            self._queue = deque(
                item for item in self._queue if isinstance(item, UpdateJob) or item.finish_reason is None
            )
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
        backend.load(self.device.type).release_cached_memory()

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
            name: cpu_checksum([parameter.cpu()])
            for name, parameter in self.model.named_parameters()
            if not any(part in name for part in skip)
        }

    def name_weights(self, version: str) -> None:
        """Let what is sampled from now on carry ``version``."""
        with self._wake:
            for row in self._live_rows():
                if row.started and version != row.weight_version:
                    # A name that came and went without a token leaves nothing behind.
                    if row.output_ids and len(row.output_ids) > (row.earlier_versions or [("", 0)])[-1][1]:
                        row.earlier_versions.append((row.weight_version, len(row.output_ids)))
                    row.weight_version = version
            self.weight_version = version

    def close(self) -> None:
        """Abort everything and refuse what comes; the thread ends after the step that it is in."""
        with self._wake:
            self._closed = self._closed or CLOSING_MESSAGE
            self._wake.notify_all()

    def _live_rows(self) -> list[Row]:
        active = self._admitted + (self._batch.rows if self._batch is not None else [])
        return [row for row in active if row.finish_reason is None] + [
            item for item in self._queue if isinstance(item, Row)
        ]

    # The following methods are called from the worker thread.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self._work()
        # Whatever gets here is a defect. Nobody may wait for a thread that is gone, and /health has to say so.
        except BaseException as error:
            logger.exception("the decoding thread has ended")
            with self._wake:
                self._closed = f"The decoding thread has ended: {type(error).__name__}: {message_in_one_line(error)}"
                self._end_all(internal_error(self._closed))

    def _work(self) -> None:
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

    def _end_all(self, reason: dict[str, Any]) -> None:
        """End all rows and refuse all updates, of an engine that is closed; the caller has the lock."""
        assert self._closed is not None, "the engine works"
        for row in self._live_rows():
            self._finish_row(row, reason)
        for item in self._queue:
            if isinstance(item, UpdateJob):
                item.done.set_result(UpdateResult(False, self._closed))
        self._queue.clear()
        self._updates = 0
        self._batch, self._admitted = None, []

    def _fail_rows(self, message: str) -> None:
        """End the rows of a step that failed."""
        with self._wake:
            # A failure while prompts were read has not touched the running batch.
            if self._admitted:
                failed, self._admitted = self._admitted, []
            else:
                failed, self._batch = self._batch.rows if self._batch is not None else [], None
            for row in failed:
                self._finish_row(row, internal_error(message))

    def _next_work(self) -> None | Literal["close"] | UpdateJob | list[Row]:
        """Return what to do now; the caller has the lock.

        A list (perhaps empty) of rows to admit means a decoding step, and None means to wait.
        """
        self._drop_ended_rows()
        if self._closed is not None:
            self._end_all({"type": "abort", "message": self._closed})
            return "close"
        if self._updates:
            update = next(item for item in self._queue if isinstance(item, UpdateJob))
            if self._paused or (self._batch is None and self._queue[0] is update):
                self._queue.remove(update)
                self._updates -= 1
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
        running = [] if self._batch is None else [row for row in self._batch.rows if row.finish_reason is None]
        # Sequences are padded to the longest. So each may become as long as the longest of them is allowed to be.
        columns = max((row.most_tokens for row in running), default=0)
        while self._queue and len(running) + len(rows) < self.max_batch_size:
            row = self._queue[0]
            if isinstance(row, UpdateJob) or (self.deterministic and rows and row.request is not rows[0].request):
                break
            columns = max(columns, row.most_tokens)
            count = len(running) + len(rows) + 1
            if count > 1 and count * columns > self.cache_tokens:
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
        # Any other error is a defect of loading. It must not end the thread that serves.
        except Exception as error:
            logger.exception("update_weights_from_disk failed")
            what = f"{type(error).__name__}: {message_in_one_line(error)}"
            job.done.set_result(
                UpdateResult(False, f"Failed to update weights: {what}. The served weights are unchanged.")
            )
            return
        message = "Succeeded to update model weights."
        with self._wake:
            self._decoder.model, self.model_path, self._weights_lost = model, job.model_path, False
            if job.weight_version is not None:
                self.name_weights(job.weight_version)
                message += f" Weight version updated to {job.weight_version}."
            suspended = self._batch if self._paused == "retract" else None
        if suspended is not None:
            try:
                self._decoder.recompute_cache(suspended)
            # Without keys and values the suspended rows cannot go on. The update is complete all the same.
            except Exception as error:
                logger.exception("suspended requests failed")
                self._fail_rows(f"decoding failed: {type(error).__name__}: {message_in_one_line(error)}")
        job.done.set_result(UpdateResult(True, message))

    def _step(self, admitted: list[Row]) -> None:
        """Read the admitted prompts and let them join; without any, draw one token of every running row."""
        batch = self._batch
        if admitted:
            read, endings = self._decoder.read_prompts(admitted)
            if batch is not None and read is not None:
                batch.join(read)
            batch = batch or read
        else:
            assert batch is not None, "a step without admitted rows needs a running batch"
            endings = self._decoder.decode(batch)
        self.steps += 1
        with self._wake:
            self._batch, self._admitted = batch, []
            for row, reason in endings:
                self._finish_row(row, reason)
        if batch is not None and not batch.compact():
            self._batch = None


def _end_of_sequence_ids(*sources: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in sources:
        given = getattr(source, "eos_token_id", None)
        ids |= set(given) if isinstance(given, (list, tuple)) else set() if given is None else {given}
    return frozenset(ids)


def _known_tags(tags: Sequence[str] | None) -> Sequence[str]:
    unknown = sorted(set(tags or ()) - set(MEMORY_TAGS))
    if unknown:
        raise InvalidRequestError(f"unknown memory tag {brief(unknown[0])}; {', '.join(MEMORY_TAGS)} are known")
    return tags or MEMORY_TAGS
