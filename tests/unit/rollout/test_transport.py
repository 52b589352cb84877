"""A request whose server fails is tried again, goes to another server, or is given up."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from dasd_megatron.rollout import transport
from dasd_megatron.rollout.answers import Answer, FailedTryError, OtherVersionError
from dasd_megatron.rollout.pool import Event, Status
from dasd_megatron.rollout.transport import (
    AccessDeniedError,
    RequestRefusedError,
    RolloutServerError,
    Transport,
    WeightVersionError,
    all_or_cancel,
)

A, B, ROUTER = "http://a:1", "http://b:1", "http://router:1"


class ScriptedTransport(Transport):
    """A transport whose servers answer with the statuses, or raise the errors, of a script; after that with 200."""

    def __init__(self, script: dict[str, list[int | Exception]], **options: Any) -> None:
        defaults = {"connect_timeout": 1.0, "request_timeout": 1.0, "max_retries": 2, "backoff": 0.0}
        super().__init__([A, B], **{**defaults, "max_in_flight": 4, **options})
        self.script = script
        self.asked: list[str] = []

    async def _exchange(
        self, http: aiohttp.ClientSession, method: str, url: str, path: str, body: Any, most_bytes: int
    ) -> Answer:
        self.asked.append(url)
        left = self.script.get(url, [])
        outcome = left.pop(0) if left else 200
        if isinstance(outcome, Exception):
            raise outcome
        return Answer(path, outcome, b'{"error": {"message": "injected"}}')

    async def ask(self, **options: Any) -> str:
        """Make one request; its answer is the body."""
        try:
            return await self._request("POST", "/path", lambda answer: answer.content.decode(), **options)
        finally:
            await self.aclose()


def refused() -> Exception:
    return aiohttp.ClientConnectionError("connection refused")


@pytest.mark.parametrize("failure", [refused(), TimeoutError(), 500, 502, 503, 408, 425, 429])
async def test_another_server_is_asked_where_one_fails(failure: int | Exception) -> None:
    servers = ScriptedTransport({A: [failure]})
    assert "injected" in await servers.ask()
    assert servers.asked == [A, B]
    closing = failure == 503
    assert servers.pool.health[A].status is (Status.DRAINING if closing else Status.SUSPECT)


async def test_a_request_to_one_server_stays_there() -> None:
    servers = ScriptedTransport({A: [500, 500]})
    await servers.ask(index=0)
    assert servers.asked == [A, A, A]
    # Whoever asks a certain server tells the pool what that means.
    assert servers.pool.health[A].status is Status.STARTING


@pytest.mark.parametrize(("tries", "expected"), [(None, 3), (1, 1), (5, 5)])
async def test_tries_come_to_an_end(tries: int | None, expected: int) -> None:
    servers = ScriptedTransport({A: [500] * 9, B: [500] * 9})
    with pytest.raises(RolloutServerError, match=rf"/path answered 500: injected \(after {expected} tr") as caught:
        await servers.ask(tries=tries)
    assert (caught.value.tries, len(servers.asked)) == (expected, expected)
    # They take turns, and the error names the server that was asked last.
    assert servers.asked == [A, B, A, B, A][:expected] and caught.value.url == servers.asked[-1]


async def test_waits_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(transport.asyncio, "sleep", sleep)
    servers = ScriptedTransport({A: [500] * 9, B: [500] * 9}, backoff=5.0, max_retries=5)
    with pytest.raises(RolloutServerError):
        await servers.ask()
    assert waits == [5.0, 10.0, 20.0, 30.0, 30.0]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_a_refused_request_is_not_made_again(status: int) -> None:
    servers = ScriptedTransport({A: [status]})
    with pytest.raises(RequestRefusedError, match=f"/path refused with {status}: injected") as caught:
        await servers.ask()
    assert (caught.value.url, caught.value.tries, servers.asked) == (A, 1, [A])


async def test_a_key_that_one_server_does_not_take_may_be_taken_by_another() -> None:
    servers = ScriptedTransport({A: [401]})
    await servers.ask()
    assert servers.asked == [A, B]


@pytest.mark.parametrize(("options", "asked"), [({}, [A, B]), ({"index": 1}, [B])])
async def test_a_key_that_nobody_takes_is_an_error_at_once(options: dict[str, int], asked: list[str]) -> None:
    servers = ScriptedTransport({A: [403] * 9, B: [403] * 9}, max_retries=8)
    with pytest.raises(AccessDeniedError):
        await servers.ask(**options)
    assert servers.asked == asked


async def test_requests_go_through_the_router_and_its_failures_are_nobodys() -> None:
    servers = ScriptedTransport({ROUTER: [500]}, router=ROUTER + "/")
    servers.pool.record(A, Event.ANSWERED, "v1")
    await servers.ask()
    assert servers.asked == [ROUTER, ROUTER]
    # Nobody knows which server failed, so those that served are suspected.
    assert [servers.pool.health[url].status for url in (A, B)] == [Status.SUSPECT, Status.STARTING]
    # What concerns one server goes past the router.
    await servers.ask(index=1)
    assert servers.asked[2:] == [B]


async def test_without_a_server_that_holds_the_weights_nobody_is_asked() -> None:
    servers = ScriptedTransport({})
    servers.pool.expect("v2")
    for url in (A, B):
        servers.pool.record(url, Event.ANSWERED, "v1")
    with pytest.raises(WeightVersionError, match=r"no server holds the weights 'v2' \(after 1 try\)"):
        await servers.ask()
    assert servers.asked == []


async def test_an_answer_under_other_weights_is_asked_for_elsewhere() -> None:
    servers = ScriptedTransport({})
    servers.pool.expect("v2")

    def read(answer: Answer) -> str:
        if len(servers.asked) == 1:
            raise OtherVersionError("sampled under 'v1'", "v1")
        return "v2"

    async def ask() -> str:
        async with asyncio.timeout(5):
            return await servers._request("POST", "/path", read, version_of=lambda answer: answer)

    assert await ask() == "v2"
    await servers.aclose()
    assert servers.asked == [A, B]
    assert [servers.pool.health[url].status for url in (A, B)] == [Status.STALE, Status.SERVING]


async def test_an_answer_that_cannot_be_used_counts_as_a_failure() -> None:
    servers = ScriptedTransport({})

    def read(answer: Answer) -> str:
        raise FailedTryError("row 0: no tokens")

    with pytest.raises(RolloutServerError, match=r"row 0: no tokens \(after 3 tries\)"):
        await servers._request("POST", "/path", read)
    await servers.aclose()
    assert servers.pool.health[A].failures == 2 and servers.pool.health[B].failures == 1


async def test_an_answer_that_does_not_come_has_the_requests_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_arguments: Any) -> Answer:
        await asyncio.sleep(60)
        raise AssertionError

    servers = ScriptedTransport({}, max_retries=0)
    monkeypatch.setattr(servers, "_exchange", hang)
    with pytest.raises(RolloutServerError, match=r"/path gave no answer within 0\.01 s"):
        await servers.ask(limit=0.01)


async def test_the_first_failure_cancels_the_other_calls() -> None:
    cancelled: list[bool] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await all_or_cancel([wait(), fail(), wait()])
    assert cancelled == [True, True]


async def test_results_come_in_the_order_of_the_calls() -> None:
    async def answer(number: int) -> int:
        await asyncio.sleep(0.02 / (number + 1))
        return number

    assert await all_or_cancel([answer(number) for number in range(4)]) == [0, 1, 2, 3]
