"""Limits on the time that a step waits for rollouts, and work that is done while it waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from dasd_megatron import stopping
from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.transport import RolloutServerError

ALONGSIDE_SECONDS = 2.0
STOP_POLL_SECONDS = 0.2


@contextlib.asynccontextmanager
async def step_limit(config: RolloutConfig, urls: Sequence[str], subject: str) -> AsyncIterator[Callable[[], None]]:
    """Limit the time of the body, or between two calls of the function that is yielded.

    It ends after ``config.step_timeout_seconds`` with a :class:`RolloutServerError`, and when the run is asked to stop
    with a :class:`~dasd_megatron.stopping.StopRequested`.
    """
    loop, advanced = asyncio.get_running_loop(), False

    def advance() -> None:
        nonlocal advanced
        advanced = True
        # A limit that has expired, or was moved up because the run is to stop, stays.
        if not stopping.requested() and not limit.expired():
            limit.reschedule(loop.time() + config.step_timeout_seconds)

    async def watch() -> None:
        while not stopping.requested():
            await asyncio.sleep(STOP_POLL_SECONDS)
        limit.reschedule(0.0)

    try:
        async with asyncio.timeout(config.step_timeout_seconds) as limit:
            watcher = asyncio.ensure_future(watch())
            try:
                yield advance
            finally:
                watcher.cancel()
    except TimeoutError as error:
        stopping.raise_if_requested()
        raise RolloutServerError(
            ", ".join(urls),
            f"{subject} did not {'go on' if advanced else 'finish'} within "
            f"rollout.step_timeout_seconds={config.step_timeout_seconds:g}",
            1,
            "look at the rollout server's log, or raise rollout.step_timeout_seconds",
        ) from error


@contextlib.asynccontextmanager
async def meanwhile(work: Callable[[], Awaitable[None]] | None) -> AsyncIterator[None]:
    """Run ``work`` while the body runs. Once the body is done, wait a little longer for the work and then cancel it.

    Its errors are raised.
    """
    if work is None:
        yield
        return
    task = asyncio.ensure_future(work())
    try:
        yield
        await asyncio.wait([task], timeout=ALONGSIDE_SECONDS)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
