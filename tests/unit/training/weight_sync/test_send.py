"""Weights in buckets: how tensors are packed, and what happens when a server breaks off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig, RolloutConfig
from dasd_megatron.models.weight_export import ExportBucket
from dasd_megatron.models.weight_formats import HfTensor
from dasd_megatron.rollout.pool import ServerPool, Status
from dasd_megatron.rollout.weight_payload import PayloadError
from dasd_megatron.training.export import Policy, WeightDirectory
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.parallel import PeerError
from dasd_megatron.training.weight_sync.distributed import DistributedSender
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
    return FakeSender(CONFIG, dict.fromkeys(servers.urls, 1), pool, stage=0, make_client=servers.make_client)


def test_tensors_arrive_whole_in_order_and_once() -> None:
    tensors = [
        ("first", torch.arange(6, dtype=torch.float32)),
        ("half", torch.arange(3, dtype=torch.bfloat16)),
        # Behind the 6 bytes of the one before, a float32 would not begin at a multiple of its size.
        ("next", torch.arange(2, dtype=torch.float32)),
        ("large", torch.arange(20, dtype=torch.float32).reshape(4, 5).T),
        ("first", torch.zeros(6)),
    ]
    servers = FakeServers(a=FakeServer())
    sender = one_sender(servers)
    assert send_weights(FakeModel(*tensors), sender, "v1") is None
    assert [[tensor.name for tensor in sent] for _, sent in sender.buckets] == [["first", "next", "half"], ["large"]]
    found = {}
    for data, sent in sender.buckets:
        start = 0
        for name, dtype, shape in sent:
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
        *["/update_weights_from_tensor"] * 2,
        "/end_weight_update",
        "/update_weight_version",
    ]


@pytest.mark.parametrize(
    ("path", "gathered"), [("/begin_weight_update", 1), ("/update_weights_from_tensor", 2), ("/end_weight_update", 5)]
)
def test_after_a_failure_nothing_more_is_gathered(path: str, gathered: int) -> None:
    """The bucket after the one that failed was gathered while that travelled."""
    servers = FakeServers(a=FakeServer(), b=FakeServer())
    servers.by_url[B].failing = {path}
    model = FakeModel(*[(f"t{index}", torch.zeros(9)) for index in range(5)])
    sender = one_sender(servers)
    failure = send_weights(model, sender, "v1")
    assert failure is not None and failure.url == B and f"{path} answered 500: injected" in str(failure)
    assert model.bridge.passed == gathered and sender.drops and servers.by_url[B].version == "old"


def test_a_bucket_of_every_stage_travels_at_the_same_time() -> None:
    """Each from its own stage's source, in the order of the stages, which is the same on all servers."""
    sender = DistributedSender(CONFIG, {A: 1}, ServerPool([A]), stage=None)
    sizes = [(0, 5), (0, 6), (0, 7), (1, 8), (2, 9), (2, 10)]
    buckets = [ExportBucket(stage, (), (HfTensor("t", torch.uint8, (size,)),)) for stage, size in sizes]
    rounds = sender.rounds(buckets)
    assert [[(b.stage, b.size) for b in members] for members in rounds] == [
        [(0, 5), (1, 8), (2, 9)],
        [(0, 6), (2, 10)],
        [(0, 7)],
    ]
    assert [sender.sending_stage(bucket) for bucket in buckets] == [0, 0, 0, 1, 2, 2] and sender.rounds([]) == []
    sender.close()


class QuietSender(FakeSender):
    """Sends nothing, and cannot have the memory for its second bucket on the rank ``broken``."""

    broken = -1

    def start(self, buckets: Sequence[ExportBucket], flat: torch.Tensor | None) -> None:
        self.started = buckets

    def buffer(self, index: int, size: int) -> torch.Tensor:
        if dist.get_rank() == self.broken and index == 1:
            raise PayloadError("no room")
        return super().buffer(index, size)


@pytest.mark.parametrize("broken", [0, 1])
def test_every_rank_learns_of_a_failure_and_goes_no_further(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(2, monkeypatch)
    monkeypatch.setattr(QuietSender, "broken", broken)
    servers = FakeServers(a=FakeServer())

    def send(rank: int) -> tuple[str, int, int]:
        model = FakeModel(*[(f"t{index}", torch.zeros(9)) for index in range(5)])
        # A rank without room for a bucket takes part in its collectives all the same.
        monkeypatch.setattr(model.bridge, "collect_bucket", lambda *_, **__: None)
        sender = QuietSender(CONFIG, {A: 1}, ServerPool([A]), stage=rank, make_client=servers.make_client)
        failure = send_weights(model, sender, "v1")
        return str(failure), sender.drops, len(sender.started)

    assert ranks.run(send) == [("weight sync: no room", 1, 1)] * 2
    assert servers.by_url[A].version == "old"


@pytest.mark.parametrize(
    ("error", "said"), [(PayloadError("no room"), "no room"), (ValueError("odd"), "ValueError: odd")]
)
def test_whatever_fails_here_is_a_failure_of_the_sync(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FakeSender, "buffer", fail)
    failure = send_weights(FakeModel(), one_sender(FakeServers(a=FakeServer())), "v1")
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
