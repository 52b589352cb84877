"""The trainer's side of the rollout servers: start the embedded one, hand over weights, collect rollouts, survive a dead server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.rollout.client import MemoryTag, RolloutClient, RolloutError
from dasd_megatron.rollout.generation import generate, make_client, make_samples, sampling_seed
from dasd_megatron.rollout.launch import LocalServer, ServerStartError
from dasd_megatron.rollout.pool import Event, ServerPool, Status
from dasd_megatron.rollout.samples import ReplayError, Sample, load_samples, rollouts_path
from dasd_megatron.training.export import export_model
from dasd_megatron.training.parallel import PeerError, broadcast_from_rank0, broadcast_in_replica, is_replica_source, on_selected_rank
from dasd_megatron.training.prepare import RunPaths
from dasd_megatron.training.weight_sync import WeightSync, WeightSyncError, make_sync, send_weights, verify_weights
from dasd_megatron.verify.grader import Grader, GraderError
from dasd_megatron.verify.reward import RewardError

T = TypeVar("T")


class RolloutFailure(RuntimeError):
    """The servers could not give the rollouts of a step; nothing of the step has been applied. Raised on every rank."""

    on_all_ranks = True


def replica_groups(config: Config) -> list[int]:
    """The prompt groups of a step, by their index in it, that this data-parallel replica trains on, minibatch after minibatch.

    Every minibatch takes the same groups of a step whatever the number of replicas.
    """
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    minibatch = config.batch.groups // config.batch.minibatches
    share = minibatch // replicas
    return [start + replica * share + index for start in range(0, config.batch.groups, minibatch) for index in range(share)]


class RolloutPlane:
    """Owns the embedded server (on global rank 0) and knows which weights the servers hold. Methods are collective over all ranks."""

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        grader: Grader,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> None:
        self.config, self.paths, self.grader, self.renderer = config, paths, grader, renderer
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.server: LocalServer | None = None
        self.urls: list[str] = list(config.rollout.servers)
        self.pool = ServerPool(self.urls)
        self.restarts = 0
        self.weight_version: str | None = None
        self.launched_version: str | None = None
        """The version on disk, from which a server is started."""
        self.sync: WeightSync | None = None
        self.released: set[MemoryTag] = set()
        """What the servers have given back; on global rank 0."""

    def __enter__(self) -> RolloutPlane:
        return self

    def __exit__(self, *_: object) -> None:
        if self.sync is not None:
            self.sync.close()
        if self.server is not None:
            self.server.stop()

    def sync_weights(self, model: ShardedModel, version: str, template_dir: Path) -> None:
        """Make every server serve the policy as ``version``.

        By ``rollout.weight_sync`` either from a directory ``weights/<version>``, of which older ones are removed, or over a process group.
        A server of the trainer's own always starts from a directory.

        Raises:
            RolloutFailure: a server did not take the weights.
        """
        if self.config.rollout.replay is not None:
            return
        self.weight_version, self._policy = version, (model, template_dir)
        own = self.config.rollout.engine != "external"
        self._take_back("weights")
        if self.config.rollout.weight_sync == "disk" or (own and self.launched_version is None):
            self._export(version)
            self.launched_version = version
            self.pool.expect(version)
            self._with_restarts(dist.get_rank() == 0, self._serve_current)
        else:
            self.pool.expect(version)
            self._with_restarts(False, lambda: None, fresh=False)
        self._take_back("kv_cache")
        self._verify(model)
        # What rank 0 has learned of the servers.
        self.urls, self.pool = broadcast_from_rank0((self.urls, self.pool))

    def _release(self) -> None:
        """The servers' memory is the trainer's until the next sync; every replica has its rollouts."""

        def work() -> None:
            asyncio.run(self._client_call("release_memory_occupation", ["weights", "kv_cache"]))
            self.released = {"weights", "kv_cache"}

        self._with_restarts(dist.get_rank() == 0, work)

    def _take_back(self, tag: MemoryTag) -> None:
        def work() -> None:
            # Not after a restart: SGLang ends when it is asked for what is not released.
            if tag in self.released:
                asyncio.run(self._client_call("resume_memory_occupation", [tag]))
                self.released.discard(tag)

        if self.config.rollout.release_memory:
            self._with_restarts(dist.get_rank() == 0, work)

    async def _client_call(self, name: str, tags: list[MemoryTag]) -> None:
        async with self._client() as client:
            await getattr(client, name)(tags)

    def _verify(self, model: ShardedModel) -> None:
        if not self.config.rollout.verify_weights:
            return
        error = verify_weights(model, self.config.rollout, self.pool.with_status(Status.SERVING), self.pool, self.weight_version)

        def report() -> None:
            if error is not None:
                raise error

        try:
            on_selected_rank(dist.get_rank() == 0, report, (WeightSyncError,))
        except PeerError as error:
            raise RolloutFailure(str(error)) from error

    def _export(self, version: str) -> None:
        model, template_dir = self._policy
        path = self.paths.weights / version
        # It lives until the next step: hashes would cost a pass over the bytes, and nobody would read them.
        export_model(model, path, template_dir=template_dir, manifest=False)
        if dist.get_rank() == 0:
            for old in self.paths.weights.iterdir():
                if old != path:
                    shutil.rmtree(old)

    def _serve_current(self) -> None:
        path = self.paths.weights / self.weight_version
        if self.config.rollout.engine != "external" and self.server is None:
            self.server = LocalServer(path, self.weight_version, self.config.rollout, self.paths.root / "logs" / "rollout_server.log")
            self.server.start()
            self._serves_alone(self.weight_version)
        else:
            asyncio.run(self._update_weights(self._client(), str(path.absolute())))

    def _client(self) -> RolloutClient:
        return make_client(self.config.rollout, self.urls, self.pool)

    def _serves_alone(self, version: str) -> None:
        """The trainer's own server is up, with the weights ``version``."""
        self.urls = [self.server.url]
        self.released = set()
        self.pool = ServerPool(self.urls)
        self.pool.expect(self.weight_version)
        self.pool.record(self.server.url, Event.ANSWERED, version)

    async def _update_weights(self, client: RolloutClient, path: str) -> None:
        async with client:
            await client.update_weights_from_disk(path, self.weight_version)

    def _send(self) -> None:
        """Send the policy over the process group, which is made the first time and after a failure.

        A server that breaks it off is left out of the next try, as long as others are left; else PeerError on every rank.
        """
        model, _ = self._policy
        while True:
            on_selected_rank(dist.get_rank() == 0, self._choose_receivers, (RolloutError,))
            error = send_weights(model, self.sync, self.weight_version, bucket_size=self.config.rollout.weight_bucket_bytes)
            again = dist.get_rank() == 0 and error is not None and self._leave_out(error)
            if not broadcast_from_rank0(again):
                break

        def report() -> None:
            if error is not None:
                raise error

        on_selected_rank(dist.get_rank() == 0, report, (WeightSyncError,))

    def _choose_receivers(self) -> None:
        """A group of the servers that are not known to be gone, unless there is one of just these."""
        dead = self.pool.with_status(Status.DEAD)
        able = [url for url in self.urls if url not in dead] or self.urls
        if self.sync is not None and self.sync.joined and self.sync.urls == able:
            return
        # Who does not answer now would keep the others waiting in the start of the group.
        sizes = asyncio.run(self._sizes(able))
        if self.sync is not None:
            self.sync.close()
        self.sync = make_sync(self.config.rollout, [url for url in able if url in sizes], sizes, self.pool)

    async def _sizes(self, urls: list[str]) -> dict[str, int]:
        async with make_client(self.config.rollout, urls, self.pool) as client:
            return await client.tensor_parallel_sizes()

    def _leave_out(self, error: WeightSyncError) -> bool:
        """Find out which servers a sync has failed for; whether it is known, and others are left."""
        gone = [error.url] if error.url is not None else asyncio.run(self._probe(self.sync.urls))
        for url in gone:
            self.pool.record(url, Event.UPDATE_FAILED, reason=str(error))
        return 0 < len(gone) < len(self.sync.urls)

    async def _probe(self, urls: list[str]) -> list[str]:
        async with self._client() as client:
            return await client.probe(urls)

    async def _revive(self) -> None:
        """Ask those that do not serve whether they do by now, and give those that came back the current weights."""
        unsure = [url for url in self.urls if self.pool.health[url].status is not Status.SERVING]
        if not unsure:
            return
        await self._probe(unsure)
        stale = self.pool.with_status(Status.STALE)
        # One replica is enough. Over a process group they get theirs with everybody's next weights.
        if stale and dist.get_rank() == 0 and self.config.rollout.weight_sync == "disk":
            # One try: who hangs would hold up every step.
            async with make_client(dataclasses.replace(self.config.rollout, max_retries=0), stale, self.pool) as client:
                with contextlib.suppress(RolloutError):  # the pool has it
                    await client.update_weights_from_disk(str((self.paths.weights / self.weight_version).absolute()), self.weight_version)

    def _with_restarts(self, selected: bool, work: Callable[[], T], *, fresh: bool = True) -> T | None:
        """``work`` where ``selected``; when it fails anywhere, restart the trainer's own server with the current weights and do it again.

        ``fresh``: the servers have the current weights already, unless they are restarted from an older directory.
        """
        while True:
            try:
                if not fresh:
                    self._send()
                    fresh = True
                return on_selected_rank(selected, work, (RolloutError, ServerStartError, GraderError))
            except PeerError as error:
                refusal, self.urls, self.pool = broadcast_from_rank0(
                    (self._restart(), self.urls, self.pool) if dist.get_rank() == 0 else None
                )
                if refusal is not None:
                    raise RolloutFailure(f"{error} ({refusal})") from error
                fresh = self.launched_version == self.weight_version

    def _restart(self) -> str | None:
        """Start the trainer's own server again, from the newest weights on disk, or see which of others' servers are back; returns why
        trying again is of no use, or None."""
        rollout = self.config.rollout
        if self.restarts >= rollout.max_restarts:
            return f"tried again rollout.max_restarts={rollout.max_restarts} times already"
        self.restarts += 1
        if self.server is None:
            asyncio.run(self._revive())
            # Over a process group, those that are back get their weights next.
            back = [Status.SERVING] if rollout.weight_sync == "disk" else [Status.SERVING, Status.STALE]
            return None if self.pool.with_status(*back) else "and no server is back"
        if self.sync is not None:
            self.sync.close()
            self.sync = None
        try:
            self.server.restart(self.paths.weights / self.launched_version, self.launched_version)
        except ServerStartError as error:
            return f"restart failed: {error}"
        self._serves_alone(self.launched_version)
        return None

    def on_rank0(self, work: Callable[[RolloutClient], T]) -> T | None:
        """Run ``work`` with a client on global rank 0, with the same recovery as rollouts; None on the other ranks."""
        return self._with_restarts(dist.get_rank() == 0, lambda: work(self._client()))

    def rollouts(self, step: int, problems: list[Problem]) -> tuple[list[Sample], float]:
        """Graded rollouts of this replica's share of ``problems`` (the step's prompts, by group) and the seconds that grading took, on
        every rank of the replica.

        Raises:
            RolloutFailure: the servers failed beyond repair, or the user's reward function failed.
            PeerError: rollout.replay lacks this step's rollouts.
        """
        groups = replica_groups(self.config)
        if self.config.rollout.replay is not None:
            graded = on_selected_rank(is_replica_source(), lambda: self._replayed(step, groups), (ReplayError,))
        else:
            graded = self._with_restarts(is_replica_source(), lambda: self._generated(step, problems, groups))
            if self.config.verify.reward is not None:
                self._raise_everywhere(graded)
            if self.config.rollout.release_memory:
                self._release()
        return broadcast_in_replica(graded)

    def _raise_everywhere(self, graded: tuple[list[Sample], float] | RewardError | None) -> None:
        """A reward function that fails, fails again however often servers are started anew: it stops the run on every rank."""

        def check() -> None:
            if isinstance(graded, RewardError):
                raise graded

        try:
            on_selected_rank(is_replica_source(), check, (RewardError,))
        except PeerError as error:
            raise RolloutFailure(str(error)) from error

    def _replayed(self, step: int, groups: list[int]) -> tuple[list[Sample], float]:
        batch = self.config.batch
        saved = load_samples(
            rollouts_path(self.config.rollout.replay, step), groups=batch.groups, samples_per_group=batch.samples_per_group
        )
        n = batch.samples_per_group
        return [sample for group in groups for sample in saved[group * n : (group + 1) * n]], 0.0

    def _generated(self, step: int, problems: list[Problem], groups: list[int]) -> tuple[list[Sample], float] | RewardError:
        rollout, n = self.config.rollout, self.config.batch.samples_per_group
        mine = [problems[group] for group in groups]
        prompts = [self.renderer.student(problem) for problem in mine]
        if not self.pool.with_status(Status.SERVING):
            asyncio.run(self._revive())
        completions = generate(
            self._client(),
            [prompt for prompt in prompts for _ in range(n)],
            [sampling_seed(self.config.run.seed, step, group, sample) for group in groups for sample in range(n)],
            rollout,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            weight_version=self.weight_version,
            rows_per_request=rollout.groups_per_request * n,
            vocab_size=self.vocab_size,
            alongside=self._revive,
        )
        started = time.perf_counter()
        try:
            samples = make_samples(mine, groups, prompts, completions, self.grader, samples_per_group=n, tokenizer=self.tokenizer)
        except RewardError as error:
            return error
        return samples, time.perf_counter() - started
