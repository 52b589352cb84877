"""The trainer's side of the rollout servers: start one, hand over weights, collect rollouts, survive a dead server.

Global rank 0 talks to the servers, for all replicas; the others take part in what needs their weights, and get their
rollouts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.plugins import PluginError
from dasd_megatron.rollout.buffer import BufferState
from dasd_megatron.rollout.client import MemoryTag, RolloutClient, RolloutServerError, make_client
from dasd_megatron.rollout.collector import Batch, Collector
from dasd_megatron.rollout.discovery import (
    DiscoveryError,
    WrongModelError,
    check_log_probs,
    check_models,
    check_updated,
    find_servers,
    probe_log_probs,
)
from dasd_megatron.rollout.local_server import LocalServer, ServerStartError
from dasd_megatron.rollout.pool import Event, ServerPool, Status
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.samples import ReplayError, Sample, load_samples, rollouts_path, version_name, version_step
from dasd_megatron.training.batching import BatchLayout, ReplicaShare, make_micro_batches, replica_shares
from dasd_megatron.training.export import export_model
from dasd_megatron.training.parallel import PeerError, broadcast_from_rank0, on_selected_rank, scatter_to_replicas
from dasd_megatron.training.passes import score
from dasd_megatron.training.weight_sync import WeightSync, WeightSyncError, make_sync, send_weights, verify_weights
from dasd_megatron.verify.grader import Grader, GraderError

T = TypeVar("T")

PROBE_TOKENS = 32


class RolloutsUnavailableError(RuntimeError):
    """The run cannot go on for want of rollouts that it can train on; nothing of the step under way has been applied.

    Raised on every rank, once recovery from what a server failed at is of no use.
    """

    on_all_ranks = True


class RolloutPlane:
    """Owns the trainer's own server and the collector of rollouts, on global rank 0. Methods are collective over all
    ranks.

    state: where the order of problems and what was collected ahead go on; counts on rank 0.
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        problems: list[Problem],
        grader: Grader,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        state: BufferState,
    ) -> None:
        self.config, self.paths = config, paths
        self.server: LocalServer | None = None
        rank0 = dist.get_rank() == 0
        self.urls: list[str] = []
        if config.rollout.replay is None:
            self.urls = on_selected_rank(rank0, lambda: find_servers(config.rollout), (DiscoveryError,)) or []
        self.pool = ServerPool(self.urls)
        self.restarts = 0
        self.weight_version: str | None = None
        self.launched_version: str | None = None
        """The version on disk, from which a server is started."""
        self.sync: WeightSync | None = None
        self._looked_at: set[str] = set()
        """Others' servers that have been found to serve the model of the run."""
        self.released: dict[str, set[MemoryTag]] = {}
        """What each server has given back; on global rank 0."""
        self._state = state
        self._handed_out: tuple[int, Batch] | None = None
        """The step whose rollouts were handed out last, and these; on global rank 0."""
        self._probe_ids = renderer.student(problems[0])[:PROBE_TOKENS]
        self.collector: Collector | None = None
        if rank0 and config.rollout.replay is None:
            self.collector = Collector(config, problems, renderer, grader, tokenizer, vocab_size, state)

    def __enter__(self) -> RolloutPlane:
        return self

    def __exit__(self, *_: object) -> None:
        if self.collector is not None:
            self.collector.close()
        if self.server is None:  # others' servers are to be of use afterwards
            for tag in ("weights", "kv_cache"):
                self._take_back(tag)
        if self.sync is not None:
            self.sync.close()
        if self.server is not None:
            self.server.stop()

    def sync_weights(self, model: ShardedModel, step: int, template_dir: Path) -> None:
        """Make every server serve the policy after ``step`` steps; rollouts in flight are waited for, broken off or
        suspended meanwhile.

        By ``rollout.weight_sync`` either from a directory ``weights/<version>``, of which older ones are removed, or
        over a process group. A server of the trainer's own always starts from a directory.

        Raises:
            RolloutsUnavailableError: no server took the weights.
        """
        if self.config.rollout.replay is not None:
            return
        first = self.weight_version is None
        self.weight_version, self._policy = version_name(step), (model, template_dir)
        own = self.config.rollout.engine != "external"
        checks = first and not own
        if checks:
            self._on_rank0_or_stop(lambda: self._look_at_servers(model))
        if self.collector is not None:
            self.collector.before_sync()
        self.pool.expect(self.weight_version)
        self._take_back("weights")
        if self.config.rollout.weight_sync == "disk" or (own and self.launched_version is None):
            self._export(self.weight_version)
            self.launched_version = self.weight_version
            self._with_restarts(self._serve_current)
        else:
            self._with_restarts(lambda: None, fresh=False)
        self._take_back("kv_cache")
        self._verify(model)
        if checks:
            self._check_served(model)
        if self.collector is not None:
            if first:
                self.collector.connect(self._client())
            self.collector.after_sync(step)

    def _on_rank0_or_stop(self, work: Callable[[], T]) -> T | None:
        """``work`` on rank 0; what trying again cannot mend stops the run on every rank."""
        try:
            return on_selected_rank(
                dist.get_rank() == 0, work, (WrongModelError, RolloutServerError, WeightSyncError, PluginError, OSError)
            )
        except PeerError as error:
            raise RolloutsUnavailableError(str(error)) from error

    def _look_at_servers(self, model: ShardedModel) -> None:
        """Before others' servers get weights: are they there, and do they serve this model?"""

        async def look() -> None:
            rollout = self.config.rollout
            async with make_client(
                dataclasses.replace(rollout, request_timeout_seconds=10.0), self.urls, self.pool
            ) as client:
                # A trainer that ended in the middle of an update may have left them suspended.
                await client.continue_generation()
                # The others may come later: each step asks.
                await client.wait_until_healthy(rollout.startup_timeout_seconds, one_is_enough=True)
                self._looked_at.update(await check_models(client, model.bridge.hf_config))

        asyncio.run(look())

    async def _of_this_model(self, urls: list[str]) -> list[str]:
        """Those of ``urls`` that serve the model of the run by what they say; of others' servers each is asked until it
        has answered."""
        if self.server is not None:
            return urls
        for url in urls:
            if url in self._looked_at:
                continue
            async with make_client(self.config.rollout, [url], self.pool) as client:
                try:
                    self._looked_at.update(await check_models(client, self._policy[0].bridge.hf_config))
                except WrongModelError as error:
                    self.pool.record(url, Event.UPDATE_FAILED, reason=str(error))
                except RolloutServerError as error:
                    self.pool.record(url, Event.FAILED, reason=error.what)
        return [url for url in urls if url in self._looked_at]

    def _check_served(self, model: ShardedModel) -> None:
        """After others' servers got weights for the first time: have they taken them, and do they compute the same with
        them?"""
        limit = self.config.rollout.max_log_prob_diff
        ids = self._probe_ids
        # Interleaved pipelining wants several.
        copies = self.config.parallel.pipeline_model_parallel_size
        layout = BatchLayout.of_this_rank(self.config.batch, self.config.parallel, self.config.precision)
        batches = make_micro_batches([ids[:1]] * copies, [ids[1:]] * copies, layout)
        expected = score(model, batches, self.config.loss, temperature=1.0).log_prob[: len(ids) - 1].tolist()

        async def check() -> None:
            async with self._client() as client:
                await check_updated(client)
                if limit is not None:
                    check_log_probs(await probe_log_probs(client, ids), expected, limit)

        self._on_rank0_or_stop(lambda: asyncio.run(check()))

    def _release(self) -> None:
        """The servers' memory is the trainer's until the next sync; every replica has its rollouts. For global rank
        0."""
        for url in self.pool.with_status(Status.SERVING):
            if self._ask(url, lambda client: client.release_memory_occupation(["weights", "kv_cache"])):
                self.released[url] = {"weights", "kv_cache"}

    def _take_back(self, tag: MemoryTag) -> None:
        """Not from a server that was started anew: SGLang ends when it is asked for what is not released."""
        for url, tags in self.released.items():
            if tag in tags and self._ask(url, lambda client: client.resume_memory_occupation([tag])):
                tags.discard(tag)

    def _ask(self, url: str, what: Callable[[RolloutClient], Awaitable[None]]) -> bool:
        """Whether a server did it; one that did not is dead to the pool, and started anew or left out as such."""

        async def ask() -> None:
            async with make_client(self.config.rollout, [url], self.pool) as client:
                await what(client)

        try:
            asyncio.run(ask())
        except RolloutServerError as error:
            self.pool.record(url, Event.UPDATE_FAILED, reason=error.what)
            return False
        return True

    def _verify(self, model: ShardedModel) -> None:
        if not self.config.rollout.verify_weights:
            return
        error = verify_weights(
            model, self.config.rollout, self.pool.with_status(Status.SERVING), self.pool, self.weight_version
        )

        def report() -> None:
            if error is not None:
                raise error

        self._on_rank0_or_stop(report)

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
            self.server = LocalServer(
                path, self.weight_version, self.config.rollout, self.paths.root / "logs" / "rollout_server.log"
            )
            self.server.start()
            self._serves_alone(self.weight_version)
        else:
            asyncio.run(self._update_weights(self.urls))

    def _client(self) -> RolloutClient:
        return make_client(self.config.rollout, self.urls, self.pool)

    def _serves_alone(self, version: str) -> None:
        """The trainer's own server is up, with the weights ``version``."""
        self.urls = [self.server.url]
        self.released = {}
        self.pool = ServerPool(self.urls)
        self.pool.expect(self.weight_version)
        self.pool.record(self.server.url, Event.ANSWERED, version)

    async def _update_weights(self, urls: list[str]) -> None:
        """From disk, in one try: one that fails is asked again by the next step, and does not hold up the others."""
        rollout, path = self.config.rollout, self.paths.weights / self.weight_version
        limits = dataclasses.replace(
            rollout, request_timeout_seconds=rollout.weight_sync_timeout_seconds, max_retries=0
        )
        async with make_client(limits, urls, self.pool) as client:
            await client.update_weights_from_disk(str(path.absolute()), self.weight_version)

    def _send(self) -> None:
        """Send the policy over the process group, which is made the first time and after a failure.

        A server that breaks it off is left out of the next try, as long as others are left; else PeerError on every
        rank.
        """
        model, _ = self._policy
        while True:
            on_selected_rank(dist.get_rank() == 0, self._choose_receivers, (RolloutServerError,))
            error = send_weights(
                model, self.sync, self.weight_version, bucket_size=self.config.rollout.weight_bucket_bytes
            )
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
        able = asyncio.run(self._of_this_model([url for url in self.urls if url not in dead])) or self.urls
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
        if self.config.rollout.unfinished == "retract":
            # They may have been away when a pause ended.
            async with make_client(self.config.rollout, unsure, self.pool) as client:
                await client.continue_generation()
        stale = await self._of_this_model(self.pool.with_status(Status.STALE))
        # Over a process group they get theirs with everybody's next weights.
        if stale and self.config.rollout.weight_sync == "disk":
            with contextlib.suppress(RolloutServerError):  # the pool has it
                await self._update_weights(stale)

    def _with_restarts(self, work: Callable[[], T], *, fresh: bool = True) -> T | None:
        """``work`` on rank 0; when it fails, restart the trainer's own server with the current weights and do it again.

        ``fresh``: the servers have the current weights already, unless they are restarted from an older directory.
        """

        def attempt() -> T | PluginError | OSError:
            try:
                return work()
            except (PluginError, OSError) as error:
                return error

        while True:
            try:
                if not fresh:
                    self._send()
                    fresh = True
                result = on_selected_rank(
                    dist.get_rank() == 0, attempt, (RolloutServerError, ServerStartError, GraderError)
                )
            except PeerError as error:
                refusal = broadcast_from_rank0(on_selected_rank(dist.get_rank() == 0, self._restart, ()))
                if refusal is not None:
                    raise RolloutsUnavailableError(f"{error} ({refusal})") from error
                # From disk ``work`` itself brings the weights.
                fresh = self.config.rollout.weight_sync == "disk" or self.launched_version == self.weight_version
            else:
                return self._raised_everywhere(result)

    def _restart(self) -> str | None:
        """Start the trainer's own server again, from the newest weights on disk, or see which of others' servers are
        back; returns why trying again is of no use, or None."""
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
        if self.collector is not None:
            self.collector.connect(self._client())
        return None

    def on_rank0(self, work: Callable[[RolloutClient], T]) -> T | None:
        """Run ``work`` with a client on global rank 0, with the same recovery as rollouts; None on the other ranks."""
        return self._with_restarts(lambda: work(self._client()))

    def start_over(self) -> None:
        """Forget the rollouts of a policy that is given up; the prompts that no step has trained on are sampled
        again."""
        self._handed_out = None
        if self.collector is not None:
            self.collector.start_over()

    def rollouts(self, step: int, discarded: int) -> tuple[ReplicaShare, float, dict[str, float]]:
        """Graded rollouts of this replica's share of the training step ``step``, the seconds that grading took after
        the last of them was sampled, and the step's metrics of collecting them; on every rank of the replica.
        ``discarded``: how many of the replayed steps
        are left out before it.

        Raises:
            RolloutsUnavailableError: the servers failed beyond repair, or a function of the user's own failed.
            StopRequested: a signal asked for it; what is in flight has been broken off.
            PeerError: rollout.replay lacks this step's rollouts.
        """
        rank0 = dist.get_rank() == 0
        if self.config.rollout.replay is not None:
            samples = on_selected_rank(rank0, lambda: self._replayed(step + discarded), (ReplayError,))
            self._state.position += self.config.batch.groups
            return scatter_to_replicas([(part, 0.0, {}) for part in self._shares(samples)] if rank0 else None)
        batch = self._with_restarts(self._take)
        if self.collector is not None:
            if self.config.rollout.release_memory:
                self._release()
            self.collector.start_ahead(min(self.config.rollout.max_staleness, self.config.run.steps - step))
        if not rank0:
            return scatter_to_replicas(None)
        self._handed_out = (step, batch)
        samples = batch.samples()
        metrics = _collection_metrics(batch, samples, step - 1)
        return scatter_to_replicas([(part, batch.grading_seconds, metrics) for part in self._shares(samples)])

    def state(self, step: int) -> BufferState:
        """Where to go on after ``step`` steps, to be saved; on global rank 0, elsewhere as it was given. The prompts of
        a step that was begun and not finished are sampled again."""
        if self.collector is None:
            return self._state
        state = self.collector.state()
        if self._handed_out is not None and self._handed_out[0] > step:
            batch = self._handed_out[1]
            state.pending = sorted([*state.pending, *(group.position for group in batch.groups)])
            state.counts = batch.counts
        return state

    def _shares(self, samples: list[Sample]) -> list[ReplicaShare]:
        parallel, batch = self.config.parallel, self.config.batch
        return replica_shares(samples, replicas=parallel.data_parallel_size, minibatches=batch.minibatches)

    def _raised_everywhere(self, result: T | PluginError | OSError) -> T:
        """A function of the user's own that fails, and a disk, fail again however often servers are started anew: they
        stop the run on every rank."""

        def check() -> T:
            if isinstance(result, (PluginError, OSError)):
                raise result
            return result

        return self._on_rank0_or_stop(check)

    def _take(self) -> Batch:
        if not self.pool.with_status(Status.SERVING):
            asyncio.run(self._revive())
        return self.collector.take(self._revive)

    def _replayed(self, step: int) -> list[Sample]:
        batch = self.config.batch
        path = rollouts_path(self.config.rollout.replay, step)
        return load_samples(path, groups=batch.groups, samples_per_group=batch.samples_per_group)


def _collection_metrics(batch: Batch, samples: list[Sample], step: int) -> dict[str, float]:
    """What collecting the groups of a step took. ``step``: the training steps behind the weights that are about to be
    updated."""
    staleness = [step - version_step(sample.weight_version) for sample in samples]
    return {
        "rollout/staleness_mean": sum(staleness) / len(staleness),
        "rollout/staleness_max": max(staleness),
        "rollout/mixed_share": sum(len(sample.weight_versions) > 1 for sample in samples) / len(samples),
        "rollout/groups_drawn": batch.counts.drawn,
        "rollout/groups_filtered": batch.counts.filtered,
        "rollout/groups_restarted": batch.counts.restarted,
    }
