"""The fleet when servers fail, come back, or serve another model."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.discovery import WrongModelError
from dasd_megatron.rollout.pool import Event, Status
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.training import export
from dasd_megatron.training.export import Policy, StoredWeights, WeightDirectory
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.weight_sync.base import WeightSyncError
from dasd_megatron.training.weight_sync.disk import DiskSync
from dasd_megatron.training.weight_sync.distributed import DistributedSync
from tests.support.fake_servers import MODEL, FakeModel, FakeServer, FakeServers
from tests.support.thread_ranks import ThreadRanks

A, B, OWN = "http://a:1", "http://b:1", "http://own:1"
EXTERNAL = RolloutConfig(engine="external", max_retries=0, max_restarts=2, startup_timeout_seconds=1.0)
EMBEDDED = dataclasses.replace(EXTERNAL, engine="embedded")


class Fleet:
    """A fleet of fake servers, the directory of its weights, and both ways of giving it some."""

    def __init__(self, folder: Path, config: RolloutConfig = EXTERNAL, **servers: FakeServer) -> None:
        self.servers = FakeServers(**servers)
        self.fleet = ServerFleet(
            config,
            self.servers.urls,
            folder / "log",
            make_client=self.servers.make_client,
            make_server=self.servers.make_server,
        )
        self.directory = WeightDirectory(folder / "weights")
        self.disk = DiskSync(config, self.fleet, self.directory, self.servers.make_client)
        self.streamed = DistributedSync(config, self.fleet, self.directory, self.servers.make_client)

    def write(self, version: str) -> None:
        """A new version on disk, which is from now on the one to be served."""
        self.directory.write(Policy(FakeModel(), version, Path("template")))
        self.fleet.pool.expect(version)

    def sync(self, version: str) -> None:
        """One sync from disk."""
        self.write(version)
        self.disk.deliver()

    def status(self) -> dict[str, Status]:
        return {url: health.status for url, health in self.fleet.pool.health.items()}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank, which writes folders without weights."""
    ThreadRanks(1, monkeypatch)
    monkeypatch.setattr(export, "export_model", lambda model, path, **_: path.mkdir(parents=True))


# A server that fails during a sync.


def test_a_server_that_dies_during_a_sync_is_left_out_while_others_remain(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    b = fleet.servers.by_url[B]
    b.failing = {"/update_weights_from_disk"}
    fleet.sync("v1")
    assert fleet.status() == {A: Status.SERVING, B: Status.DEAD}
    fleet.sync("v2")
    assert fleet.servers.by_url[A].version == "v2" and b.count("/update_weights_from_disk") == 1
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["v2"]


def test_a_sync_that_fails_everywhere_is_an_error(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    for server in fleet.servers.by_url.values():
        server.down = True
    with pytest.raises(RolloutServerError, match="/update_weights_from_disk failed.*1 try"):
        fleet.sync("v1")
    assert set(fleet.status().values()) == {Status.DEAD}


@pytest.mark.parametrize("named", [True, False])
def test_who_broke_a_sync_off_is_found_out(named: bool, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    fleet.servers.by_url[B].down = True
    # An error of the process group does not say whose it is, so the servers are asked.
    assert fleet.fleet.leave_out([A, B], WeightSyncError("timed out", B if named else None))
    assert fleet.status()[B] is Status.DEAD and fleet.fleet.choose_receivers() == [A]


def test_trying_again_is_of_no_use_when_all_or_none_broke_off(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    assert not fleet.fleet.leave_out([A, B], WeightSyncError("timed out"))
    assert not fleet.fleet.leave_out([A], WeightSyncError("refused", A))
    # Where nobody is left all are asked once more.
    fleet.fleet.pool.record(B, Event.UPDATE_FAILED)
    assert fleet.fleet.choose_receivers() == [A, B]


# Others' servers that come back.


def test_the_budget_of_recoveries(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    fleet.sync("v1")
    for url, server in fleet.servers.by_url.items():
        server.down = True
        fleet.fleet.pool.record(url, Event.UPDATE_FAILED)
    assert fleet.fleet.recover(fleet.disk, fleet.directory) == "and no server is back"
    fleet.servers.by_url[A].down = False
    assert fleet.fleet.recover(fleet.disk, fleet.directory) is None
    assert fleet.fleet.recover(fleet.disk, fleet.directory) == "tried again rollout.max_restarts=2 times already"
    assert fleet.fleet.restarts == 2


def test_a_server_that_comes_back_serves_only_after_an_update(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    fleet.sync("v1")
    b = fleet.servers.by_url[B]
    b.version = "old"
    fleet.fleet.pool.record(B, Event.UPDATE_FAILED)
    # Rank 0 alone cannot give it weights that every rank has a part of.
    asyncio.run(fleet.fleet.update_returned_servers(fleet.streamed))
    assert fleet.status() == {A: Status.SERVING, B: Status.STALE} and b.version == "old"
    assert {fleet.fleet.pool.choose([A]), fleet.fleet.pool.choose()} == {A}
    asyncio.run(fleet.fleet.update_returned_servers(fleet.disk))
    assert fleet.status() == {A: Status.SERVING, B: Status.SERVING} and b.version == "v1"
    assert fleet.fleet.pool.choose([A]) == B


def test_who_is_back_is_of_use_if_the_weights_are_sent_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, dataclasses.replace(EXTERNAL, max_restarts=3), a=FakeServer())
    fleet.fleet.pool.expect("v1")
    fleet.fleet.pool.record(A, Event.UPDATE_FAILED)
    assert fleet.fleet.recover(fleet.streamed, fleet.directory) is None
    assert fleet.status() == {A: Status.STALE}
    # Where they are on disk nothing is sent again, and it would have got them by now.
    fleet.write("v1")
    assert fleet.fleet.recover(fleet.streamed, fleet.directory) == "and no server is back"
    assert fleet.status() == {A: Status.STALE}
    fleet.servers.by_url[A].failing = {"/update_weights_from_disk"}
    assert fleet.fleet.recover(fleet.disk, fleet.directory) == "and no server is back"
    assert fleet.status() == {A: Status.DEAD}


def test_nobody_is_asked_while_all_serve(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer())
    fleet.sync("v1")
    asked = list(fleet.servers.by_url[A].asked)
    asyncio.run(fleet.fleet.update_returned_servers(fleet.disk))
    assert fleet.servers.by_url[A].asked == asked


@pytest.mark.parametrize("unfinished", ["retract", "finish"])
def test_a_server_that_was_away_when_a_pause_ended_goes_on(unfinished: str, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, dataclasses.replace(EXTERNAL, unfinished=unfinished), a=FakeServer(), b=FakeServer())
    fleet.sync("v1")
    fleet.fleet.pool.record(B, Event.UPDATE_FAILED)
    asyncio.run(fleet.fleet.update_returned_servers(fleet.disk))
    counts = [fleet.servers.by_url[url].count("/continue_generation") for url in (A, B)]
    assert counts == [0, 1 if unfinished == "retract" else 0]


# Servers of another model.


def test_a_server_of_another_model_is_refused(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer(architecture="LlamaForCausalLM"))
    with pytest.raises(WrongModelError, match="http://b:1 serves another model.*LlamaForCausalLM"):
        fleet.fleet.check_served_models(MODEL)


def test_a_server_that_comes_later_is_asked_before_it_gets_weights(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer(architecture="LlamaForCausalLM"))
    b = fleet.servers.by_url[B]
    b.down = True
    fleet.fleet.check_served_models(MODEL)
    fleet.sync("v1")
    b.down = False
    asyncio.run(fleet.fleet.update_returned_servers(fleet.disk))
    assert fleet.status()[B] is Status.DEAD and "LlamaForCausalLM" in fleet.fleet.pool.reasons[B]
    assert b.count("/update_weights_from_disk") == 0 and fleet.fleet.choose_receivers() == [A]
    # One that has answered well is not asked again.
    asked = fleet.servers.by_url[A].count("/server_info")
    assert asyncio.run(fleet.fleet.servers_of_this_run([A])) == [A]
    assert fleet.servers.by_url[A].count("/server_info") == asked


def test_without_any_server_the_run_does_not_begin(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, dataclasses.replace(EXTERNAL, startup_timeout_seconds=0.1), a=FakeServer())
    fleet.servers.by_url[A].down = True
    with pytest.raises(RolloutServerError, match="not healthy within 0.1 s"):
        fleet.fleet.check_served_models(MODEL)


@pytest.mark.parametrize(("limit", "refused"), [(0.5, True), (2.0, False), (None, False)])
def test_a_server_that_computes_something_else_is_refused(limit: float | None, refused: bool, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, dataclasses.replace(EXTERNAL, max_log_prob_diff=limit), a=FakeServer())
    fleet.sync("v1")
    if refused:
        with pytest.raises(WrongModelError, match="by 1 nats a token"):
            fleet.fleet.check_served_weights([5, 6, 7], [-2.0, -2.0])
    else:
        fleet.fleet.check_served_weights([5, 6, 7], [-2.0, -2.0])


def test_a_server_that_answers_without_the_first_weights_is_refused(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    fleet.servers.by_url[B].failing = {"/update_weights_from_disk"}
    fleet.sync("v1")
    with pytest.raises(WrongModelError, match="http://b:1 has not taken the run's weights.*injected"):
        fleet.fleet.check_served_weights([5, 6], [-1.0])


# Memory.


def test_memory_is_resumed_by_servers_that_released_it_and_no_others(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer(), b=FakeServer())
    a, b = (fleet.servers.by_url[url] for url in (A, B))
    fleet.sync("v1")
    b.failing = {"/release_memory_occupation"}
    fleet.fleet.release_memory()
    assert fleet.status() == {A: Status.SERVING, B: Status.DEAD} and set(fleet.fleet.released) == {A}
    for tag in ("weights", "weights", "kv_cache", "kv_cache"):
        fleet.fleet.resume_memory(tag)
    # A second request for the same memory would end SGLang, and so would one to the server that kept its own.
    assert a.count("/resume_memory_occupation") == 2 and b.count("/resume_memory_occupation") == 0
    assert not a.down and not b.down and a.released == set()


def test_a_server_that_does_not_resume_is_dead_and_asked_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, a=FakeServer())
    fleet.sync("v1")
    fleet.fleet.release_memory()
    fleet.servers.by_url[A].failing = {"/resume_memory_occupation"}
    fleet.fleet.resume_memory("weights")
    assert fleet.status() == {A: Status.DEAD} and fleet.fleet.released == {A: {"weights", "kv_cache"}}


def test_a_server_that_was_started_anew_has_released_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, EMBEDDED)
    fleet.write("v1")
    fleet.fleet.start_server(fleet.directory.newest)
    fleet.fleet.release_memory()
    assert fleet.fleet.recover(fleet.disk, fleet.directory) is None
    fleet.fleet.resume_memory("weights")
    assert fleet.servers.by_url[OWN].asked == []


# The trainer's own server.


def test_the_own_server_is_started_again_from_the_newest_weights_on_disk(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, EMBEDDED)
    fleet.write("v1")
    fleet.fleet.start_server(fleet.directory.newest)
    assert (fleet.fleet.urls, fleet.status()) == ([OWN], {OWN: Status.SERVING})
    fleet.sync("v2")
    assert fleet.fleet.recover(fleet.disk, fleet.directory) is None
    assert fleet.servers.starts == [("v1", "v1"), ("v2", "v2")] and fleet.status() == {OWN: Status.SERVING}
    # Over another way than disk, what it starts from is older than what it is to serve.
    fleet.fleet.pool.expect("v3")
    assert fleet.fleet.recover(fleet.streamed, fleet.directory) is None
    assert fleet.servers.starts[-1] == ("v2", "v2") and fleet.status() == {OWN: Status.STALE}
    assert fleet.fleet.pool.current == "v3" and fleet.fleet.pool.choose() is None


def test_the_connection_to_the_server_before_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path, EMBEDDED)
    fleet.write("v1")
    fleet.fleet.start_server(fleet.directory.newest)
    starts: list[int] = []
    monkeypatch.setattr(fleet.streamed, "disconnect", lambda: starts.append(len(fleet.servers.starts)))
    assert fleet.fleet.recover(fleet.streamed, fleet.directory) is None
    assert starts == [1] and len(fleet.servers.starts) == 2


def test_a_restart_that_fails_is_told(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, EMBEDDED)
    fleet.write("v1")
    fleet.fleet.start_server(fleet.directory.newest)
    fleet.servers.failing_starts = 1
    outcome = fleet.fleet.recover(fleet.disk, fleet.directory)
    assert outcome == "restart failed: the rollout server ended with status 1"


def test_a_start_that_recovery_has_made_up_for_is_not_repeated(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, EMBEDDED)
    fleet.write("v1")
    fleet.servers.failing_starts = 1
    with pytest.raises(RuntimeError, match="ended with status 1"):
        fleet.fleet.start_server(fleet.directory.newest)
    assert fleet.fleet.recover(fleet.disk, fleet.directory) is None
    fleet.fleet.start_server(StoredWeights(tmp_path, "v1"))
    assert len(fleet.servers.starts) == 2 and fleet.status() == {OWN: Status.SERVING}
