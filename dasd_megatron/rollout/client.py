"""Asynchronous client of SGLang's native HTTP API, for SGLang itself and for the embedded server alike.

Every call has a time limit, failures are tried again a bounded number of times
(:mod:`~dasd_megatron.rollout.transport`), and an answer is used only after it has been checked
(:mod:`~dasd_megatron.rollout.answers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

from dasd_megatron import stopping
from dasd_megatron.access import api_key
from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.answers import (
    WORDS,
    Answer,
    Completion,
    FailedTryError,
    OtherVersionError,
    check_success,
    completions_bytes,
    ignore_answer,
    prompt_bytes,
    read_checksums,
    read_completions,
    read_json_object,
    read_prompt_log_probs,
    read_version,
    show,
)
from dasd_megatron.rollout.pool import Event, ServerPool, Status
from dasd_megatron.rollout.transport import (
    AccessDeniedError,
    RequestRefusedError,
    RolloutServerError,
    Transport,
    all_or_cancel,
)
from dasd_megatron.samples import ids_array

MemoryTag = Literal["weights", "kv_cache"]

PROBE_SECONDS = 10.0
MOST_PROCESSES = 4096
"""The most processes that a server may say to share the model among."""


class RolloutClient(Transport):
    """The endpoints of one or more rollout servers; :class:`Transport` describes the arguments.

    Close with :meth:`aclose` or ``async with``.
    """

    async def __aenter__(self) -> RolloutClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[dict[str, Any]],
        *,
        weight_version: str | Collection[str] | None,
        rows_per_request: int,
        vocab_size: int | None = None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        """Sample one completion of every prompt; returns them in the prompts' order.

        prompts: token ids, as lists or arrays. sampling_params: one dict per prompt (``n`` must be absent or 1; give
        each its own ``sampling_seed``). weight_version: the version that every token must have been sampled under, or
        the versions that it may have; a set is read when the answer comes. None accepts any. rows_per_request: prompts
        in one HTTP request. It goes to the healthy server with the fewest requests, and a further try to another one. A
        router takes one sampling_params for a whole request, and so one row at a time. vocab_size: number of logits the
        model has; an id outside [0, vocab_size) is a failed try. None refuses negative ids alone. on_answer is called
        when a request has been answered.

        Raises RequestRefusedError at once when a server refuses a request (400). Raises WeightVersionError or
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
                "input_ids": [ids_array(prompt).tolist() for prompt in prompts[rows]],
                "sampling_params": params if self.router is None else params[0],
                "return_logprob": True,
            }

            def read(response: Answer) -> list[Completion]:
                return read_completions(response, params, weight_version, vocab_size)

            most_bytes = completions_bytes(params)
            answer = await self._request(
                "POST", "/generate", read, body=body, most_bytes=most_bytes, version_of=self._version_after
            )
            on_answer()
            return answer

        answers = await all_or_cancel([request(start) for start in range(0, len(prompts), rows_per_request)])
        return [completion for answer in answers for completion in answer]

    def _version_after(self, completions: Sequence[Completion]) -> str | None:
        """Return the weight version that a server holds, by its answer.

        None where the answer does not say so, because its rows were done before an update.
        """
        versions = {completion.weight_version for completion in completions}
        if self.pool.current is None:
            return versions.pop()
        return self.pool.current if self.pool.current in versions else None

    async def health(self) -> dict[str, bool]:
        """Return by address whether each server answers /health with 200 within ``request_timeout``, in one try."""

        async def ask(index: int) -> bool:
            try:
                await self._request("GET", "/health", ignore_answer, index=index, tries=1)
            except RolloutServerError:
                return False
            return True

        return dict(zip(self.urls, await all_or_cancel([ask(i) for i in range(len(self.urls))]), strict=True))

    async def wait_until_healthy(self, timeout_seconds: float, *, one_is_enough: bool = False) -> None:
        """Return once every server is healthy, or one of them.

        Raises RolloutServerError after ``timeout_seconds``, naming one that is not healthy.
        """
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
        """Return /model_info of every server, in the order of ``urls``."""
        return await self._request_from_all("GET", "/model_info", read_json_object)

    async def server_info(self) -> list[dict[str, Any]]:
        """Return /server_info of every server, in the order of ``urls``."""
        return await self._request_from_all("GET", "/server_info", read_json_object)

    async def update_weights_from_disk(self, path: str, weight_version: str) -> None:
        """Let every server that is not dead load the Hugging Face directory ``path`` as ``weight_version``.

        The directory is on the server's own file system. The version is checked afterwards. A server that fails is dead
        from then on, in the pool.

        Raises, if all fail, what the first one did: RequestRefusedError with the server's message, WeightVersionError
        where one still reports another version, RolloutServerError.
        """

        def read(response: Answer) -> None:
            answer = read_json_object(response)
            if answer.get("success") is not True:
                raise FailedTryError(
                    f"/update_weights_from_disk of {path} failed: {show(answer.get('message'), WORDS)}"
                )

        body = {"model_path": str(path), "weight_version": weight_version}

        async def update(index: int) -> None:
            await self._request("POST", "/update_weights_from_disk", read, index=index, body=body)
            await self._check_version(index, weight_version)

        dead = self.pool.with_status(Status.DEAD)
        able = [index for index, url in enumerate(self.urls) if url not in dead] or list(range(len(self.urls)))
        outcomes = await asyncio.gather(*map(update, able), return_exceptions=True)
        errors = [outcome for outcome in outcomes if outcome is not None]
        for error in errors:
            if not isinstance(error, RolloutServerError):
                raise error
            self.pool.record(error.url, Event.UPDATE_FAILED, reason=error.failure)
        if len(errors) == len(able):
            raise errors[0]

    async def _check_version(self, index: int, weight_version: str) -> None:
        def check(response: Answer) -> None:
            found = read_json_object(response).get("weight_version")
            if found != weight_version:
                raise OtherVersionError(
                    f"expected weight version {weight_version!r} after the update, but the server reports {show(found)}"
                )

        await self._request("GET", "/model_info", check, index=index)
        self.pool.record(self.urls[index], Event.ANSWERED, weight_version)

    async def probe(self, urls: Sequence[str]) -> list[str]:
        """Ask these servers once each whether they work and which weights they hold; the pool hears of it.

        Returns those that failed.
        """

        async def ask(url: str) -> bool:
            index = self.urls.index(url)
            try:
                # /server_info asks the engine, which /model_info does not. SGLang's /health would generate, and the
                # engine may be paused.
                await self._request("GET", "/server_info", read_json_object, index=index, tries=1, limit=PROBE_SECONDS)
                version = await self._request(
                    "GET", "/model_info", read_version, index=index, tries=1, limit=PROBE_SECONDS
                )
            except RolloutServerError as error:
                self.pool.record(url, Event.FAILED, reason=error.failure)
                return False
            self.pool.record(url, Event.ANSWERED, version)
            return True

        answered = await asyncio.gather(*map(ask, urls))
        return [url for url, well in zip(urls, answered, strict=True) if not well]

    async def check_access(self, path: str = "/model_info") -> None:
        """Raise AccessDeniedError if a server that answers to ``path`` does not take the key.

        Servers that do not answer are let pass.
        """

        async def ask(index: int) -> None:
            try:
                await self._request("GET", path, ignore_answer, index=index, tries=1, limit=PROBE_SECONDS)
            except AccessDeniedError:
                raise
            except RolloutServerError:
                return

        await all_or_cancel([ask(index) for index in range(len(self.urls))])

    async def tensor_parallel_sizes(self) -> dict[str, int]:
        """Return by address how many processes share each copy of the model; raises as :meth:`descriptions`."""
        sizes: dict[str, int] = {}
        failure: RolloutServerError | None = None
        for url, info in (await self.descriptions()).items():
            size = info.get("tp_size", 1)
            if type(size) is int and 1 <= size <= MOST_PROCESSES:
                sizes[url] = size
            else:
                failure = RolloutServerError(url, f"/server_info says tp_size={show(size)}", 1, "look at its log")
                self.pool.record(url, Event.FAILED, reason=failure.failure)
        if not sizes and failure is not None:
            raise failure
        return sizes

    async def descriptions(self) -> dict[str, dict[str, Any]]:
        """Return by address /model_info and, over it, /server_info, which has the settings of the start.

        Every server is asked once, and those that answer are in the result. The pool hears of the others. Raises what
        the last one did where none answers.
        """
        found: dict[str, dict[str, Any]] = {}
        failure: RolloutServerError | None = None

        async def ask(index: int) -> None:
            nonlocal failure
            try:
                model, settings = [
                    await self._request("GET", path, read_json_object, index=index, tries=1, limit=PROBE_SECONDS)
                    for path in ("/model_info", "/server_info")
                ]
            except RolloutServerError as error:
                failure = error
                self.pool.record(self.urls[index], Event.FAILED, reason=error.failure)
            else:
                found[self.urls[index]] = model | settings

        await asyncio.gather(*map(ask, range(len(self.urls))))
        if not found and failure is not None:
            raise failure
        return found

    async def prompt_log_probs(self, url: str, input_ids: Sequence[int]) -> list[float]:
        """Return the log-probs of all of ``input_ids`` but the first, each after those before it, by one server.

        They are natural logs before temperature.

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
            return read_prompt_log_probs(response, input_ids)

        return await self._request(
            "POST", "/generate", read, index=self.urls.index(url), body=body, most_bytes=prompt_bytes(input_ids)
        )

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
        await self._request_from_all("POST", "/init_weights_update_group", check_success, bodies=bodies, tries=1)

    async def destroy_weights_update_group(self, name: str) -> None:
        """Let every server leave a process group."""
        await self._request_from_all(
            "POST", "/destroy_weights_update_group", check_success, body={"group_name": name}, tries=1
        )

    async def begin_weight_update(self) -> None:
        """Open a weight update on every server; answered once no request is running there.

        An update that was left open is closed first.
        """

        async def begin(index: int) -> None:
            try:
                await self._request("POST", "/begin_weight_update", check_success, index=index, body={}, tries=1)
            except RequestRefusedError:
                # A sync that broke off, of this trainer or of one that is gone, has left an update open. What it has
                # loaded gets no name.
                with contextlib.suppress(RequestRefusedError):
                    await self._request("POST", "/end_weight_update", check_success, index=index, body={}, tries=1)
                await self._request("POST", "/begin_weight_update", check_success, index=index, body={}, tries=1)

        await all_or_cancel([begin(index) for index in range(len(self.urls))])

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
        await self._request_from_all("POST", "/update_weights_from_distributed", check_success, body=body, tries=1)

    async def update_weights_from_tensor(self, payloads: Sequence[Sequence[str]]) -> None:
        """Let every server load one bucket out of this machine's memory; answered when it has it.

        payloads: for each server, in the order of ``urls``, one for each of its processes; see
        :func:`weight_payload.pack`. SGLang ends when it gets what it cannot read.
        """
        bodies = [{"serialized_named_tensors": list(texts), "load_format": "flattened_bucket"} for texts in payloads]
        await self._request_from_all("POST", "/update_weights_from_tensor", check_success, bodies=bodies, tries=1)

    async def end_weight_update(self, weight_version: str) -> None:
        """Close the update on every server, name what it serves now, and check that it does.

        The name comes last: a server for which an update breaks off, and that wakes up later, must not go by it.
        """
        await self._request_from_all("POST", "/end_weight_update", check_success, body={}, tries=1)
        body = {"new_version": weight_version, "abort_all_requests": False}
        await self._request_from_all("POST", "/update_weight_version", check_success, body=body, tries=1)
        await asyncio.gather(*(self._check_version(index, weight_version) for index in range(len(self.urls))))

    async def pause_generation(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        """Stop every server's decoding; new requests wait. Mode ``abort`` ends what is running, others suspend it."""
        await self._request_once_from_all("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """End the pause."""
        await self._request_once_from_all("/continue_generation", {})

    async def abort_request(self, rid: str | None = None) -> None:
        """End one request early on whichever server runs it, or all requests where ``rid`` is None.

        What was sampled until then is answered.
        """
        await self._request_once_from_all("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    async def _request_once_from_all(self, path: str, body: Any) -> None:
        """Ask every server that is not dead, once; the pool hears of those that fail, and nobody waits for them."""

        async def ask(index: int) -> None:
            try:
                await self._request("POST", path, ignore_answer, index=index, body=body, tries=1, limit=PROBE_SECONDS)
            except RolloutServerError as error:
                self.pool.record(error.url, Event.FAILED, reason=error.failure)

        dead = self.pool.with_status(Status.DEAD)
        await asyncio.gather(*(ask(index) for index, url in enumerate(self.urls) if url not in dead))

    async def flush_cache(self) -> None:
        """Drop every server's prefix cache; raises RequestRefusedError while requests are running."""
        await self._request_from_all("POST", "/flush_cache", ignore_answer)

    async def release_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server give back this memory, which is then undefined; weights have to be sent again.

        SGLang needs ``--enable-memory-saver`` to give anything back, and ends when it is asked while requests run.
        """
        await self._request_from_all(
            "POST", "/release_memory_occupation", ignore_answer, body={"tags": list(tags)}, tries=1
        )

    async def resume_memory_occupation(self, tags: Sequence[MemoryTag]) -> None:
        """Let every server take this memory again.

        There is one try, because SGLang ends when it is asked for what is not released.
        """
        await self._request_from_all(
            "POST", "/resume_memory_occupation", ignore_answer, body={"tags": list(tags)}, tries=1
        )

    async def weight_checksums(self, skip: Sequence[str] = ()) -> list[list[dict[str, str]]]:
        """Return the checksums of every server's weights, in the order of ``urls``.

        They are by the server's own names of tensors, for each of its processes in the order of tensor-parallel ranks.
        ``skip``: parts of the names of tensors to leave out.
        """
        body = {"action": "checksum", "skip_tensor_list": list(skip)}
        return await self._request_from_all("POST", "/weights_checker", read_checksums, body=body)


class ClientFactory(Protocol):
    """Factory of clients like :func:`make_client`; tests give fleets and weight syncs others."""

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
    """Return the sampling parameters of a request with one row for each seed."""
    common = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": config.top_k,
        "max_new_tokens": config.max_new_tokens,
    }
    return [{**common, "sampling_seed": seed} for seed in seeds]
