"""The trainer's side of the rollout servers: start the embedded one, hand over weights, collect rollouts, survive a dead server."""

from __future__ import annotations

import asyncio
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
from dasd_megatron.rollout.client import RolloutClient, RolloutError
from dasd_megatron.rollout.generation import generate, make_client, make_samples, sampling_seed
from dasd_megatron.rollout.launch import LocalServer, ServerStartError
from dasd_megatron.rollout.samples import ReplayError, Sample, load_samples, rollouts_path
from dasd_megatron.training.export import export_model
from dasd_megatron.training.parallel import PeerError, broadcast_from_rank0, broadcast_in_replica, is_replica_source, on_selected_rank
from dasd_megatron.training.prepare import RunPaths
from dasd_megatron.training.weight_sync import DistributedSync, WeightSyncError, send_weights
from dasd_megatron.verify.grader import Grader, GraderError

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
        self.restarts = 0
        self.weight_version: str | None = None
        self.launched_version: str | None = None
        """The version on disk, from which a server is started."""
        self.sync: DistributedSync | None = None

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
        if self.config.rollout.weight_sync == "disk" or (own and self.launched_version is None):
            self._export(version)
            self.launched_version = version
            self._with_restarts(dist.get_rank() == 0, self._serve_current)
            self.urls = broadcast_from_rank0(self.urls)
        else:
            self._with_restarts(False, lambda: None, fresh=False)

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
            self.urls = [self.server.url]
        else:
            asyncio.run(self._update_weights(make_client(self.config.rollout, self.urls), str(path.absolute())))

    async def _update_weights(self, client: RolloutClient, path: str) -> None:
        async with client:
            await client.update_weights_from_disk(path, self.weight_version)

    def _send(self) -> None:
        """Send the policy over the process group, which is made the first time; PeerError on every rank if that fails."""
        model, _ = self._policy

        def prepare() -> None:
            if self.sync is None:
                sizes = asyncio.run(self._server_sizes(make_client(self.config.rollout, self.urls)))
                self.sync = DistributedSync(self.config.rollout, self.urls, sizes)

        on_selected_rank(dist.get_rank() == 0, prepare, (RolloutError,))
        failure = send_weights(model, self.sync, self.weight_version, bucket_size=self.config.rollout.weight_bucket_bytes)

        def report() -> None:
            if failure is not None:
                raise WeightSyncError(failure)

        on_selected_rank(dist.get_rank() == 0, report, (WeightSyncError,))

    async def _server_sizes(self, client: RolloutClient) -> list[int]:
        async with client:
            return [int(info.get("tp_size", 1)) for info in await client.server_info()]

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
                refusal, self.urls = broadcast_from_rank0((self._restart(), self.urls) if dist.get_rank() == 0 else None)
                if refusal is not None:
                    raise RolloutFailure(f"{error} ({refusal})") from error
                fresh = self.launched_version == self.weight_version

    def _restart(self) -> str | None:
        """Start the trainer's own server again, from the newest weights on disk; returns why not, or None when it serves."""
        rollout = self.config.rollout
        if self.server is None:
            return "no server of ours to restart"
        if self.restarts >= rollout.max_restarts:
            return f"restarted rollout.max_restarts={rollout.max_restarts} times already"
        self.restarts += 1
        if self.sync is not None:
            self.sync.close()
            self.sync = None
        try:
            self.server.restart(self.paths.weights / self.launched_version, self.launched_version)
        except ServerStartError as error:
            return f"restart failed: {error}"
        self.urls = [self.server.url]
        return None

    def on_rank0(self, work: Callable[[RolloutClient], T]) -> T | None:
        """Run ``work`` with a client on global rank 0, with the same recovery as rollouts; None on the other ranks."""
        return self._with_restarts(dist.get_rank() == 0, lambda: work(make_client(self.config.rollout, self.urls)))

    def rollouts(self, step: int, problems: list[Problem]) -> tuple[list[Sample], float]:
        """Graded rollouts of this replica's share of ``problems`` (the step's prompts, by group) and the seconds that grading took, on
        every rank of the replica.

        Raises:
            RolloutFailure: the servers failed beyond repair.
            PeerError: rollout.replay lacks this step's rollouts.
        """
        groups = replica_groups(self.config)
        if self.config.rollout.replay is not None:
            graded = on_selected_rank(is_replica_source(), lambda: self._replayed(step, groups), (ReplayError,))
        else:
            graded = self._with_restarts(is_replica_source(), lambda: self._generated(step, problems, groups))
        return broadcast_in_replica(graded)

    def _replayed(self, step: int, groups: list[int]) -> tuple[list[Sample], float]:
        batch = self.config.batch
        saved = load_samples(
            rollouts_path(self.config.rollout.replay, step), groups=batch.groups, samples_per_group=batch.samples_per_group
        )
        n = batch.samples_per_group
        return [sample for group in groups for sample in saved[group * n : (group + 1) * n]], 0.0

    def _generated(self, step: int, problems: list[Problem], groups: list[int]) -> tuple[list[Sample], float]:
        rollout, n = self.config.rollout, self.config.batch.samples_per_group
        mine = [problems[group] for group in groups]
        prompts = [self.renderer.student(problem) for problem in mine]
        completions = generate(
            make_client(rollout, self.urls),
            [prompt for prompt in prompts for _ in range(n)],
            [sampling_seed(self.config.run.seed, step, group, sample) for group in groups for sample in range(n)],
            rollout,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            weight_version=self.weight_version,
            rows_per_request=rollout.groups_per_request * n,
            vocab_size=self.vocab_size,
        )
        started = time.perf_counter()
        samples = make_samples(mine, groups, prompts, completions, self.grader, samples_per_group=n, tokenizer=self.tokenizer)
        return samples, time.perf_counter() - started
