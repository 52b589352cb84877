"""Requests to rollout servers: time limits, retries and the choice of another server where one fails.

Requests are idempotent (each row to sample carries its own ``sampling_seed``), so that trying one again never doubles
a sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import aiohttp

from dasd_megatron import access
from dasd_megatron.errors import printable
from dasd_megatron.rollout.answers import (
    PLAIN_ANSWER_BYTES,
    Answer,
    FailedTryError,
    OtherVersionError,
    error_message,
)
from dasd_megatron.rollout.exchange import exchange, failed_try, open_session
from dasd_megatron.rollout.pool import Event, ServerPool

T = TypeVar("T")

MAX_BACKOFF_SECONDS = 30.0
DENIED_STATUS = frozenset({401, 403})
RETRIED_STATUS = frozenset({408, 425, 429})
"""Statuses that mean to try again, beside all of 5xx."""
_FAILURE_CHARACTERS = 2000
"""The most that a message says of one failure, which may hold a server's words."""


class RolloutServerError(RuntimeError):
    """A rollout server that cannot be used: ``url``, the ``failure`` in words, after how many ``tries``."""

    def __init__(self, url: str, failure: str, tries: int, fix: str):
        url, failure = printable(url), printable(failure, _FAILURE_CHARACTERS)
        super().__init__(f"{url}: {failure} (after {tries} {'try' if tries == 1 else 'tries'}); {fix}")
        self.url = url
        self.failure = failure
        self.tries = tries
        self.fix = fix


class RequestRefusedError(RolloutServerError):
    """The server understood the request and refused it (4xx); trying again cannot help."""


class AccessDeniedError(RolloutServerError):
    """The server does not take the client's API key, or asks for one (401, 403); trying again cannot help."""


class WeightVersionError(RolloutServerError):
    """The server answers under another weight version than the expected one."""


class _ClosingError(FailedTryError):
    """The server said that it is shutting down, or has too much to do."""


class _DeniedError(FailedTryError):
    def __init__(self, failure: str, fix: str):
        super().__init__(failure)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class _Request(Generic[T]):
    """A request, and how its answer is read: ``read`` raises FailedTryError where it does not accept the answer.

    body: goes as JSON, unless it is None; limit: seconds; most_bytes: of the answer; version_of: the weight version
    that an answer shows its server to hold.
    """

    method: str
    path: str
    body: Any
    read: Callable[[Answer], T]
    limit: float
    most_bytes: int
    version_of: Callable[[T], str | None] | None


class Transport:
    """Connections to rollout servers.

    urls: base addresses like ``http://10.0.0.1:30000``. connect_timeout, request_timeout: seconds, for opening a
    connection and for one whole request. max_retries: further tries after the first. backoff: seconds before the second
    try; doubles each time, at most 30. max_in_flight: requests under way at once, over all servers. pool: what is known
    of these servers, where several clients share it. router: address of an sglang-router before these servers, which
    gets the requests that any server may answer; all others go to each server. api_key: sent with every request; see
    :mod:`~dasd_megatron.access`.

    May be used from several event loops one after another (each ``asyncio.run`` is one); connections live as long as
    their loop. Close with :meth:`aclose`.
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

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        if self._http is not None and self._loop is asyncio.get_running_loop():
            await self._http.close()
        self._http = self._loop = self._slots = None

    async def _request_from_all(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        body: Any = None,
        *,
        bodies: Sequence[Any] | None = None,
        tries: int | None = None,
    ) -> list[T]:
        """Make one request to every server, all with ``body`` or each with its own of ``bodies``."""
        bodies = [body] * len(self.urls) if bodies is None else bodies
        calls = [self._request(method, path, read, index=i, body=own, tries=tries) for i, own in enumerate(bodies)]
        return await all_or_cancel(calls)

    async def _request(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        *,
        index: int | None = None,
        body: Any = None,
        tries: int | None = None,
        limit: float | None = None,
        most_bytes: int = PLAIN_ANSWER_BYTES,
        version_of: Callable[[T], str | None] | None = None,
    ) -> T:
        """Make one request until ``read`` accepts its answer.

        It goes to server ``index``. Without an index it goes to the router or, where there is none, each time to the
        server that the pool chooses. The pool then hears how it went, and by ``version_of`` which weight version an
        answer shows. ``limit``: seconds, where below ``request_timeout``. ``most_bytes``: of an answer that is read.

        Raises RequestRefusedError, AccessDeniedError, WeightVersionError or RolloutServerError.
        """
        tries = self.max_retries + 1 if tries is None else tries
        limit = self.request_timeout if limit is None else min(limit, self.request_timeout)
        request = _Request(method, path, body, read, limit, most_bytes, version_of)
        http, slots = await self._connections()
        routed = index is None and self.router is not None
        failure = FailedTryError("not tried")
        url = ", ".join(self.urls)
        tried: list[str] = []
        for number in range(tries):
            if number:
                await asyncio.sleep(min(self.backoff * 2 ** (number - 1), MAX_BACKOFF_SECONDS))
            async with slots:
                chosen = self._choose(index, tried)
                if chosen is None:
                    tries = max(number, 1)
                    if not tried:
                        failure = OtherVersionError(f"no server holds the weights {self.pool.current!r}")
                    break
                url = chosen
                try:
                    return await self._try(http, url, request, number + 1, routed)
                except FailedTryError as error:
                    failure = error
            if routed:
                self.pool.doubt(f"the router {url}: {failure}")
            elif index is None:
                tried = [*(other for other in tried if other != url), url]
                self._record_failure(url, failure)
            # A key that one server does not take may be taken by another.
            if isinstance(failure, _DeniedError) and (index is not None or routed or len(tried) == len(self.urls)):
                tries = number + 1
                break
        raise _final_error(failure, url, tries) from failure

    def _choose(self, index: int | None, tried: Sequence[str]) -> str | None:
        if index is not None:
            return self.urls[index]
        return self.pool.choose(tried) if self.router is None else self.router

    async def _try(self, http: aiohttp.ClientSession, url: str, request: _Request[T], number: int, routed: bool) -> T:
        """Make the request once; the pool counts it and hears of the version, unless the router chooses the server."""
        if routed:
            return await self._ask(http, url, request, number)
        self.pool.begin(url)
        try:
            answer = await self._ask(http, url, request, number)
            version = None if request.version_of is None else request.version_of(answer)
            if version is not None:
                self.pool.record(url, Event.ANSWERED, version)
            return answer
        finally:
            self.pool.end(url)

    async def _ask(self, http: aiohttp.ClientSession, url: str, request: _Request[T], number: int) -> T:
        """Make the request once and read the answer; raises FailedTryError, or RequestRefusedError for a 4xx."""
        path = request.path
        async with failed_try(path, request.limit):
            response = await self._exchange(http, request.method, url, path, request.body, request.most_bytes)
        if response.status >= 500 or response.status in RETRIED_STATUS:
            kind = _ClosingError if response.status == 503 else FailedTryError
            raise kind(f"{path} answered {response.status}: {error_message(response)}")
        if response.status in DENIED_STATUS:
            raise _DeniedError(*access.refusal(response.status, self._api_key))
        if response.status >= 400:
            failure = f"{path} refused with {response.status}: {error_message(response)}"
            raise RequestRefusedError(url, failure, number, "correct the request")
        return request.read(response)

    def _record_failure(self, url: str, failure: FailedTryError) -> None:
        version = failure.version if isinstance(failure, OtherVersionError) else None
        if version is not None and self.pool.current is not None:
            self.pool.record(url, Event.ANSWERED, version, reason=str(failure))
        else:
            event = Event.CLOSING if isinstance(failure, _ClosingError) else Event.FAILED
            self.pool.record(url, event, reason=str(failure))

    async def _exchange(
        self, http: aiohttp.ClientSession, method: str, url: str, path: str, body: Any, most_bytes: int
    ) -> Answer:
        """Make one request and read its whole answer; raises as :func:`exchange`."""
        return await exchange(http, method, url, path, body, most_bytes)

    async def _connections(self) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
        """Return the running loop's HTTP session and its limit on requests in flight.

        Connections of an ended loop cannot be used any more.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._http is None or self._slots is None:
            left, ended = self._http, self._loop
            self._loop = loop
            self._slots = asyncio.Semaphore(self.max_in_flight)
            self._http = open_session(self._api_key, self.connect_timeout, self.max_in_flight)
            if left is not None and ended is not None and ended.is_closed():
                await left.close()
        return self._http, self._slots


def _final_error(failure: FailedTryError, url: str, tries: int) -> RolloutServerError:
    """Return the error of a request whose last try failed so."""
    if isinstance(failure, _DeniedError):
        return AccessDeniedError(url, str(failure), tries, failure.fix)
    if isinstance(failure, OtherVersionError):
        fix = "update the server's weights before sampling, and let nothing else update them"
        return WeightVersionError(url, str(failure), tries, fix)
    return RolloutServerError(url, str(failure), tries, "check that the server is up and reachable, and its log")


async def all_or_cancel(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
