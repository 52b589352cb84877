"""Recovery of the trainer's side: what is tried again, and what ends the run, on every rank alike."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.backend import cpu
from dasd_megatron.config import load_config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.plugins import PluginError
from dasd_megatron.rollout.buffer import BufferState
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.pool import Event
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.training import export, parallel, rollout_plane
from dasd_megatron.training.export import Policy
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.offload import STATE, WEIGHTS, DeviceMemoryError, TrainerMemory
from dasd_megatron.training.parallel import on_selected_rank
from dasd_megatron.training.rollout_plane import (
    RolloutPlane,
    RolloutsUnavailableError,
    ServersUnavailableError,
    open_fleet,
)
from dasd_megatron.training.weight_sync.base import WeightSync
from dasd_megatron.training.weight_sync.disk import DiskSync
from tests.support.fake_servers import MODEL, FakeModel, FakeServer, FakeServers
from tests.support.thread_ranks import ThreadRanks

RANKS = 2
TOKENIZER = character_tokenizer()
OVERRIDES = ["experiment=quickstart", "rollout.max_restarts=2", "rollout.max_retries=0", "verify.workers=0"]
CONFIG = load_config(OVERRIDES)
GONE = "RolloutServerError: http://own:1: gone (after 1 try); mend it"


class StreamedSync(WeightSync):
    """A way without a file: it notes what is sent, and fails the next ``failures`` times."""

    failures = 0

    @functools.cached_property
    def sent(self) -> list[str]:
        return []

    def send(self, policy: Policy) -> None:
        def send() -> None:
            self.sent.append(policy.version)
            if self.failures:
                self.failures -= 1
                raise server_error()
            for url in self.receivers.urls:
                self.receivers.pool.record(url, Event.ANSWERED, policy.version)

        on_selected_rank(dist.get_rank() == 0, send, (RolloutServerError,))

    def deliver(self) -> None: ...

    async def catch_up(self, urls: Sequence[str]) -> None: ...

    def disconnect(self) -> None: ...


def server_error() -> RolloutServerError:
    return RolloutServerError("http://own:1", "gone", 1, "mend it")


class Run:
    """A run of :data:`RANKS` ranks with a server of its own."""

    def __init__(self, way: type[WeightSync], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers = FakeServers()
        self.ranks = ThreadRanks(RANKS, monkeypatch)
        self.folder, self.config = folder, CONFIG
        # It has nothing to release, and so reads nothing of model and optimizer.
        nothing: Any = None
        self.memory = TrainerMemory("none", nothing, nothing)
        fakes = {"make_client": self.servers.make_client, "make_server": self.servers.make_server}
        monkeypatch.setattr(rollout_plane, "ServerFleet", functools.partial(ServerFleet, **fakes))
        monkeypatch.setattr(
            rollout_plane, "make_weight_sync", functools.partial(way, make_client=self.servers.make_client)
        )
        monkeypatch.setattr(export, "export_model", lambda model, path, **_: path.mkdir(parents=True, exist_ok=True))

    def __call__(self, work: Callable[[RolloutPlane], Any]) -> list[Any]:
        """Do ``work`` with a plane on every rank; what each returned or raised."""

        def be_rank(_rank: int) -> Any:
            renderer, problems = PromptRenderer(TOKENIZER), [Problem("p", "1+1 =", "2", "2")]
            paths = RunPaths(self.folder)
            arguments: dict[str, Any] = {"paths": paths, "problems": problems, "grader": None, "renderer": renderer}
            arguments |= {"fleet": open_fleet(self.config, paths, MODEL), "memory": self.memory}
            with RolloutPlane(
                self.config, **arguments, tokenizer=TOKENIZER, vocab_size=100, state=BufferState()
            ) as plane:
                return work(plane)

        return self.ranks.run(be_rank)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(DiskSync, tmp_path, monkeypatch)


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(StreamedSync, tmp_path, monkeypatch)


def failing(*errors: Exception) -> Callable[[RolloutClient], str]:
    """Work that fails so often and then is done."""
    left = list(errors)

    def work(_client: RolloutClient) -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


def sync(plane: RolloutPlane, *steps: int) -> None:
    for step in steps:
        plane.sync_weights(FakeModel(), step, Path("template"))  # type: ignore[arg-type] - it has all that is used


def test_what_is_done_on_rank_0_is_tried_again_after_a_restart(disk: Run) -> None:
    work = failing(server_error(), server_error())

    def run(plane: RolloutPlane) -> tuple[Any, int]:
        sync(plane, 0)
        return plane.on_rank0(work), plane.fleet.restarts

    assert disk(run) == [("done", 2), (None, 0)]
    assert disk.servers.starts == [("step_000000", "step_000000")] * 3


def test_a_failure_beyond_the_budget_is_raised_on_every_rank(disk: Run) -> None:
    work = failing(*[server_error() for _ in range(9)])

    def run(plane: RolloutPlane) -> None:
        sync(plane, 0)
        plane.on_rank0(work)

    outcomes = disk(run)
    assert all(isinstance(outcome, ServersUnavailableError) for outcome in outcomes), outcomes
    assert {str(outcome) for outcome in outcomes} == {f"{GONE} (tried again rollout.max_restarts=2 times already)"}
    assert len(disk.servers.starts) == 3


def test_no_collective_waits_for_all_of_a_long_evaluation(disk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_LOOK_SECONDS", 0.02)
    looks, gather = [], parallel.gather_world
    monkeypatch.setattr(parallel, "gather_world", lambda value: looks.append(value) or gather(value))

    def work(_client: RolloutClient) -> str:
        looks.clear()
        time.sleep(0.5)
        return threading.current_thread().name

    def run(plane: RolloutPlane) -> str | None:
        sync(plane, 0)
        return plane.on_rank0(work)

    assert disk(run) == ["long work", None]
    assert len(looks) > 10


@pytest.mark.parametrize("error", [PluginError("my reward failed"), OSError("no space left")])
def test_what_a_restart_cannot_mend_is_not_tried_again(error: Exception, disk: Run) -> None:
    work = failing(error)

    def run(plane: RolloutPlane) -> None:
        sync(plane, 0)
        plane.on_rank0(work)

    outcomes = disk(run)
    # The run ends by it, where it would go on without an evaluation that the servers failed at.
    assert {type(outcome) for outcome in outcomes} == {RolloutsUnavailableError}, outcomes
    assert {str(outcome) for outcome in outcomes} == {f"{type(error).__name__}: {error}"}
    assert len(disk.servers.starts) == 1


def test_a_server_that_cannot_be_started_twice_ends_the_run(disk: Run) -> None:
    disk.servers.failing_starts = 2
    outcomes = disk(lambda plane: sync(plane, 0))
    reason = "the rollout server ended with status 1"
    assert {str(outcome) for outcome in outcomes} == {f"ServerStartError: {reason} (restart failed: {reason})"}


def test_the_first_weights_of_an_own_server_are_always_on_disk(streamed: Run) -> None:
    def run(plane: RolloutPlane) -> list[str]:
        sync(plane, 0, 1, 2)
        return plane.sync.sent

    assert streamed(run)[0] == ["step_000001", "step_000002"]
    assert streamed.servers.starts == [("step_000000", "step_000000")]
    assert [path.name for path in (streamed.folder / "weights").iterdir()] == ["step_000000"]


def test_a_server_that_is_restarted_from_older_weights_gets_the_current_ones_first(streamed: Run) -> None:
    work = failing(server_error())

    def run(plane: RolloutPlane) -> tuple[Any, list[str]]:
        sync(plane, 0, 1)
        return plane.on_rank0(work), plane.sync.sent

    assert streamed(run)[0] == ("done", ["step_000001", "step_000001"])
    assert streamed.servers.starts == [("step_000000", "step_000000")] * 2


def test_a_server_that_is_restarted_from_the_current_weights_gets_none(disk: Run) -> None:
    work = failing(server_error())

    def run(plane: RolloutPlane) -> Any:
        sync(plane, 0, 1)
        return plane.on_rank0(work)

    assert disk(run) == ["done", None]
    assert disk.servers.starts == [("step_000000", "step_000000"), ("step_000001", "step_000001")]
    assert disk.servers.by_url["http://own:1"].asked == []


def test_a_sync_that_fails_is_tried_again(streamed: Run) -> None:
    def run(plane: RolloutPlane) -> list[str]:
        sync(plane, 0)
        plane.sync.failures = 2
        sync(plane, 1)
        return plane.sync.sent

    assert streamed(run)[0] == ["step_000001"] * 3
    assert len(streamed.servers.starts) == 3


def test_the_first_weights_are_not_sent_after_the_server_was_restarted_from_them(streamed: Run) -> None:
    work = failing(server_error())

    def run(plane: RolloutPlane) -> tuple[Any, list[str]]:
        sync(plane, 0)
        return plane.on_rank0(work), plane.sync.sent

    assert streamed(run)[0] == ("done", [])


# Taking turns on the same devices.

OFFLOADING = ["rollout.release_memory=true", "backend.offload=all", "rollout.max_log_prob_diff=null"]
EXTERNAL = ["rollout.engine=external", "rollout.servers=[http://127.0.0.1:1,http://127.0.0.1:2]"]
BOTH = "weights+kv_cache"


class Turns:
    """A run whose trainer and servers take turns: ``events`` are what rank 0's memory and the servers were asked for,
    in order. Servers that hold memory beside the trainer's are noticed."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        self.run, self.events = run, []
        self.released: list[set[str]] = [set() for _ in range(RANKS)]
        self.no_room = False
        run.config = load_config([*OVERRIDES, *OFFLOADING, *overrides])
        memory: Any = self
        run.memory = memory
        monkeypatch.setattr(backend, "_selected", cpu)
        monkeypatch.setattr(export, "export_model", self._export)
        monkeypatch.setattr(RolloutPlane, "_check_served_weights", lambda plane, model: plane._begin_sampling())
        answer = FakeServer.answer

        def noting(server: FakeServer, path: str, body: Any) -> tuple[int, Any]:
            note = {
                "/release_memory_occupation": "release",
                "/resume_memory_occupation": "resume",
                "/update_weights_from_disk": "update",
            }.get(path)
            if note is not None:
                self.events.append(f"server {note} {'+'.join(body.get('tags', []))}".strip())
            return answer(server, path, body)

        monkeypatch.setattr(FakeServer, "answer", noting)

    def _export(self, model: Any, path: Path, **_: Any) -> None:
        assert not self.is_released(WEIGHTS), "weights that are not there are written"
        path.mkdir(parents=True, exist_ok=True)
        self._note("write")

    def _note(self, event: str) -> None:
        if dist.get_rank() == 0:
            self.events.append(event)

    def is_released(self, part: str) -> bool:
        return part in self.released[dist.get_rank()]

    def release(self, *parts: str) -> None:
        mine = self.released[dist.get_rank()]
        if not mine.issuperset(parts):
            self._note("release " + ("weights" if parts == (WEIGHTS,) else "state"))
        mine.update(parts)
        self.run.ranks.exchange(None)
        assert all(other.issuperset(parts) for other in self.released)

    def restore(self, *parts: str) -> None:
        mine = self.released[dist.get_rank()]
        self.run.ranks.exchange(None)
        if self.no_room:
            raise DeviceMemoryError("0.00 GB of the device are free")
        if mine.intersection(parts):
            self._note("restore")
        mine.difference_update(parts)


def train(plane: RolloutPlane) -> None:
    """What a step does to memory between its rollouts and the next sync."""
    on_selected_rank(dist.get_rank() == 0, plane.fleet.release_memory, ())
    plane.memory.restore(*STATE, WEIGHTS)


def sample(plane: RolloutPlane, turns: Turns) -> None:
    plane.on_rank0(lambda _: turns.events.append("sample"))


def test_servers_of_others_and_the_trainer_take_turns(disk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.servers.by_url.update({f"http://127.0.0.1:{port}": FakeServer() for port in (1, 2)})
    turns = Turns(disk, monkeypatch, *EXTERNAL)

    def run(plane: RolloutPlane) -> None:
        turns._note("build")
        sync(plane, 0)
        sample(plane, turns)
        sample(plane, turns)
        train(plane)
        sync(plane, 1)
        sample(plane, turns)
        # At the end the weights are exported.
        plane.regain_weights()
        assert not plane.memory.is_released(WEIGHTS)

    assert disk(run) == [None, None]
    both = ["server resume weights"] * 2
    keys, update = ["server resume kv_cache"] * 2, ["server update"] * 2
    assert turns.events == [
        # The model is built where the servers were.
        *[f"server release {BOTH}"] * 2, "build",
        "release state", *both, "write", *update, "release weights", *keys, "sample", "sample",
        *[f"server release {BOTH}"] * 2, "restore",
        "release state", *both, "write", *update, "release weights", *keys, "sample",
        *["server release kv_cache"] * 2, "restore", *keys,
    ]  # fmt: skip


def test_an_own_server_starts_where_the_weights_were(disk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(disk, monkeypatch)

    def run(plane: RolloutPlane) -> None:
        sync(plane, 0)
        sample(plane, turns)
        train(plane)
        sync(plane, 1)
        sample(plane, turns)

    assert disk(run) == [None, None]
    assert turns.events == [
        "release state", "write", "release weights", "sample",
        f"server release {BOTH}", "restore",
        "release state", "server resume weights", "write", "server update", "release weights",
        "server resume kv_cache", "sample",
    ]  # fmt: skip


def test_weights_that_are_sent_again_come_back_for_it(streamed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(streamed, monkeypatch)
    work = failing(server_error())

    def run(plane: RolloutPlane) -> tuple[Any, list[str]]:
        sync(plane, 0)
        train(plane)
        sync(plane, 1)
        turns.events.clear()
        return plane.on_rank0(work), plane.sync.sent

    assert streamed(run)[0] == ("done", ["step_000001", "step_000001"])
    assert turns.events == [
        "release weights", "server resume kv_cache",
        # The server that was started anew gives up its room for keys and values until it has the weights.
        "server release kv_cache", "restore", "release weights", "server resume kv_cache",
    ]  # fmt: skip


def test_no_room_for_weights_to_be_sent_again_ends_the_run_on_every_rank(
    streamed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(streamed, monkeypatch)
    work = failing(server_error())

    def run(plane: RolloutPlane) -> None:
        sync(plane, 0)
        train(plane)
        sync(plane, 1)
        turns.no_room = True
        plane.on_rank0(work)

    assert [str(outcome) for outcome in streamed(run)] == ["0.00 GB of the device are free"] * RANKS


def test_servers_of_another_model_are_refused_before_the_model_is_built(
    disk: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.servers.by_url.update({f"http://127.0.0.1:{port}": FakeServer(architecture="Other") for port in (1, 2)})
    turns = Turns(disk, monkeypatch, *EXTERNAL)
    outcomes = disk(lambda plane: turns._note("build"))
    assert {type(outcome) for outcome in outcomes} == {RolloutsUnavailableError}, outcomes
    assert turns.events == []
