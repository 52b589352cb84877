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
from dasd_megatron.training.parallel import on_selected_rank
from dasd_megatron.training.rollout_plane import RolloutPlane, RolloutsUnavailableError, ServersUnavailableError
from dasd_megatron.training.weight_sync.base import WeightSync
from dasd_megatron.training.weight_sync.disk import DiskSync
from tests.support.fake_servers import FakeModel, FakeServers
from tests.support.thread_ranks import ThreadRanks

RANKS = 2
TOKENIZER = character_tokenizer()
CONFIG = load_config(["experiment=quickstart", "rollout.max_restarts=2", "rollout.max_retries=0", "verify.workers=0"])
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
        self.folder = folder
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
            with RolloutPlane(CONFIG, **arguments, tokenizer=TOKENIZER, vocab_size=100, state=BufferState()) as plane:
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
