"""Weights in buckets: how tensors are packed, and what happens when a server breaks off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig, RolloutConfig
from dasd_megatron.rollout.pool import Status
from dasd_megatron.rollout.weight_payload import PayloadError
from dasd_megatron.training.export import Policy, WeightDirectory
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.parallel import PeerError
from dasd_megatron.training.weight_sync.send import BucketSync, send_weights
from tests.support.fake_servers import FakeModel, FakeSender, FakeServer, FakeServers
from tests.support.thread_ranks import ThreadRanks

A, B = "http://a:1", "http://b:1"
CONFIG = RolloutConfig(engine="external", max_retries=0, weight_bucket_bytes=40, weight_sync_timeout_seconds=5.0)


class FakeSync(BucketSync):
    sender_class = FakeSender


@pytest.fixture(autouse=True)
def senders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeSender]]:
    """Every sender that a test has made; they are closed at its end."""
    backend.select(BackendConfig(kind="cpu"))
    ThreadRanks(1, monkeypatch)
    made: list[FakeSender] = []
    monkeypatch.setattr(FakeSender, "made", made, raising=False)
    yield made
    for sender in made:
        sender.close()


def one_sender(servers: FakeServers) -> FakeSender:
    pool = ServerFleet(CONFIG, servers.urls, Path("log")).pool
    return FakeSender(CONFIG, dict.fromkeys(servers.urls, 1), pool, servers.make_client)


def test_tensors_arrive_whole_in_order_and_once() -> None:
    tensors = [
        ("first", torch.arange(6, dtype=torch.float32)),
        ("half", torch.arange(3, dtype=torch.bfloat16)),
        # After 30 bytes a float32 would not begin at a multiple of its size.
        ("next", torch.arange(2, dtype=torch.float32)),
        ("large", torch.arange(20, dtype=torch.float32).reshape(4, 5).T),
        ("first", torch.zeros(6)),
    ]
    servers = FakeServers(a=FakeServer())
    sender = one_sender(servers)
    assert send_weights(FakeModel(*tensors), sender, "v1", bucket_size=40) is None
    assert [[name for name, _, _ in entries] for _, entries in sender.buckets] == [
        ["first", "half"],
        ["next"],
        ["large"],
    ]
    found = {}
    for data, entries in sender.buckets:
        start = 0
        for name, dtype, shape in entries:
            size = torch.Size(shape).numel() * dtype.itemsize
            found[name] = torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype).reshape(shape)
            start += size
        assert start == len(data)
    for name, tensor in tensors[:4]:
        assert torch.equal(found[name], tensor), name
    server = servers.by_url[A]
    assert server.version == "v1" and sender.drops == 0
    order = [path for path in server.asked if "update" in path and "info" not in path]
    assert order == [
        "/begin_weight_update",
        *["/update_weights_from_tensor"] * 3,
        "/end_weight_update",
        "/update_weight_version",
    ]


@pytest.mark.parametrize("path", ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"])
def test_after_a_failure_every_tensor_still_goes_by(path: str) -> None:
    servers = FakeServers(a=FakeServer(), b=FakeServer())
    servers.by_url[B].failing = {path}
    model = FakeModel(*[(f"t{index}", torch.zeros(9)) for index in range(5)])
    sender = one_sender(servers)
    failure = send_weights(model, sender, "v1", bucket_size=40)
    assert failure is not None and failure.url == B and f"{path} answered 500: injected" in str(failure)
    # Other ranks take part in the collectives of all five.
    assert model.bridge.passed == 5 and sender.drops and servers.by_url[B].version == "old"


@pytest.mark.parametrize(
    ("error", "said"), [(PayloadError("no room"), "no room"), (ValueError("odd"), "ValueError: odd")]
)
def test_whatever_fails_here_is_a_failure_of_the_sync(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FakeSender, "buffer", fail)
    failure = send_weights(FakeModel(), one_sender(FakeServers(a=FakeServer())), "v1", bucket_size=40)
    assert str(failure) == f"weight sync: {said}"


def sync_to(servers: FakeServers, folder: Path) -> tuple[FakeSync, ServerFleet]:
    fleet = ServerFleet(CONFIG, servers.urls, folder / "log", make_client=servers.make_client)
    fleet.pool.expect("v1")
    return FakeSync(CONFIG, fleet, WeightDirectory(folder), servers.make_client), fleet


def policy(version: str = "v1") -> Policy:
    return Policy(FakeModel(), version, Path("template"))


def test_a_server_that_breaks_off_is_left_out_of_the_next_try(tmp_path: Path, senders: list[FakeSender]) -> None:
    servers = FakeServers(a=FakeServer(), b=FakeServer())
    sync, fleet = sync_to(servers, tmp_path)
    servers.by_url[B].failing = {"/begin_weight_update"}
    sync.send(policy())
    assert [sender.urls for sender in senders] == [[A, B], [A]]
    assert servers.by_url[A].version == "v1" and servers.by_url[B].version == "old"
    assert {url: health.status for url, health in fleet.pool.health.items()} == {A: Status.SERVING, B: Status.DEAD}


def test_who_does_not_answer_is_not_connected(tmp_path: Path, senders: list[FakeSender]) -> None:
    servers = FakeServers(a=FakeServer(), b=FakeServer())
    sync, _ = sync_to(servers, tmp_path)
    servers.by_url[B].down = True
    sync.send(policy())
    assert [sender.urls for sender in senders] == [[A]]


def test_a_connection_serves_as_long_as_the_servers_are_the_same(tmp_path: Path, senders: list[FakeSender]) -> None:
    servers = FakeServers(a=FakeServer())
    sync, fleet = sync_to(servers, tmp_path)
    for version in ("v1", "v2"):
        fleet.pool.expect(version)
        sync.send(policy(version))
    assert len(senders) == 1 and servers.by_url[A].version == "v2"
    sync.disconnect()
    sync.send(policy("v2"))
    assert len(senders) == 2 and senders[0].drops


def test_no_server_left_is_an_error(tmp_path: Path) -> None:
    servers = FakeServers(a=FakeServer())
    sync, _ = sync_to(servers, tmp_path)
    servers.by_url[A].failing = {"/end_weight_update"}
    with pytest.raises(PeerError, match=r"WeightSyncError: weight sync: http://a:1: /end_weight_update answered 500"):
        sync.send(policy())
