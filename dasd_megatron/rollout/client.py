"""Asynchronous client of SGLang's native HTTP API, for SGLang itself and for the embedded server alike.

Every call has a time limit, failures are tried again a bounded number of times, and an answer is used only after it has
been checked: as many rows as were asked for, at least one token and no more than were asked for, ids of the vocabulary,
one finite log-prob per token, the expected weight version. Requests are idempotent (each row carries its own
``sampling_seed``), so that trying one again never doubles a sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import aiohttp
import orjson

from dasd_megatron import access, stopping
from dasd_megatron.access import api_key
from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.pool import Event, ServerPool, Status

T = TypeVar("T")
MemoryTag = Literal["weights", "kv_cache"]

MAX_BACKOFF_SECONDS = 30.0
PROBE_SECONDS = 10.0
LOG_PROB_TOLERANCE = 1e-3  # rounding may put a certain token's log-prob a little above 0
KEEP_ALIVE_SECONDS = 4.0  # SGLang closes connections that were idle for 5 s; a request must not meet that
READ_BUFFER_BYTES = 2**20  # of one connection; answers with long rows have megabytes
_JSON_HEADERS = {"Content-Type": "application/json"}
DENIED_STATUS = frozenset({401, 403})
RETRIED_STATUS = frozenset({408, 425, 429})  # beside all of 5xx


@dataclass(slots=True)
class Completion:
    """One sampled response. ``log_probs`` are natural logs after temperature, one per token of ``output_ids``, the stop
    token included.

    weight_versions: (version, tokens) of each stretch of tokens, in order; more than one where the weights were updated
    meanwhile. response_mask: as in :class:`~dasd_megatron.samples.Sample`; servers sample every token.
    """

    output_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_versions: list[tuple[str, int]]
    text: str
    response_mask: list[int] | None = None

    @property
    def weight_version(self) -> str:
        """The version of its last token, which the server held when it answered."""
        return self.weight_versions[-1][0]


class RolloutServerError(RuntimeError):
    """A request to a rollout server that failed: ``url``, ``what`` failed, after how many ``tries``.

    The trainer recovers from it where it can, and raises RolloutsUnavailableError where it cannot.
    """

    def __init__(self, url: str, what: str, tries: int, fix: str):
        super().__init__(f"{url}: {what} (after {tries} {'try' if tries == 1 else 'tries'}); {fix}")
        self.url = url
        self.what = what
        self.tries = tries
        self.fix = fix


class RequestRefusedError(RolloutServerError):
    """The server understood the request and refused it (4xx); trying again cannot help."""


class AccessDeniedError(RolloutServerError):
    """The server does not take the client's API key, or asks for one (401, 403); trying again cannot help."""


class WeightVersionError(RolloutServerError):
    """The server answers under another weight version than the expected one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sent back to a request for ``path``."""

    path: str
    status: int
    content: bytes


class _TryAgainError(Exception):
    """What went wrong in one try."""

    error_class: type[RolloutServerError] = RolloutServerError
    fix = "check that the server is up and reachable, and its log"


class _ClosingError(_TryAgainError):
    """The server said that it is shutting down, or has too much to do."""


class _DeniedError(_TryAgainError):
    error_class = AccessDeniedError

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.fix = fix


class _OtherVersionError(_TryAgainError):
    error_class = WeightVersionError
    fix = "update the server's weights before sampling, and let nothing else update them"

    def __init__(self, what: str, version: str | None = None):
        super().__init__(what)
        self.version = version


class RolloutClient:
    """Talks to one or more rollout servers.

    urls: base addresses like ``http://10.0.0.1:30000``. connect_timeout, request_timeout: seconds, for opening a
    connection and for one whole request. max_retries: further tries after the first. backoff: seconds before the second
    try; doubles each time, at most 30. max_in_flight: requests under way at once, over all servers. pool: what is known
    of these servers, where several clients share it. router: address of an sglang-router before these servers, which
    gets the requests of :meth:`generate`; all others go to each server. api_key: sent with every request; see
    :mod:`~dasd_megatron.access`.

    May be used from several event loops one after another (each ``asyncio.run`` is one); connections live as long as
    their loop. Close with :meth:`aclose` or ``async with``.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        connect_timeout: float,
        request_timeout: float,
        max_retries: int,
        backoff: float,
        max_in_flight: int,
        pool: ServerPool | None = None,
        router: str | None = None,
        api_key: str | None = None,
    ):
        if not urls:
            raise ValueError("urls is empty: give the address of at least one rollout server")
        for url in [*urls, *([] if router is None else [router])]:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout server address {url!r} must start with http:// or https://")
        if max_in_flight < 1 or max_retries < 0 or connect_timeout <= 0 or request_timeout <= 0 or backoff < 0:
            raise ValueError(
                "max_in_flight must be at least 1, max_retries and backoff at least 0, connect_timeout and "
                f"request_timeout above 0; got {max_in_flight=} {max_retries=} {backoff=} {connect_timeout=} "
                f"{request_timeout=}"
            )
        self.urls = [url.rstrip("/") for url in urls]
        self.router = None if router is None else router.rstrip("/")
        self.pool = ServerPool(self.urls) if pool is None else pool
        self.connect_timeout = connect_timeout
        self.request_timeout = request_timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_in_flight = max_in_flight
        self._api_key = api_key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: aiohttp.ClientSession | None = None
        self._slots: asyncio.Semaphore | None = None

    async def __aenter__(self) -> RolloutClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        if self._http is not None and self._loop is asyncio.get_running_loop():
            await self._http.close()
        self._http = self._loop = self._slots = None

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[dict[str, Any]],
        *,
        weight_version: str | Collection[str] | None,
        rows_per_request: int,
        vocab_size: int | None = None,
    ) -> list[Completion]:
        """Sample one completion of every prompt; returns them in the prompts' order.

        prompts: token ids; sampling_params: one dict per prompt (``n`` must be absent or 1; give each its own
        ``sampling_seed``). weight_version: the version that every token must have been sampled under, or those that it
        may; a set is looked at when the answer comes. None accepts any.
        rows_per_request: prompts in one HTTP request, which goes to the healthy server with the fewest, a further try
        to another one. A router takes one sampling_params for a whole request, and so one row at a time.
        vocab_size: number of logits the model has; an id outside [0, vocab_size) is a failed try. None refuses negative
            ids alone.

        Raises RequestRefusedError at once when a server refuses a request (400), WeightVersionError or
        RolloutServerError when a request has failed ``max_retries + 1`` times; the other requests are then cancelled.
        """
        if len(prompts) != len(sampling_params):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params: give one per prompt")
        if rows_per_request < 1:
            raise ValueError(f"rows_per_request must be at least 1, got {rows_per_request}")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, or None for no upper bound; got {vocab_size}")
        if any(params.get("n", 1) != 1 for params in sampling_params):
            raise ValueError("n must be absent or 1: repeat the prompt with other seeds for more samples of it")

        if self.router is not None:
            rows_per_request = 1

        async def request(start: int) -> list[Completion]:
            rows = slice(start, start + rows_per_request)
            params = list(sampling_params[rows])
            body = {
                "input_ids": [list(prompt) for prompt in prompts[rows]],
                "sampling_params": params if self.router is None else params[0],
                "return_logprob": True,
            }

            def read(response: Answer) -> list[Completion]:
                with _without_cycle_collection():
                    return read_completions(_json(response), params, weight_version, vocab_size)

            return await self._call("POST", "/generate", read, body=body, held=self._held)

        answers = await _all_or_cancel([request(start) for start in range(0, len(prompts), rows_per_request)])
        return [completion for answer in answers for completion in answer]

    def _held(self, completions: Sequence[Completion]) -> str | None:
        """What a server holds, by its answer; None where that does not say so: rows that were done before an update."""
        versions = {completion.weight_version for completion in completions}
        if self.pool.current is None:
            return versions.pop()
        return self.pool.current if self.pool.current in versions else None

    async def health(self) -> dict[str, bool]:
        """Whether each server answers /health with 200 within ``request_timeout``, in one try; by address."""

        async def one(index: int) -> bool:
            try:
                await self._call("GET", "/health", _nothing, index=index, tries=1)
            except RolloutServerError:
                return False
            return True

        return dict(zip(self.urls, await _all_or_cancel([one(i) for i in range(len(self.urls))]), strict=True))

    async def wait_until_healthy(self, timeout_seconds: float, *, one_is_enough: bool = False) -> None:
        """Return once every server is healthy, or one of them; raises RolloutServerError naming one that is not after
        ``timeout_seconds``."""
        deadline = time.monotonic() + timeout_seconds
        pause = 0.05
        while True:
            stopping.raise_if_requested()
            # A server that does not answer must not hold this up beyond its own limit.
            try:
                async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
                    sick = [url for url, healthy in (await self.health()).items() if not healthy]
            except TimeoutError:
                sick = self.urls
            if not sick or (one_is_enough and len(sick) < len(self.urls)):
                return
            if time.monotonic() + pause >= deadline:
                raise RolloutServerError(
                    sick[0],
                    f"not healthy within {timeout_seconds:g} s",
                    1,
                    "check that the server is up, its log, and rollout.startup_timeout_seconds",
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def model_info(self) -> list[dict[str, Any]]:
        """/model_info of every server, in the order of ``urls``."""
        return await self._everywhere("GET", "/model_info", _json_object)

    async def server_info(self) -> list[dict[str, Any]]:
        """/server_info of every server, in the order of ``urls``."""
        return await self._everywhere("GET", "/server_info", _json_object)

    async def update_weights_from_disk(self, path: str, weight_version: str) -> None:
        """Let every server that is not dead load the Hugging Face directory ``path`` (on its own file system) as
        ``weight_version``, and check that it did. One that fails is dead from then on, in the pool.

        Raises, if all fail, what the first one did: RequestRefusedError with the server's message, WeightVersionError
        where one still reports another version, RolloutServerError.
        """

        def read(response: Answer) -> None:
            answer = _json_object(response)
            if answer.get("success") is not True:
                raise _TryAgainError(f"/update_weights_from_disk of {path} failed: {answer.get('message')!r}")

        body = {"model_path": str(path), "weight_version": weight_version}

        async def update(index: int) -> None:
            await self._call("POST", "/update_weights_from_disk", read, index=index, body=body)
            await self._check_version(index, weight_version)

        dead = self.pool.with_status(Status.DEAD)
        able = [index for index, url in enumerate(self.urls) if url not in dead] or list(range(len(self.urls)))
        outcomes = await asyncio.gather(*map(update, able), return_exceptions=True)
        errors = [outcome for outcome in outcomes if outcome is not None]
        for error in errors:
            if not isinstance(error, RolloutServerError):
                raise error
            self.pool.record(error.url, Event.UPDATE_FAILED, reason=error.what)
        if len(errors) == len(able):
            raise errors[0]

    async def _check_version(self, index: int, weight_version: str) -> None:
        def check(response: Answer) -> None:
            found = _json_object(response).get("weight_version")
            if found != weight_version:
                raise _OtherVersionError(
                    f"expected weight version {weight_version!r} after the update, but the server reports {found!r}"
                )

        await self._call("GET", "/model_info", check, index=index)
        self.pool.record(self.urls[index], Event.ANSWERED, weight_version)

    async def probe(self, urls: Sequence[str]) -> list[str]:
        """Ask these servers whether they work and which weights they hold, once each; the pool hears of it. Returns
        those that failed."""

        async def one(url: str) -> bool:
            index = self.urls.index(url)
            try:
                # It asks the engine, which /model_info does not, and generates nothing, as SGLang's /health does: it
                # may be paused.
                await self._call("GET", "/server_info", _json_object, index=index, tries=1, limit=PROBE_SECONDS)
                info = await self._call("GET", "/model_info", _json_object, index=index, tries=1, limit=PROBE_SECONDS)
            except RolloutServerError as error:
                self.pool.record(url, Event.FAILED, reason=error.what)
                return False
            self.pool.record(url, Event.ANSWERED, str(info.get("weight_version")))
            return True

        answered = await asyncio.gather(*map(one, urls))
        return [url for url, well in zip(urls, answered, strict=True) if not well]

    async def check_access(self, path: str = "/model_info") -> None:
        """Raise :class:`AccessDeniedError` if a server that answers to ``path`` does not take the key. Those that do
        not are let pass."""

        async def one(index: int) -> None:
            try:
                await self._call("GET", path, _nothing, index=index, tries=1, limit=PROBE_SECONDS)
            except AccessDeniedError:
                raise
            except RolloutServerError:
                return

        await _all_or_cancel([one(index) for index in range(len(self.urls))])

    async def tensor_parallel_sizes(self) -> dict[str, int]:
        """Processes that share each copy of the model, by address; as :meth:`descriptions`."""
        return {url: int(info.get("tp_size", 1)) for url, info in (await self.descriptions()).items()}

    async def descriptions(self) -> dict[str, dict[str, Any]]:
        """/model_info and, over it, /server_info, which has the settings of the start, of every server that answers,
        asked once, by address; the pool hears of the others.

        Raises what the last one did where none answers.
        """
        found: dict[str, dict[str, Any]] = {}
        failure: RolloutServerError | None = None

        async def one(index: int) -> None:
            nonlocal failure
            try:
                model, settings = [
                    await self._call("GET", path, _json_object, index=index, tries=1, limit=PROBE_SECONDS)
                    for path in ("/model_info", "/server_info")
                ]
            except RolloutServerError as error:
                failure = error
                self.pool.record(self.urls[index], Event.FAILED, reason=error.what)
            else:
                found[self.urls[index]] = model | settings

        await asyncio.gather(*map(one, range(len(self.urls))))
        if not found and failure is not None:
            raise failure
        return found

    async def prompt_log_probs(self, url: str, input_ids: Sequence[int]) -> list[float]:
        """Log-probs, natural and before temperature, of all of ``input_ids`` but the first, each after those before it,
        by one server.

        Raises RequestRefusedError, or RolloutServerError where it does not answer soundly within ``max_retries + 1``
        tries.
        """
        body = {
            "input_ids": [list(input_ids)],
            "sampling_params": [{"max_new_tokens": 1, "temperature": 0.0}],
            "return_logprob": True,
            "logprob_start_len": 0,
        }

        def read(response: Answer) -> list[float]:
            return _read_prompt_log_probs(_json(response), input_ids)

        return await self._call("POST", "/generate", read, index=self.urls.index(url), body=body)

    async def init_weights_update_group(
        self,
        addresses: Sequence[str],
        port: int,
        *,
        rank_offsets: Sequence[int],
        world_size: int,
        name: str,
        backend: str,
    ) -> None:
        """Let every server join a process group whose rank 0 listens at ``port``; see
        :mod:`~dasd_megatron.rollout.weight_group`.

        addresses: of rank 0, as each server reaches it; rank_offsets: the rank of each server's first process; in the
            order of ``urls``.
        """
        common = {"master_port": port, "world_size": world_size, "group_name": name, "backend": backend}
        places = zip(addresses, rank_offsets, strict=True)
        bodies = [{**common, "master_address": address, "rank_offset": offset} for address, offset in places]
        await self._everywhere("POST", "/init_weights_update_group", _succeeded, bodies=bodies, tries=1)

    async def destroy_weights_update_group(self, name: str) -> None:
        """Let every server leave a process group."""
        await self._everywhere("POST", "/destroy_weights_update_group", _succeeded, body={"group_name": name}, tries=1)

    async def begin_weight_update(self) -> None:
        """Open a weight update on every server; answered once no request is running there. One that was left open is
        closed first."""

        async def begin(index: int) -> None:
            try:
                await self._call("POST", "/begin_weight_update", _succeeded, index=index, body={}, tries=1)
            except RequestRefusedError:
                # Left open by a sync that broke off, of this trainer or of one that is gone. What it has loaded is not
                # named.
                with contextlib.suppress(RequestRefusedError):
                    await self._call("POST", "/end_weight_update", _succeeded, index=index, body={}, tries=1)
                await self._call("POST", "/begin_weight_update", _succeeded, index=index, body={}, tries=1)

        await _all_or_cancel([begin(index) for index in range(len(self.urls))])

    async def update_weights_from_distributed(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, name: str
    ) -> None:
        """Let every server take part in the broadcast of one bucket over the group ``name``; answered when it has it.

        names, dtypes, shapes: of the tensors in the bucket, Hugging Face's; dtypes like ``bfloat16``.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": name,
            "load_format": "flattened_bucket",
        }
        await self._everywhere("POST", "/update_weights_from_distributed", _succeeded, body=body, tries=1)

    async def update_weights_from_tensor(self, payloads: Sequence[Sequence[str]]) -> None:
        """Let every server load one bucket out of this machine's memory; answered when it has it.

        payloads: for each server, in the order of ``urls``, one for each of its processes; see
        :func:`weight_payload.pack`. SGLang ends when it gets what it cannot read.
        """
        bodies = [{"serialized_named_tensors": list(texts), "load_format": "flattened_bucket"} for texts in payloads]
        await self._everywhere("POST", "/update_weights_from_tensor", _succeeded, bodies=bodies, tries=1)

    async def end_weight_update(self, weight_version: str) -> None:
        """Close the update on every server, name what it serves now, and check that it does.

        The name comes last: a server for which an update breaks off, and that wakes up later, must not go by it.
        """
        await self._everywhere("POST", "/end_weight_update", _succeeded, body={}, tries=1)
        body = {"new_version": weight_version, "abort_all_requests": False}
        await self._everywhere("POST", "/update_weight_version", _succeeded, body=body, tries=1)
        await asyncio.gather(*(self._check_version(index, weight_version) for index in range(len(self.urls))))

    async def pause_generation(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        """Stop every server's decoding; mode ``abort`` ends what is running, the others suspend it. New requests
        wait."""
        await self._tell("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """End the pause."""
        await self._tell("/continue_generation", {})

    async def abort_request(self, rid: str | None = None) -> None:
        """End one request early on whichever server runs it, or all requests where ``rid`` is None; what was sampled so
        far is answered."""
        await self._tell("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    async def _tell(self, path: str, body: Any) -> None:
        """Ask every server that is not dead, once; the pool hears of those that fail, and they hold nobody up."""

        async def one(index: int) -> None:
            try:
                await self._call("POST", path, _nothing, index=index, body=body, tries=1, limit=PROBE_SECONDS)
            except RolloutServerError as error:
                self.pool.record(error.url, Event.FAILED, reason=error.what)

        dead = self.pool.with_status(Status.DEAD)
        await asyncio.gather(*(one(index) for index, url in enumerate(self.urls) if url not in dead))

    async def flush_cache(self) -> None:
        """Drop every server's prefix cache; raises RequestRefusedError while requests are running."""
        await self._everywhere("POST", "/flush_cache", _nothing)

    async def release_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server give back this memory, which is then undefined; weights have to be sent again. SGLang needs
        ``--enable-memory-saver`` to give anything back, and ends when it is asked while requests run."""
        await self._everywhere("POST", "/release_memory_occupation", _nothing, body={"tags": list(tags)}, tries=1)

    async def resume_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server take this memory again, in one try: SGLang ends when it is asked for what is not
        released."""
        await self._everywhere("POST", "/resume_memory_occupation", _nothing, body={"tags": list(tags)}, tries=1)

    async def weight_checksums(self, skip: Sequence[str] = ()) -> list[list[dict[str, str]]]:
        """Checksums of every server's weights, in the order of ``urls``: by its own names of tensors, for each of its
        processes in the order of tensor-parallel ranks. ``skip``: parts of the names of tensors to leave out."""

        def read(response: Answer) -> list[dict[str, str]]:
            _succeeded(response)
            ranks = _json_object(response).get("ranks")
            try:
                return [
                    rank["checksums"] for rank in sorted(ranks, key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
                ]
            except (TypeError, KeyError, IndexError) as error:
                raise _TryAgainError(f"{response.path} answered no checksums: {str(ranks)[:80]}") from error

        return await self._everywhere(
            "POST", "/weights_checker", read, body={"action": "checksum", "skip_tensor_list": list(skip)}
        )

    async def _everywhere(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        body: Any = None,
        *,
        bodies: Sequence[Any] | None = None,
        tries: int | None = None,
    ) -> list[T]:
        """One request to every server, all with ``body`` or each with its own of ``bodies``."""
        bodies = [body] * len(self.urls) if bodies is None else bodies
        calls = [self._call(method, path, read, index=i, body=one, tries=tries) for i, one in enumerate(bodies)]
        return await _all_or_cancel(calls)

    async def _call(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        *,
        index: int | None = None,
        body: Any = None,
        tries: int | None = None,
        limit: float | None = None,
        held: Callable[[T], str | None] | None = None,
    ) -> T:
        """One request until ``read`` accepts its answer: to server ``index``, or else to the router, or each time to
        the one that the pool chooses, which then hears how it went; ``held`` gives the weight version that an answer
        shows. ``limit``: seconds, where below ``request_timeout``."""
        tries = self.max_retries + 1 if tries is None else tries
        limit = self.request_timeout if limit is None else min(limit, self.request_timeout)
        http, slots = await self._connections()
        routed = index is None and self.router is not None
        failure = _TryAgainError("not tried")
        url, tried = ", ".join(self.urls), []
        for number in range(tries):
            if number:
                await asyncio.sleep(min(self.backoff * 2 ** (number - 1), MAX_BACKOFF_SECONDS))
            async with slots:
                chosen = self.router if routed else self.pool.choose(tried) if index is None else self.urls[index]
                if chosen is None:
                    tries = max(number, 1)
                    if not tried:
                        failure = _OtherVersionError(f"no server holds the weights {self.pool.current!r}")
                    break
                url = chosen
                if not routed:
                    self.pool.begin(url)
                try:
                    async with asyncio.timeout(limit):
                        response = await self._exchange(http, method, url, path, body)
                    if response.status >= 500 or response.status in RETRIED_STATUS:
                        kind = _ClosingError if response.status == 503 else _TryAgainError
                        raise kind(f"{path} answered {response.status}: {_server_message(response)}")
                    if response.status in DENIED_STATUS:
                        raise _DeniedError(*access.refusal(response.status, self._api_key))
                    if response.status >= 400:
                        raise RequestRefusedError(
                            url,
                            f"{path} refused with {response.status}: {_server_message(response)}",
                            number + 1,
                            "correct the request",
                        )
                    answer = read(response)
                except aiohttp.ClientError as error:  # refused, reset or timed-out connections and broken HTTP
                    failure = _TryAgainError(f"{path} failed: {type(error).__name__}: {error}")
                except TimeoutError:
                    failure = _TryAgainError(f"{path} gave no answer within {limit:g} s")
                except _TryAgainError as error:
                    failure = error
                else:
                    version = held(answer) if held is not None and not routed else None
                    if version is not None:
                        self.pool.record(url, Event.ANSWERED, version)
                    return answer
                finally:
                    if not routed:
                        self.pool.end(url)
            if routed:
                self.pool.doubt(f"the router {url}: {failure}")
            elif index is None:
                tried = [*(one for one in tried if one != url), url]
                self._record_failure(url, failure)
            # Another server may take it.
            if isinstance(failure, _DeniedError) and (index is not None or routed or len(tried) == len(self.urls)):
                tries = number + 1
                break
        raise failure.error_class(url, str(failure), tries, failure.fix) from failure

    def _record_failure(self, url: str, failure: _TryAgainError) -> None:
        other_version = isinstance(failure, _OtherVersionError) and failure.version is not None
        if other_version and self.pool.current is not None:
            self.pool.record(url, Event.ANSWERED, failure.version, reason=str(failure))
        else:
            self.pool.record(
                url, Event.CLOSING if isinstance(failure, _ClosingError) else Event.FAILED, reason=str(failure)
            )

    async def _exchange(self, http: aiohttp.ClientSession, method: str, url: str, path: str, body: Any) -> Answer:
        """One request and its whole answer; ``body`` goes as JSON unless it is None. Raises aiohttp.ClientError."""
        content = {} if body is None else {"data": orjson.dumps(body), "headers": _JSON_HEADERS}
        async with http.request(method, url + path, allow_redirects=False, **content) as response:
            return Answer(path, response.status, await response.read())

    async def _connections(self) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
        """The running loop's HTTP session and its limit on requests in flight. Connections of an ended loop cannot be
        used any more."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._http is None or self._slots is None:
            left, ended = self._http, self._loop
            self._loop = loop
            self._slots = asyncio.Semaphore(self.max_in_flight)
            self._http = aiohttp.ClientSession(
                headers=access.headers(self._api_key),
                # _call limits the whole request
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.connect_timeout),
                connector=aiohttp.TCPConnector(limit=self.max_in_flight, keepalive_timeout=KEEP_ALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BUFFER_BYTES,
                trust_env=False,  # rollout servers are inside the cluster: no proxy, no .netrc
            )
            if left is not None and ended is not None and ended.is_closed():
                await left.close()
        return self._http, self._slots


async def _all_or_cancel(calls: list[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """For parsing long answers: three lists a token make Python look for cycles in the whole process again and again,
    and JSON has none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _nothing(response: Answer) -> None:
    """For answers whose status says it all."""


def _succeeded(response: Answer) -> None:
    answer = _json_object(response)
    if answer.get("success") is not True:
        raise _TryAgainError(f"{response.path} failed: {answer.get('message')!r}")


def _json(response: Answer) -> Any:
    try:
        return orjson.loads(response.content)
    except ValueError as error:
        raise _TryAgainError(
            f"{response.path} answered what is not JSON ({error}): {response.content[:80]!r}"
        ) from error


def _json_object(response: Answer) -> dict[str, Any]:
    answer = _json(response)
    if not isinstance(answer, dict):
        raise _TryAgainError(f"{response.path} answered {_kind(answer)} instead of an object")
    return answer


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _server_message(response: Answer) -> str:
    """The server's own words, from any of SGLang's error bodies."""
    try:
        body = orjson.loads(response.content)
    except ValueError:
        return response.content.decode(errors="replace")[:300]
    if isinstance(body, dict):
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        return str(message or body.get("message") or body.get("detail") or body)[:1000]
    return str(body)[:300]


def read_completions(
    answer: Any,
    sampling_params: Sequence[dict[str, Any]],
    weight_version: str | Collection[str] | None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Check a parsed batch answer of /generate and read its completions; anything unsound counts as a failed try.

    sampling_params: those of the request, one per row; a row has at most its ``max_new_tokens`` tokens, where given.
    vocab_size: ids are in [0, vocab_size); None sets no upper bound.
    """
    rows = len(sampling_params)
    if not isinstance(answer, list):
        raise _TryAgainError(f"/generate answered {_kind(answer)} instead of a list of {rows} rows")
    if len(answer) != rows:
        raise _TryAgainError(f"/generate answered {len(answer)} rows instead of {rows}")
    return [
        _read_row(row, index, params.get("max_new_tokens"), weight_version, vocab_size)
        for index, (row, params) in enumerate(zip(answer, sampling_params, strict=True))
    ]


def _all_of_type(values: Sequence[Any], *types: type) -> bool:
    """Whether each value is of exactly one of ``types``: True is no int."""
    found = list(map(type, values))
    return sum(map(found.count, types)) == len(found)


def _is_log_prob(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value <= LOG_PROB_TOLERANCE


def _read_prompt_log_probs(answer: Any, input_ids: Sequence[int]) -> list[float]:
    def unsound(what: str) -> _TryAgainError:
        return _TryAgainError(f"/generate answered garbage: {what}")

    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise unsound(f"{_kind(answer)} instead of a list of one row")
    meta = answer[0].get("meta_info")
    triples = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) >= 2 for t in triples):
        raise unsound("input_token_logprobs is missing or not a list of [log-prob, id, text]")
    if [triple[1] for triple in triples] != list(input_ids):
        raise unsound("input_token_logprobs are not those of the prompt")
    values = [triple[0] for triple in triples[1:]]
    for value in values:
        if not _is_log_prob(value):
            raise unsound(f"log-prob {value!r} of a prompt token")
    return [float(value) for value in values]


def _read_row(
    row: Any,
    index: int,
    max_new_tokens: int | None,
    weight_version: str | Collection[str] | None,
    vocab_size: int | None,
) -> Completion:
    def unsound(what: str) -> _TryAgainError:
        return _TryAgainError(f"/generate answered garbage in row {index}: {what}")

    meta = row.get("meta_info") if isinstance(row, dict) else None
    if not isinstance(meta, dict):
        raise unsound("no meta_info")
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or not isinstance(reason.get("type"), str):
        raise unsound(f"finish_reason is {reason!r}")
    if reason["type"] == "abort":
        raise _TryAgainError(f"row {index} was aborted by the server: {reason.get('message')!r}")
    ids = row.get("output_ids")
    if not isinstance(ids, list) or not _all_of_type(ids, int):
        raise unsound("output_ids is not a list of integers")
    if not ids:
        # Every response ends with a stop token or at the limit, so that even the shortest has one token.
        raise unsound(f"no tokens, but finish_reason {reason['type']!r}")
    if max_new_tokens is not None and len(ids) > max_new_tokens:
        raise unsound(f"{len(ids)} tokens, but max_new_tokens is {max_new_tokens}")
    largest = math.inf if vocab_size is None else vocab_size - 1
    if min(ids) < 0 or max(ids) > largest:
        position, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token <= largest)
        bounds = "is negative" if vocab_size is None else f"is outside the vocabulary of {vocab_size}"
        raise unsound(f"id {token} of token {position} {bounds}")
    triples = meta.get("output_token_logprobs")
    columns = list(zip(*triples, strict=False)) if isinstance(triples, list) and _all_of_type(triples, list) else []
    if len(columns) < 2:  # as many as the shortest has
        raise unsound("output_token_logprobs is missing or not a list of [log-prob, id, text]")
    if len(triples) != len(ids):
        raise unsound(f"{len(triples)} log-probs for {len(ids)} tokens")
    # All values at once, at the speed of C; one by one only to say which is wrong.
    log_probs, tokens = columns[:2]
    if (
        not _all_of_type(log_probs, int, float)
        or not all(map(math.isfinite, log_probs))
        or max(log_probs) > LOG_PROB_TOLERANCE
    ):
        position, value = next((i, value) for i, value in enumerate(log_probs) if not _is_log_prob(value))
        raise unsound(f"log-prob {value!r} of token {position}")
    if list(tokens) != ids:
        position = next(i for i, (token, drawn) in enumerate(zip(tokens, ids, strict=True)) if token != drawn)
        raise unsound(f"log-prob {position} belongs to token {tokens[position]!r}, not to {ids[position]}")
    text = row.get("text", "")  # a server started without a tokenizer sends none
    if not isinstance(text, str):
        raise unsound(f"text is {_kind(text)}")
    version = str(meta.get("weight_version"))
    versions = (
        _read_versions(meta.get("weight_versions"), len(ids)) if meta.get("weight_versions") else [(version, len(ids))]
    )
    if versions is None:
        raise unsound(f"weight_versions {meta['weight_versions']!r} are not spans of {len(ids)} tokens")
    if weight_version is not None:
        accepted = {weight_version} if isinstance(weight_version, str) else weight_version
        if any(found not in accepted for found, _ in versions):
            found = " and ".join(sorted({repr(one) for one, _ in versions}))
            wanted = " or ".join(sorted(map(repr, accepted)))
            raise _OtherVersionError(
                f"expected weight version {wanted}, but row {index} was sampled under {found}", version
            )
    return Completion(ids, list(map(float, log_probs)), reason["type"], versions, text)


def _read_versions(spans: Any, length: int) -> list[tuple[str, int]] | None:
    """(version, tokens) of SGLang's spans of one response; None where they do not cover its ``length`` tokens one after
    another."""
    versions, end = [], 0
    for span in spans if isinstance(spans, list) else []:
        if (
            not isinstance(span, dict)
            or span.get("start") != end
            or type(span.get("end")) is not int
            or span["end"] < end
        ):
            return None
        if span["end"] > end:
            versions.append((str(span.get("version")), span["end"] - end))
        end = span["end"]
    return versions if end == length else None


def sampling_seed(*parts: int | str) -> int:
    """A 31-bit seed that depends on ``parts`` alone, so a retried or resumed rollout draws the same tokens."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


class ClientFactory(Protocol):
    """Makes a client as :func:`make_client` does; tests give fleets and weight syncs others."""

    def __call__(
        self, config: RolloutConfig, urls: Sequence[str], pool: ServerPool | None = None, /
    ) -> RolloutClient: ...


def make_client(config: RolloutConfig, urls: Sequence[str], pool: ServerPool | None = None) -> RolloutClient:
    """Return a client of ``urls`` with the limits of the configuration and this process's API key."""
    return RolloutClient(
        list(urls),
        connect_timeout=config.connect_timeout_seconds,
        request_timeout=config.request_timeout_seconds,
        max_retries=config.max_retries,
        backoff=config.backoff_seconds,
        max_in_flight=config.max_in_flight,
        pool=pool,
        router=config.router,
        api_key=api_key(),
    )


def sampling_params(
    config: RolloutConfig, seeds: Sequence[int], *, temperature: float, top_p: float
) -> list[dict[str, Any]]:
    """The sampling parameters of a request with one row for each seed."""
    common = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": config.top_k,
        "max_new_tokens": config.max_new_tokens,
    }
    return [{**common, "sampling_seed": seed} for seed in seeds]
