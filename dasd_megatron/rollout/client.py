"""Asynchronous client of SGLang's native HTTP API, for SGLang itself and for the embedded server alike.

Every call has a time limit, failures are tried again a bounded number of times, and an answer is used only after it has been checked: as
many rows as were asked for, at least one token and no more than were asked for, ids of the vocabulary, one finite log-prob per token, the
expected weight version. Requests are idempotent (each row carries its own ``sampling_seed``), so that trying one again never doubles a
sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx

from dasd_megatron.rollout.pool import Event, ServerPool, Status

T = TypeVar("T")
MemoryTag = Literal["weights", "kv_cache"]

MAX_BACKOFF_SECONDS = 30.0
PROBE_SECONDS = 10.0
LOG_PROB_TOLERANCE = 1e-3  # rounding may put a certain token's log-prob a little above 0
RETRIED_STATUS = frozenset({408, 425, 429})  # beside all of 5xx


@dataclass(slots=True)
class Completion:
    """One sampled response. ``log_probs`` are natural logs after temperature, one per token of ``output_ids``, the stop token included."""

    output_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_version: str
    text: str


class RolloutError(RuntimeError):
    """A rollout server that cannot be used: ``url``, ``what`` failed, after how many ``tries``."""

    def __init__(self, url: str, what: str, tries: int, fix: str):
        super().__init__(f"{url}: {what} (after {tries} {'try' if tries == 1 else 'tries'}); {fix}")
        self.url = url
        self.what = what
        self.tries = tries
        self.fix = fix


class RequestRefusedError(RolloutError):
    """The server understood the request and refused it (4xx); trying again cannot help."""


class WeightVersionError(RolloutError):
    """The server answers under another weight version than the expected one."""


class _TryAgainError(Exception):
    """What went wrong in one try."""

    error_class: type[RolloutError] = RolloutError
    fix = "check that the server is up and reachable, and its log"


class _ClosingError(_TryAgainError):
    """The server said that it is shutting down, or has too much to do."""


class _OtherVersionError(_TryAgainError):
    error_class = WeightVersionError
    fix = "update the server's weights before sampling, and let nothing else update them"

    def __init__(self, what: str, version: str | None = None):
        super().__init__(what)
        self.version = version


class RolloutClient:
    """Talks to one or more rollout servers.

    urls: base addresses like ``http://10.0.0.1:30000``. connect_timeout, request_timeout: seconds, for opening a connection and for one
    whole request. max_retries: further tries after the first. backoff: seconds before the second try; doubles each time, at most 30.
    max_in_flight: requests under way at once, over all servers. pool: what is known of these servers, where several clients share it.

    May be used from several event loops one after another (each ``asyncio.run`` is one); connections live as long as their loop. Close with
    :meth:`aclose` or ``async with``.
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
    ):
        if not urls:
            raise ValueError("urls is empty: give the address of at least one rollout server")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout server address {url!r} must start with http:// or https://")
        if max_in_flight < 1 or max_retries < 0 or connect_timeout <= 0 or request_timeout <= 0 or backoff < 0:
            raise ValueError(
                "max_in_flight must be at least 1, max_retries and backoff at least 0, connect_timeout and request_timeout above 0; got "
                f"{max_in_flight=} {max_retries=} {backoff=} {connect_timeout=} {request_timeout=}"
            )
        self.urls = [url.rstrip("/") for url in urls]
        self.pool = ServerPool(self.urls) if pool is None else pool
        self.connect_timeout = connect_timeout
        self.request_timeout = request_timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_in_flight = max_in_flight
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    async def __aenter__(self) -> RolloutClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        if self._http is not None and self._loop is asyncio.get_running_loop():
            await self._http.aclose()
        self._http = self._loop = self._slots = None

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[dict[str, Any]],
        *,
        weight_version: str | None,
        rows_per_request: int,
        vocab_size: int | None = None,
    ) -> list[Completion]:
        """Sample one completion of every prompt; returns them in the prompts' order.

        prompts: token ids; sampling_params: one dict per prompt (``n`` must be absent or 1; give each its own ``sampling_seed``).
        weight_version: the version that every completion must have been sampled under; None accepts any.
        rows_per_request: prompts in one HTTP request, which goes to the healthy server with the fewest, a further try to another one.
        vocab_size: number of logits the model has; an id outside [0, vocab_size) is a failed try. None refuses negative ids alone.

        Raises RequestRefusedError at once when a server refuses a request (400), WeightVersionError or RolloutError when a request has
        failed ``max_retries + 1`` times; the other requests are then cancelled.
        """
        if len(prompts) != len(sampling_params):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params: give one per prompt")
        if rows_per_request < 1:
            raise ValueError(f"rows_per_request must be at least 1, got {rows_per_request}")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, or None for no upper bound; got {vocab_size}")
        if any(params.get("n", 1) != 1 for params in sampling_params):
            raise ValueError("n must be absent or 1: repeat the prompt with other seeds for more samples of it")

        async def request(start: int) -> list[Completion]:
            rows = slice(start, start + rows_per_request)
            body = {
                "input_ids": [list(prompt) for prompt in prompts[rows]],
                "sampling_params": list(sampling_params[rows]),
                "return_logprob": True,
            }

            def read(response: httpx.Response) -> list[Completion]:
                return read_completions(_json(response), body["sampling_params"], weight_version, vocab_size)

            return await self._call("POST", "/generate", read, body=body, held=lambda completions: completions[0].weight_version)

        answers = await _all_or_cancel([request(start) for start in range(0, len(prompts), rows_per_request)])
        return [completion for answer in answers for completion in answer]

    async def health(self) -> dict[str, bool]:
        """Whether each server answers /health with 200 within ``request_timeout``, in one try; by address."""

        async def one(index: int) -> bool:
            try:
                await self._call("GET", "/health", _nothing, index=index, tries=1)
            except RolloutError:
                return False
            return True

        return dict(zip(self.urls, await _all_or_cancel([one(i) for i in range(len(self.urls))]), strict=True))

    async def wait_until_healthy(self, timeout_seconds: float) -> None:
        """Return once every server is healthy; raises RolloutError naming one that is not after ``timeout_seconds``."""
        deadline = time.monotonic() + timeout_seconds
        pause = 0.05
        while True:
            # A server that does not answer must not hold this up beyond its own limit.
            try:
                async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
                    sick = [url for url, healthy in (await self.health()).items() if not healthy]
            except TimeoutError:
                sick = self.urls
            if not sick:
                return
            if time.monotonic() + pause >= deadline:
                raise RolloutError(
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
        """Let every server that is not dead load the Hugging Face directory ``path`` (on its own file system) as ``weight_version``, and
        check that it did. One that fails is dead from then on, in the pool.

        Raises, if all fail, what the first one did: RequestRefusedError with the server's message, WeightVersionError where one still
        reports another version, RolloutError.
        """

        def read(response: httpx.Response) -> None:
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
            if not isinstance(error, RolloutError):
                raise error
            self.pool.record(error.url, Event.UPDATE_FAILED, reason=error.what)
        if len(errors) == len(able):
            raise errors[0]

    async def _check_version(self, index: int, weight_version: str) -> None:
        def check(response: httpx.Response) -> None:
            found = _json_object(response).get("weight_version")
            if found != weight_version:
                raise _OtherVersionError(f"expected weight version {weight_version!r} after the update, but the server reports {found!r}")

        await self._call("GET", "/model_info", check, index=index)
        self.pool.record(self.urls[index], Event.ANSWERED, weight_version)

    async def probe(self, urls: Sequence[str]) -> list[str]:
        """Ask these servers whether they work and which weights they hold, once each; the pool hears of it. Returns those that failed."""

        async def one(url: str) -> bool:
            index = self.urls.index(url)
            try:
                # /model_info alone would be answered by a server whose engine hangs.
                await self._call("GET", "/health", _nothing, index=index, tries=1, limit=PROBE_SECONDS)
                info = await self._call("GET", "/model_info", _json_object, index=index, tries=1, limit=PROBE_SECONDS)
            except RolloutError as error:
                self.pool.record(url, Event.FAILED, reason=error.what)
                return False
            self.pool.record(url, Event.ANSWERED, str(info.get("weight_version")))
            return True

        answered = await asyncio.gather(*map(one, urls))
        return [url for url, well in zip(urls, answered, strict=True) if not well]

    async def tensor_parallel_sizes(self) -> dict[str, int]:
        """Processes that share each copy of the model, of every server that answers, asked once; the pool hears of the others.

        Raises what the last one did where none answers.
        """
        sizes: dict[str, int] = {}
        failure: RolloutError | None = None

        async def one(index: int) -> None:
            nonlocal failure
            try:
                info = await self._call("GET", "/server_info", _json_object, index=index, tries=1, limit=PROBE_SECONDS)
            except RolloutError as error:
                failure = error
                self.pool.record(self.urls[index], Event.FAILED, reason=error.what)
            else:
                sizes[self.urls[index]] = int(info.get("tp_size", 1))

        await asyncio.gather(*map(one, range(len(self.urls))))
        if not sizes and failure is not None:
            raise failure
        return sizes

    async def init_weights_update_group(
        self, addresses: Sequence[str], port: int, *, rank_offsets: Sequence[int], world_size: int, name: str, backend: str
    ) -> None:
        """Let every server join a process group whose rank 0 listens at ``port``; see :mod:`~dasd_megatron.rollout.weight_group`.

        addresses: of rank 0, as each server reaches it; rank_offsets: the rank of each server's first process; in the order of ``urls``.
        """
        common = {"master_port": port, "world_size": world_size, "group_name": name, "backend": backend}
        places = zip(addresses, rank_offsets, strict=True)
        bodies = [{**common, "master_address": address, "rank_offset": offset} for address, offset in places]
        await self._everywhere("POST", "/init_weights_update_group", _succeeded, bodies=bodies, tries=1)

    async def destroy_weights_update_group(self, name: str) -> None:
        """Let every server leave a process group."""
        await self._everywhere("POST", "/destroy_weights_update_group", _succeeded, body={"group_name": name}, tries=1)

    async def begin_weight_update(self) -> None:
        """Open a weight update on every server; answered once no request is running there. One that was left open is closed first."""

        async def begin(index: int) -> None:
            try:
                await self._call("POST", "/begin_weight_update", _succeeded, index=index, body={}, tries=1)
            except RequestRefusedError:
                # Left open by a sync that broke off, of this trainer or of one that is gone. What it has loaded is not named.
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

        payloads: for each server, in the order of ``urls``, one for each of its processes; see :func:`weight_payload.pack`. SGLang ends
        when it gets what it cannot read.
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
        """Stop every server's decoding; mode ``abort`` ends what is running, the others suspend it. New requests wait."""
        await self._everywhere("POST", "/pause_generation", _nothing, body={"mode": mode})

    async def continue_generation(self) -> None:
        """End the pause."""
        await self._everywhere("POST", "/continue_generation", _nothing, body={})

    async def abort_request(self, rid: str | None = None) -> None:
        """End one request early on whichever server runs it, or all requests where ``rid`` is None; what was sampled so far is answered."""
        body = {"abort_all": True} if rid is None else {"rid": rid}
        await self._everywhere("POST", "/abort_request", _nothing, body=body)

    async def flush_cache(self) -> None:
        """Drop every server's prefix cache; raises RequestRefusedError while requests are running."""
        await self._everywhere("POST", "/flush_cache", _nothing)

    async def release_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server give back this memory, which is then undefined; weights have to be sent again. SGLang needs
        ``--enable-memory-saver`` to give anything back, and ends when it is asked while requests run."""
        await self._everywhere("POST", "/release_memory_occupation", _nothing, body={"tags": list(tags)}, tries=1)

    async def resume_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server take this memory again, in one try: SGLang ends when it is asked for what is not released."""
        await self._everywhere("POST", "/resume_memory_occupation", _nothing, body={"tags": list(tags)}, tries=1)

    async def weight_checksums(self, skip: Sequence[str] = ()) -> list[list[dict[str, str]]]:
        """Checksums of every server's weights, in the order of ``urls``: by its own names of tensors, for each of its processes in the
        order of tensor-parallel ranks. ``skip``: parts of the names of tensors to leave out."""

        def read(response: httpx.Response) -> list[dict[str, str]]:
            _succeeded(response)
            ranks = _json_object(response).get("ranks")
            try:
                return [rank["checksums"] for rank in sorted(ranks, key=lambda rank: rank["parallelism_info"][0]["tp_rank"])]
            except (TypeError, KeyError, IndexError) as error:
                raise _TryAgainError(f"{response.url.path} answered no checksums: {str(ranks)[:80]}") from error

        return await self._everywhere("POST", "/weights_checker", read, body={"action": "checksum", "skip_tensor_list": list(skip)})

    async def _everywhere(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], T],
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
        read: Callable[[httpx.Response], T],
        *,
        index: int | None = None,
        body: Any = None,
        tries: int | None = None,
        limit: float | None = None,
        held: Callable[[T], str] | None = None,
    ) -> T:
        """One request until ``read`` accepts its answer: to server ``index``, or else each time to the one that the pool chooses and then
        tells how it went; ``held`` gives the weight version that an answer shows. ``limit``: seconds, where below ``request_timeout``."""
        tries = self.max_retries + 1 if tries is None else tries
        limit = self.request_timeout if limit is None else min(limit, self.request_timeout)
        http, slots = self._connections()
        failure = _TryAgainError("not tried")
        url, tried = ", ".join(self.urls), []
        for number in range(tries):
            if number:
                await asyncio.sleep(min(self.backoff * 2 ** (number - 1), MAX_BACKOFF_SECONDS))
            async with slots:
                chosen = self.pool.choose(tried) if index is None else self.urls[index]
                if chosen is None:
                    tries = max(number, 1)
                    if not tried:
                        failure = _OtherVersionError(f"no server holds the weights {self.pool.current!r}")
                    break
                url = chosen
                self.pool.begin(url)
                try:
                    async with asyncio.timeout(limit):
                        response = await http.request(method, url + path, json=body)
                    if response.status_code >= 500 or response.status_code in RETRIED_STATUS:
                        kind = _ClosingError if response.status_code == 503 else _TryAgainError
                        raise kind(f"{path} answered {response.status_code}: {_server_message(response)}")
                    if response.status_code >= 400:
                        raise RequestRefusedError(
                            url,
                            f"{path} refused with {response.status_code}: {_server_message(response)}",
                            number + 1,
                            "correct the request",
                        )
                    answer = read(response)
                except TimeoutError:
                    failure = _TryAgainError(f"{path} gave no answer within {limit:g} s")
                except httpx.HTTPError as error:  # refused, reset or timed-out connections and broken HTTP
                    failure = _TryAgainError(f"{path} failed: {type(error).__name__}: {error}")
                except _TryAgainError as error:
                    failure = error
                else:
                    if held is not None:
                        self.pool.record(url, Event.ANSWERED, held(answer))
                    return answer
                finally:
                    self.pool.end(url)
            if index is None:
                tried = [*(one for one in tried if one != url), url]
                self._record_failure(url, failure)
        raise failure.error_class(url, str(failure), tries, failure.fix) from failure

    def _record_failure(self, url: str, failure: _TryAgainError) -> None:
        other_version = isinstance(failure, _OtherVersionError) and failure.version is not None
        if other_version and self.pool.current is not None:
            self.pool.record(url, Event.ANSWERED, failure.version, reason=str(failure))
        else:
            self.pool.record(url, Event.CLOSING if isinstance(failure, _ClosingError) else Event.FAILED, reason=str(failure))

    def _connections(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The running loop's HTTP client and its limit on requests in flight. Connections of an ended loop cannot be used or closed."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._http is None or self._slots is None:
            self._loop = loop
            self._slots = asyncio.Semaphore(self.max_in_flight)
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(self.request_timeout, connect=self.connect_timeout),
                limits=httpx.Limits(max_connections=self.max_in_flight, max_keepalive_connections=self.max_in_flight),
                trust_env=False,  # rollout servers are inside the cluster: no proxy, no .netrc
            )
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


def _nothing(response: httpx.Response) -> None:
    """For answers whose status says it all."""


def _succeeded(response: httpx.Response) -> None:
    answer = _json_object(response)
    if answer.get("success") is not True:
        raise _TryAgainError(f"{response.url.path} failed: {answer.get('message')!r}")


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError as error:
        raise _TryAgainError(f"{response.url.path} answered what is not JSON ({error}): {response.content[:80]!r}") from error


def _json_object(response: httpx.Response) -> dict[str, Any]:
    answer = _json(response)
    if not isinstance(answer, dict):
        raise _TryAgainError(f"{response.url.path} answered {_kind(answer)} instead of an object")
    return answer


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _server_message(response: httpx.Response) -> str:
    """The server's own words, from any of SGLang's error bodies."""
    try:
        body = json.loads(response.content)
    except ValueError:
        return response.text[:300]
    if isinstance(body, dict):
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        return str(message or body.get("message") or body.get("detail") or body)[:1000]
    return str(body)[:300]


def read_completions(
    answer: Any, sampling_params: Sequence[dict[str, Any]], weight_version: str | None, vocab_size: int | None = None
) -> list[Completion]:
    """Check a parsed batch answer of /generate and read its completions; anything unsound counts as a failed try.

    sampling_params: those of the request, one per row; a row has at most its ``max_new_tokens`` tokens, where given. vocab_size: ids are in
    [0, vocab_size); None sets no upper bound.
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


def _read_row(row: Any, index: int, max_new_tokens: int | None, weight_version: str | None, vocab_size: int | None) -> Completion:
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
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise unsound("output_ids is not a list of integers")
    if not ids:
        # Every response ends with a stop token or at the limit, so that even the shortest has one token.
        raise unsound(f"no tokens, but finish_reason {reason['type']!r}")
    if max_new_tokens is not None and len(ids) > max_new_tokens:
        raise unsound(f"{len(ids)} tokens, but max_new_tokens is {max_new_tokens}")
    for position, token in enumerate(ids):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            bounds = "is negative" if vocab_size is None else f"is outside the vocabulary of {vocab_size}"
            raise unsound(f"id {token} of token {position} {bounds}")
    triples = meta.get("output_token_logprobs")
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) >= 2 for t in triples):
        raise unsound("output_token_logprobs is missing or not a list of [log-prob, id, text]")
    if len(triples) != len(ids):
        raise unsound(f"{len(triples)} log-probs for {len(ids)} tokens")
    for position, (triple, token) in enumerate(zip(triples, ids, strict=True)):
        value = triple[0]
        if type(value) not in (int, float) or not math.isfinite(value) or value > LOG_PROB_TOLERANCE:
            raise unsound(f"log-prob {value!r} of token {position}")
        if triple[1] != token:
            raise unsound(f"log-prob {position} belongs to token {triple[1]!r}, not to {token}")
    text = row.get("text", "")  # a server started without a tokenizer sends none
    if not isinstance(text, str):
        raise unsound(f"text is {_kind(text)}")
    version = meta.get("weight_version")
    # Under an update in flight SGLang lists the version of every span of tokens.
    spans = meta.get("weight_versions") or []
    versions = {str(version)} | {str(span["version"]) for span in spans if isinstance(span, dict) and "version" in span}
    if weight_version is not None and versions != {weight_version}:
        found = " and ".join(sorted(map(repr, versions)))
        raise _OtherVersionError(f"expected weight version {weight_version!r}, but row {index} was sampled under {found}", str(version))
    return Completion(ids, [float(triple[0]) for triple in triples], reason["type"], str(version), text)
