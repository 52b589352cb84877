"""The trainer's side of the rollout servers: hand over weights, collect rollouts, survive servers that fail.

Global rank 0 talks to the servers, for all replicas. The other ranks take part in what needs their weights, and get
their rollouts.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dasd_megatron import backend
from dasd_megatron.config import Config
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS
from dasd_megatron.plugins import PluginError
from dasd_megatron.rollout.buffer import BufferState
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.collector import Batch, Collector
from dasd_megatron.rollout.discovery import DiscoveryError, WrongModelError, find_servers
from dasd_megatron.rollout.local_server import ServerStartError
from dasd_megatron.rollout.pool import Status
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout_files import load_samples
from dasd_megatron.run.checks import teacher_of_rollouts
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.sample_columns import Columns, from_columns, to_columns, without_teacher
from dasd_megatron.samples import ReplayError, Sample, version_name, version_step
from dasd_megatron.training.batching import BatchLayout, ReplicaShare, make_micro_batches, replica_shares
from dasd_megatron.training.export import Policy, WeightDirectory
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.offload import STATE, WEIGHTS, TrainerMemory
from dasd_megatron.training.parallel import (
    Part,
    PeerError,
    broadcast_from_rank0,
    on_selected_rank,
    scatter_to_replicas,
    while_others_look,
)
from dasd_megatron.training.passes import score
from dasd_megatron.training.step_metrics import teacher_metrics
from dasd_megatron.training.weight_sync import make_weight_sync
from dasd_megatron.training.weight_sync.base import WeightSyncError, raise_failure
from dasd_megatron.training.weight_sync.verify import verify_weights
from dasd_megatron.verify.grader import Grader, GraderError

T = TypeVar("T")

PROBE_TOKENS = 32
_PLACES, _REWARDS = "share.places", "share.rewards"
"""Names of arrays beside a share's columns."""
_FINAL = (PluginError, TemplateError, DataError, OSError)
"""What a function or a template of the user's own, a problem or a disk fails with. It would fail again."""


class RolloutsUnavailableError(RuntimeError):
    """The run cannot go on for want of rollouts that it can train on; nothing of the step under way has been applied.

    Raised on every rank, once recovery from what a server failed at is of no use.
    """

    on_all_ranks = True


class ServersUnavailableError(RolloutsUnavailableError):
    """The servers failed, and recovery is of no use."""


class StepRollouts(NamedTuple):
    """A replica's part of the rollouts of one training step.

    columns: the share's samples as they came, without the teacher's prompts; grading_seconds: what grading took after
    the last rollout of the step had been sampled; metrics: of the collection, ``rollout/...``, those of all replicas
    together.
    """

    share: ReplicaShare
    columns: Columns
    grading_seconds: float
    metrics: dict[str, float]


class _Failure(NamedTuple):
    """A failure of rank 0 that comes again however often servers are started anew."""

    error: Exception


class _HandedOut(NamedTuple):
    """The rollouts that were handed out last, and their training step."""

    step: int
    batch: Batch


class RolloutPlane:
    """Traffic of weights to the servers and of rollouts to the ranks. Methods are collective over all ranks.

    It owns the fleet of servers, the way that weights reach them and, on global rank 0, the collector of rollouts.

    fleet: the servers, from :func:`open_fleet`; memory: what of the trainer's memory they get while they sample. state:
    where the order of problems and what was collected ahead go on; counts on rank 0.
    """

    def __init__(
        self,
        config: Config,
        *,
        fleet: ServerFleet,
        memory: TrainerMemory,
        paths: RunPaths,
        problems: list[Problem],
        grader: Grader,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        state: BufferState,
    ) -> None:
        self.config, self.fleet, self.memory = config, fleet, memory
        rank0, replays = dist.get_rank() == 0, config.rollout.replay is not None
        self.directory = WeightDirectory(paths.weights, WEIGHT_FORMATS[config.rollout.weight_format])
        self.sync = make_weight_sync(config.rollout, self.fleet, self.directory)
        self._policy: Policy | None = None
        self._state = state
        self._handed_out: _HandedOut | None = None
        self._vocab_size = vocab_size
        self._probe_ids = renderer.student(problems[0])[:PROBE_TOKENS]
        self._teacher = teacher_of_rollouts(config, renderer, problems, vocab_size)
        self.collector: Collector | None = None
        if rank0 and not replays:
            order = DataOrder(len(problems), config.run.seed, config.data.shuffle)
            self.collector = Collector(
                config.rollout,
                config.batch,
                problems=problems,
                order=order,
                renderer=renderer,
                teacher=self._teacher,
                grader=grader,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                state=state,
            )

    def __enter__(self) -> RolloutPlane:
        return self

    def __exit__(self, *_: object) -> None:
        if self.collector is not None:
            self.collector.close()
        if self.fleet.server is None:
            # Servers of others are to be of use afterwards.
            self.fleet.resume_memory("weights")
            self.fleet.resume_memory("kv_cache")
        self.sync.disconnect()
        self.fleet.stop_server()

    @property
    def weight_version(self) -> str | None:
        """The version of the weights that the servers are to serve; None before the first sync."""
        return None if self._policy is None else self._policy.version

    def sync_weights(self, model: ShardedModel, step: int, template_dir: Path) -> None:
        """Make every server serve the policy after ``step`` steps. Meanwhile rollouts in flight are waited for, broken
        off or suspended.

        Servers that take turns with the trainer get memory for their weights, and for the rest when they are to sample.

        Raises:
            RolloutsUnavailableError: no server took the weights. DeviceMemoryError: the host has no room for the
                trainer's state.
        """
        if self.config.rollout.replay is not None:
            return
        first = self._policy is None
        policy = self._policy = Policy(model, version_name(step), template_dir)
        # Only servers of others can be of another model.
        checks = first and not self.fleet.starts_server
        if checks:
            self._on_rank0_or_stop(lambda: self.fleet.check_served_models(model.bridge.hf_config))
        if self.collector is not None:
            self.collector.before_sync()
        self.fleet.pool.expect(policy.version)
        if self.config.rollout.release_memory:
            self.memory.release(*STATE)
            backend.current().release_cached_memory()
        self.fleet.resume_memory("weights")
        if self.fleet.starts_server and self.directory.is_empty():
            # A server starts from a directory, whichever way its later weights come.
            self.directory.write(policy)
            # A server takes its share of what is free when it starts.
            self.memory.release(WEIGHTS)
            self._with_recovery(lambda: self.fleet.start_server(self.directory.newest))
        else:
            self._with_recovery(self.sync.deliver, unsent=policy)
        if self.config.rollout.verify_weights:
            self.regain_weights()
            self._verify_weights(policy)
        if checks:
            self._check_served_weights(model)
        if self.collector is not None:
            if first:
                self.collector.connect(self.fleet.client())
            self.collector.after_sync(step)

    def regain_weights(self, *, servers_are_idle: bool = True) -> None:
        """Have the policy's weights on the devices again, where these have been left to the servers.

        Idle servers give up their room for keys and values, and get it again when they are to sample.

        Raises:
            DeviceMemoryError: there is no room for the weights.
        """
        if not self.memory.is_released(WEIGHTS):
            return
        if servers_are_idle:
            # The trainer's own server may have been started anew, and then serves only once it has these weights.
            urls = self.fleet.urls if self.fleet.starts_server else None
            on_selected_rank(dist.get_rank() == 0, lambda: self.fleet.release_memory(["kv_cache"], urls), ())
        self.memory.restore(WEIGHTS)

    def _begin_sampling(self) -> None:
        """Leave the devices to servers that take turns with the trainer."""
        if self.config.rollout.release_memory:
            self.memory.release(WEIGHTS)
            self.fleet.resume_memory("kv_cache")

    def on_rank0(self, work: Callable[[RolloutClient], T]) -> T | None:
        """Run ``work`` with a client on global rank 0, however long it takes, with the same recovery as rollouts; None
        on the other ranks.

        Raises:
            ServersUnavailableError: the servers failed, and recovery is of no use. RolloutsUnavailableError: a function
                of the user's own failed, or a disk.
        """
        return self._with_recovery(lambda: work(self.fleet.client()), samples=True, bounded=False)

    def start_over(self) -> None:
        """Forget the rollouts of a policy that is given up; the prompts that no step has trained on are sampled
        again."""
        self._handed_out = None
        if self.collector is not None:
            self.collector.start_over()

    def rollouts(self, step: int, discarded: int) -> StepRollouts:
        """Return graded rollouts for the training step ``step``, on every rank of a replica the same.

        ``discarded``: how many of the replayed steps are left out before it.

        Raises:
            RolloutsUnavailableError: the servers failed beyond repair, or a function of the user's own failed.
            StopRequested: a signal asked for it; what is in flight has been broken off.
            PeerError: rollout.replay lacks this step's rollouts.
        """
        rank0, rollout, replay = dist.get_rank() == 0, self.config.rollout, self.config.rollout.replay
        if replay is not None:
            samples = on_selected_rank(
                rank0, lambda: self._replay(step + discarded), (ReplayError, TemplateError, DataError)
            )
            self._state.position += self.config.batch.groups
            return _received(
                scatter_to_replicas(
                    None if samples is None else self._divide(samples, 0.0, self._teacher_metrics(samples))
                )
            )
        batch = self._with_recovery(self._take_batch, samples=True)
        if self.collector is not None:
            if rollout.release_memory:
                self.fleet.release_memory()
            self.collector.start_ahead(min(rollout.max_staleness, self.config.run.steps - step))
        if batch is None:
            return _received(scatter_to_replicas(None))
        self._handed_out = _HandedOut(step, batch)
        samples = batch.samples()
        metrics = _collection_metrics(batch, samples, step - 1) | self._teacher_metrics(samples)
        return _received(scatter_to_replicas(self._divide(samples, batch.grading_seconds, metrics)))

    def _teacher_metrics(self, samples: list[Sample]) -> dict[str, float]:
        return {} if self._teacher is None else teacher_metrics(samples, self._teacher.settings.privileged)

    def _replay(self, step: int) -> list[Sample]:
        """Return the saved rollouts of a step with the teacher's prompts, which no file has."""
        samples = load_replayed(self.config, step, self._vocab_size)
        if self._teacher is not None:
            for _, group in itertools.groupby(samples, key=lambda sample: sample.group):
                self._teacher.assign(list(group))
        return samples

    def state(self, step: int) -> BufferState:
        """Return where to go on after ``step`` steps, to be saved: on global rank 0, elsewhere as it was given. The
        prompts of a step that was begun and not finished are sampled again."""
        if self.collector is None:
            return self._state
        state = self.collector.state()
        if self._handed_out is not None and self._handed_out.step > step:
            batch = self._handed_out.batch
            state.pending = sorted([*state.pending, *(group.position for group in batch.groups)])
            state.counts = batch.counts
        return state

    def _with_recovery(
        self, work: Callable[[], T], *, unsent: Policy | None = None, samples: bool = False, bounded: bool = True
    ) -> T | None:
        """Return the result of ``work``, which global rank 0 does; None on the other ranks.

        If it fails, the fleet recovers and it is done again. ``unsent``: a policy that is sent to the servers before.
        ``samples``: the servers are to sample in it. ``bounded``: the work has a limit that a collective can wait for.
        """

        def attempt() -> T | _Failure:
            try:
                return work()
            except _FINAL as error:
                return _Failure(error)

        rank0 = dist.get_rank() == 0
        while True:
            try:
                if unsent is not None:
                    # Servers of others may still be at work on what has failed.
                    self.regain_weights(servers_are_idle=self.fleet.starts_server)
                    self.sync.send(unsent)
                    unsent = None
                if samples:
                    self._begin_sampling()
                done = attempt if bounded else while_others_look(rank0, attempt)
                result = on_selected_rank(rank0, done, (RolloutServerError, ServerStartError, GraderError))
            except PeerError as error:
                refusal = broadcast_from_rank0(on_selected_rank(rank0, self._recover, ()))
                if refusal is not None:
                    raise ServersUnavailableError(f"{error} ({refusal})") from error
                unsent = None if self.sync.can_catch_up(self.weight_version) else self._policy
            else:
                return self._raise_everywhere(result)

    def _recover(self) -> str | None:
        """Recover the fleet, on global rank 0; return why trying again is of no use, or None where it is."""
        refusal = self.fleet.recover(self.sync, self.directory)
        if refusal is None and self.fleet.server is not None and self.collector is not None:
            self.collector.connect(self.fleet.client())
        return refusal

    def _raise_everywhere(self, result: T | _Failure | None) -> T | None:
        """Stop the run on every rank where ``result`` is a failure of rank 0 that comes again however often servers are
        started anew."""

        def check() -> T | None:
            if isinstance(result, _Failure):
                raise result.error
            return result

        return self._on_rank0_or_stop(check)

    def _on_rank0_or_stop(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` on rank 0; an error that trying again cannot mend stops the run on every rank."""
        try:
            return on_selected_rank(
                dist.get_rank() == 0, work, (WrongModelError, RolloutServerError, WeightSyncError, *_FINAL)
            )
        except PeerError as error:
            raise RolloutsUnavailableError(str(error)) from error

    def _verify_weights(self, policy: Policy) -> None:
        """Stop the run if what the servers hold is not the policy."""
        pool = self.fleet.pool
        serving = pool.with_status(Status.SERVING)
        difference = verify_weights(policy.model, self.config.rollout, serving, pool, policy.version)
        self._on_rank0_or_stop(lambda: raise_failure(difference))

    def _check_served_weights(self, model: ShardedModel) -> None:
        """Stop the run if others' servers have not taken their first weights, or compute something else with them."""
        ids, parallel = self._probe_ids, self.config.parallel
        # Interleaved pipelining wants a sequence for each stage.
        copies = parallel.pipeline_model_parallel_size
        layout = BatchLayout.of_this_rank(self.config.batch, parallel, self.config.precision)
        batches = make_micro_batches([ids[:1]] * copies, [ids[1:]] * copies, layout)
        expected = score(model, batches, self.config.loss, temperature=1.0).log_prob[: len(ids) - 1].tolist()
        self._begin_sampling()
        self._on_rank0_or_stop(lambda: self.fleet.check_served_weights(ids, expected))

    def _take_batch(self) -> Batch:
        """Wait for a step's groups, on global rank 0; meanwhile servers that came back are updated."""
        if self.collector is None:
            raise RuntimeError("rollouts are collected on global rank 0 alone")
        update = functools.partial(self.fleet.update_returned_servers, self.sync)
        if not self.fleet.pool.with_status(Status.SERVING):
            asyncio.run(update())
        return self.collector.take(update)

    def _divide(self, samples: list[Sample], grading_seconds: float, metrics: dict[str, float]) -> list[Part]:
        """Divide a step's samples among the replicas."""
        replicas, minibatches = self.config.parallel.data_parallel_size, self.config.batch.minibatches
        shares = replica_shares(samples, replicas=replicas, minibatches=minibatches)
        facts = {"grading_seconds": grading_seconds, "metrics": metrics}
        return [
            Part(
                {
                    **to_columns(share.samples, with_teacher=True),
                    _PLACES: np.array(share.places, np.int64),
                    _REWARDS: np.array(share.rewards, np.float64),
                },
                facts,
            )
            for share in shares
        ]


def _received(part: Part) -> StepRollouts:
    """Return what a replica was sent as the samples that it trains on. Ids and log-probs are not copied."""
    columns = dict(part.arrays)
    places, rewards = columns.pop(_PLACES).tolist(), columns.pop(_REWARDS).tolist()
    share = ReplicaShare(from_columns(columns), places, rewards)
    return StepRollouts(share, without_teacher(columns), **part.facts)


def open_fleet(config: Config, paths: RunPaths, hf_config: PretrainedConfig) -> ServerFleet:
    """Return the servers of a run. Collective over all ranks; the servers of others are known to global rank 0.

    Where these take turns with a trainer that offloads, they give their memory back here, before the model takes its
    own.

    Raises:
        PeerError: no servers are found. RolloutsUnavailableError: none answers, or one serves another model than
            ``hf_config``.
    """
    rank0, urls = dist.get_rank() == 0, []
    if config.rollout.replay is None:
        urls = on_selected_rank(rank0, lambda: find_servers(config.rollout), (DiscoveryError,)) or []
    fleet = ServerFleet(config.rollout, urls, paths.root / "logs" / "rollout_server.log")
    if config.backend.offload != "none" and not fleet.starts_server:

        def free() -> None:
            fleet.check_served_models(hf_config)
            fleet.release_memory(urls=fleet.urls)

        try:
            on_selected_rank(rank0, free, (WrongModelError, RolloutServerError))
        except PeerError as error:
            raise RolloutsUnavailableError(str(error)) from error
    return fleet


def load_replayed(config: Config, step: int, vocab_size: int) -> list[Sample]:
    """Return the rollouts that ``rollout.replay`` holds for a step; raises ReplayError where it has none that can be
    trained on."""
    if config.rollout.replay is None:
        raise ValueError("rollout.replay is null")
    return load_samples(
        config.rollout.replay,
        step,
        groups=config.batch.groups,
        samples_per_group=config.batch.samples_per_group,
        vocab_size=vocab_size,
    )


def _collection_metrics(batch: Batch, samples: list[Sample], step: int) -> dict[str, float]:
    """Return what collecting the groups of a step took. ``step``: the training steps behind the weights that are about
    to be updated."""
    staleness = [step - version_step(sample.weight_version) for sample in samples]
    return {
        "rollout/staleness_mean": sum(staleness) / len(staleness),
        "rollout/staleness_max": max(staleness),
        "rollout/mixed_share": sum(len(sample.weight_versions) > 1 for sample in samples) / len(samples),
        "rollout/groups_drawn": batch.counts.drawn,
        "rollout/groups_filtered": batch.counts.filtered,
        "rollout/groups_restarted": batch.counts.restarted,
    }
