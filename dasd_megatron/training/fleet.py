"""The rollout servers of a run: which there are, which can be used, and what is done when one fails.

The health of each is decided in :mod:`~dasd_megatron.rollout.pool`. A server that broke off an update is dead to the
pool until it has answered a probe, and serves again only after a complete update.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PretrainedConfig

from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.client import ClientFactory, MemoryTag, RolloutClient, make_client
from dasd_megatron.rollout.discovery import (
    WrongModelError,
    check_log_probs,
    check_models,
    check_updated,
    probe_log_probs,
)
from dasd_megatron.rollout.local_server import LocalServer, ServerStartError
from dasd_megatron.rollout.pool import Event, ServerPool, Status
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.training.export import StoredWeights, WeightDirectory
from dasd_megatron.training.weight_sync.base import WeightSync, WeightSyncError

# Each step asks again before the first weights, so a server that answers late need not be waited for longer.
_CHECK_SECONDS = 10.0


class OwnServer(Protocol):
    """A server that the trainer starts; :class:`~dasd_megatron.rollout.local_server.LocalServer` is one."""

    @property
    def url(self) -> str:
        """Address of the server."""

    def start(self) -> None:
        """Start the process and return once it is healthy."""

    def restart(self, model_path: str | Path, weight_version: str) -> None:
        """Stop what is left of the process and start it again with these weights."""

    def stop(self) -> None:
        """End the process and all that it started."""


class ServerFactory(Protocol):
    """Factory of servers, with the arguments of :class:`~dasd_megatron.rollout.local_server.LocalServer`."""

    def __call__(
        self, model_path: str | Path, weight_version: str, rollout: RolloutConfig, log_path: str | Path, /
    ) -> OwnServer: ...


class ServerFleet:
    """The servers of a run: either servers of others, or one of the trainer's own, which is started here.

    Global rank 0 uses them. On other ranks a fleet has no servers, and what is done to all of them is nothing.

    config: limits of time, and the budget of restarts; urls: base addresses of others' servers; log_path: the file that
    the output of the trainer's own server is appended to; make_client, make_server: tests give others.

    Attributes:
        pool: the health of the servers. server: the trainer's own, once it has been started. restarts: how often
            recovery has been tried in this process. released: the memory that each server has given back.
    """

    def __init__(
        self,
        config: RolloutConfig,
        urls: Sequence[str],
        log_path: Path,
        *,
        make_client: ClientFactory = make_client,
        make_server: ServerFactory = LocalServer,
    ) -> None:
        self.config, self.urls, self.log_path = config, list(urls), log_path
        self.pool = ServerPool(self.urls)
        self.server: OwnServer | None = None
        self.restarts = 0
        self.released: dict[str, set[MemoryTag]] = {}
        self._make_client, self._make_server = make_client, make_server
        self._hf_config: PretrainedConfig | None = None
        self._checked: set[str] = set()
        """Others' servers that have been found to serve the model of the run."""

    @property
    def starts_server(self) -> bool:
        """True where the run has a server of its own."""
        return self.config.engine != "external"

    def client(self) -> RolloutClient:
        """Return a client of all servers."""
        return self._make_client(self.config, self.urls, self.pool)

    def check_served_models(self, hf_config: PretrainedConfig) -> None:
        """Wait for one of others' servers, and refuse those of another model. This comes before they get weights.

        Raises:
            WrongModelError: a server says that it serves another model than ``hf_config``.
            RolloutServerError: no server answers.
        """
        self._hf_config = hf_config

        async def check() -> None:
            limits = dataclasses.replace(self.config, request_timeout_seconds=_CHECK_SECONDS)
            async with self._make_client(limits, self.urls, self.pool) as client:
                # A trainer that ended in the middle of an update may have left them suspended.
                await client.continue_generation()
                # The other servers may come later: each step asks.
                await client.wait_until_healthy(self.config.startup_timeout_seconds, one_is_enough=True)
                self._checked.update(await check_models(client, hf_config))

        asyncio.run(check())

    def check_served_weights(self, input_ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Refuse servers that have not taken the first weights, or compute something else with them.

        log_probs: the trainer's own of all of ``input_ids`` but the first, natural, at temperature 1; compared where
        ``rollout.max_log_prob_diff`` is set.

        Raises:
            WrongModelError, RequestRefusedError: see :mod:`~dasd_megatron.rollout.discovery`.
        """
        limit = self.config.max_log_prob_diff

        async def check() -> None:
            async with self.client() as client:
                await check_updated(client)
                if limit is not None:
                    check_log_probs(await probe_log_probs(client, input_ids), log_probs, limit)

        asyncio.run(check())

    async def servers_of_this_run(self, urls: Sequence[str]) -> list[str]:
        """Return those of ``urls`` that serve the model of the run, by what they say of it.

        Each of others' servers is asked until it has answered once. The pool hears of those that fail, and of those
        with another model.
        """
        if self.server is not None or self._hf_config is None:
            return list(urls)
        for url in urls:
            if url in self._checked:
                continue
            async with self._make_client(self.config, [url], self.pool) as client:
                try:
                    self._checked.update(await check_models(client, self._hf_config))
                except WrongModelError as error:
                    self.pool.record(url, Event.UPDATE_FAILED, reason=str(error))
                except RolloutServerError as error:
                    self.pool.record(url, Event.FAILED, reason=error.failure)
        return [url for url in urls if url in self._checked]

    def release_memory(
        self, tags: Collection[MemoryTag] = ("weights", "kv_cache"), urls: Sequence[str] | None = None
    ) -> None:
        """Let the servers, which are idle, give back memory until it is resumed; None for ``urls``: all that serve."""
        asked = self.pool.with_status(Status.SERVING) if urls is None else urls
        # SGLang ends when it is asked twice.
        missing = {url: [tag for tag in tags if tag not in self.released.get(url, ())] for url in asked}
        missing = {url: left for url, left in missing.items() if left}
        for url in self._ask(list(missing), lambda client, url: client.release_memory_occupation(missing[url])):
            self.released.setdefault(url, set()).update(missing[url])

    def resume_memory(self, tag: MemoryTag) -> None:
        """Let the servers take back memory that they have released. A server that was started anew has not: SGLang ends
        when it is asked for what is not released."""
        asked = [url for url, tags in self.released.items() if tag in tags]
        for url in self._ask(asked, lambda client, _: client.resume_memory_occupation([tag])):
            self.released[url].discard(tag)

    def _ask(self, urls: Sequence[str], request: Callable[[RolloutClient, str], Awaitable[None]]) -> list[str]:
        """Ask servers, all at once; return those that did what they were asked for. The others are dead to the pool,
        and are started anew or left out as such."""

        async def ask(url: str) -> bool:
            try:
                async with self._make_client(self.config, [url], self.pool) as client:
                    await request(client, url)
            except RolloutServerError as error:
                self.pool.record(url, Event.UPDATE_FAILED, reason=error.failure)
                return False
            return True

        async def ask_all() -> list[bool]:
            return await asyncio.gather(*map(ask, urls))

        return [url for url, has_done_it in zip(urls, asyncio.run(ask_all()), strict=True) if has_done_it]

    # The following three methods make the fleet the weight_sync.base.Receivers of a weight sync.

    def choose_receivers(self) -> list[str]:
        """Return the servers that are not known to be gone and serve the model of the run; all where none is left."""
        dead = self.pool.with_status(Status.DEAD)
        return asyncio.run(self.servers_of_this_run([url for url in self.urls if url not in dead])) or self.urls

    def tensor_parallel_sizes(self, urls: Sequence[str]) -> dict[str, int]:
        """Return the number of processes that share the model, by address, of those servers that answer.

        Raises:
            RolloutServerError: none answers.
        """

        async def ask() -> dict[str, int]:
            async with self._make_client(self.config, urls, self.pool) as client:
                return await client.tensor_parallel_sizes()

        return asyncio.run(ask())

    def leave_out(self, urls: Sequence[str], error: WeightSyncError) -> bool:
        """Find out for which of ``urls`` a sync has failed, and take these for dead; return whether there are some, and
        others are left."""
        gone = [error.url] if error.url is not None else asyncio.run(self._probe(urls))
        for url in gone:
            self.pool.record(url, Event.UPDATE_FAILED, reason=str(error))
        return 0 < len(gone) < len(urls)

    def start_server(self, weights: StoredWeights) -> None:
        """Start the trainer's own server with ``weights``, unless recovery has started it already.

        Raises:
            ServerStartError: it did not become healthy.
        """
        if self.server is None:
            self.server = self._make_server(weights.path, weights.version, self.config, self.log_path)
            self.server.start()
            self._use_own_server(self.server, weights.version)

    def stop_server(self) -> None:
        """Stop the trainer's own server, if there is one."""
        if self.server is not None:
            self.server.stop()

    def recover(self, sync: WeightSync, directory: WeightDirectory) -> str | None:
        """Start the trainer's own server again from the newest weights on disk, or see which of others' servers are
        back.

        Returns:
            Why trying again is of no use, or None where it is.
        """
        if self.restarts >= self.config.max_restarts:
            return f"tried again rollout.max_restarts={self.config.max_restarts} times already"
        self.restarts += 1
        if self.server is not None:
            return self._restart_server(self.server, sync, directory.newest)
        asyncio.run(self.update_returned_servers(sync))
        # Weights that these servers could not catch up with are sent again, so that stale servers are of use too.
        usable = (Status.SERVING,) if sync.can_catch_up(self.pool.current) else (Status.SERVING, Status.STALE)
        return None if self.pool.with_status(*usable) else "and no server is back"

    async def update_returned_servers(self, sync: WeightSync) -> None:
        """Ask the servers that do not serve whether they work by now, and give those that came back the current
        weights, if rank 0 can do that alone."""
        unsure = [url for url in self.urls if self.pool.health[url].status is not Status.SERVING]
        if not unsure:
            return
        await self._probe(unsure)
        if self.config.unfinished == "retract":
            # They may have been away when a pause ended.
            async with self._make_client(self.config, unsure, self.pool) as client:
                await client.continue_generation()
        stale = await self.servers_of_this_run(self.pool.with_status(Status.STALE))
        if stale:
            with contextlib.suppress(RolloutServerError):  # the pool knows of it
                await sync.catch_up(stale)

    async def _probe(self, urls: Sequence[str]) -> list[str]:
        """Ask these servers whether they work; return those that do not."""
        async with self.client() as client:
            return await client.probe(urls)

    def _restart_server(self, server: OwnServer, sync: WeightSync, weights: StoredWeights) -> str | None:
        sync.disconnect()
        try:
            server.restart(weights.path, weights.version)
        except ServerStartError as error:
            return f"restart failed: {error}"
        self._use_own_server(server, weights.version)
        return None

    def _use_own_server(self, server: OwnServer, version: str) -> None:
        """Let the fleet consist of the trainer's own server, which has just come up with the weights ``version``."""
        current = self.pool.current
        self.urls, self.released = [server.url], {}
        self.pool = ServerPool(self.urls)
        self.pool.expect(current)
        self.pool.record(server.url, Event.ANSWERED, version)
