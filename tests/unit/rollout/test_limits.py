"""A step's limit of time, the request to stop that ends it early, and what is done while a step waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from dasd_megatron import stopping
from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout import limits
from dasd_megatron.rollout.limits import meanwhile, step_limit
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.stopping import StopRequested


def limited_to(seconds: float) -> RolloutConfig:
    return RolloutConfig(max_new_tokens=1, max_prompt_tokens=8, step_timeout_seconds=seconds)


@pytest.mark.parametrize(("seconds", "finished"), [(0.0, True), (0.2, True), (60.0, False)])
async def test_what_is_done_meanwhile_is_waited_for_a_little(
    seconds: float, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    async def alongside() -> None:
        await asyncio.sleep(seconds)
        done.append(True)

    monkeypatch.setattr(limits, "ALONGSIDE_SECONDS", 0.5)
    started = time.monotonic()
    async with meanwhile(alongside):
        pass
    assert bool(done) == finished and time.monotonic() - started < 5


async def test_an_error_meanwhile_is_not_lost() -> None:
    async def alongside() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with meanwhile(alongside):
            pass


async def test_a_step_has_an_end() -> None:
    config = limited_to(0.05)
    with pytest.raises(
        RolloutServerError, match=r"two rollouts did not finish within rollout\.step_timeout_seconds=0\.05"
    ):
        async with step_limit(config, ["http://server"], "two rollouts"):
            await asyncio.sleep(60)


async def test_progress_renews_the_limit_and_a_stall_ends_it() -> None:
    """Work of many times the limit goes on while it advances, and ends once it does not."""
    config, advances = limited_to(0.2), 0
    started = time.monotonic()
    with pytest.raises(
        RolloutServerError, match=r"8000 rollouts did not go on within rollout\.step_timeout_seconds=0\.2"
    ):
        async with step_limit(config, ["http://server"], "8000 rollouts") as advance:
            for _ in range(12):
                await asyncio.sleep(0.05)
                advance()
                advances += 1
            await asyncio.sleep(60)
    assert advances == 12 and time.monotonic() - started > 0.6


async def test_progress_does_not_undo_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StopRequested):
        async with step_limit(limited_to(60), ["http://server"], "rollouts") as advance:
            monkeypatch.setattr(stopping, "requested", lambda: True)
            monkeypatch.setattr(stopping, "raise_if_requested", lambda: (_ for _ in ()).throw(StopRequested("now")))
            while True:
                advance()
                await asyncio.sleep(0.01)


async def test_the_error_of_a_limit_names_every_server() -> None:
    with pytest.raises(RolloutServerError) as caught:
        async with step_limit(limited_to(0.01), ["http://a", "http://b"], "two rollouts"):
            await asyncio.sleep(60)
    assert (caught.value.url, caught.value.tries) == ("http://a, http://b", 1)
    assert "rollout.step_timeout_seconds" in caught.value.fix


async def test_a_step_that_is_done_in_time_is_not_disturbed() -> None:
    before = asyncio.all_tasks()
    async with step_limit(limited_to(60), ["http://a"], "two rollouts"):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    # The task that watches for a request to stop has ended too.
    assert asyncio.all_tasks() == before


async def test_an_error_inside_the_step_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with step_limit(limited_to(60), ["http://a"], "two rollouts"):
            raise ZeroDivisionError


@pytest.mark.parametrize("asked_before", [True, False])
async def test_a_request_to_stop_ends_a_step_at_once(asked_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(stopping, "_requested", asked)
    monkeypatch.setattr(limits, "STOP_POLL_SECONDS", 0.01)
    if asked_before:
        asked.set()
    started = time.monotonic()
    with pytest.raises(stopping.StopRequested):
        async with step_limit(limited_to(60), ["http://a"], "two rollouts"):
            asyncio.get_running_loop().call_later(0.05, asked.set)
            await asyncio.sleep(60)
    assert time.monotonic() - started < 5


async def test_nothing_has_to_be_done_meanwhile() -> None:
    async with meanwhile(None):
        pass


async def test_a_body_that_fails_cancels_what_is_done_meanwhile() -> None:
    cancelled = asyncio.Event()

    async def alongside() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(ZeroDivisionError):
        async with meanwhile(alongside):
            await asyncio.sleep(0)
            raise ZeroDivisionError
    assert cancelled.is_set()
