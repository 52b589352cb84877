"""The embedded server's end of a weight update: groups that never come, and buckets that do not fit."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from dasd_megatron.rollout.embedded import weight_receiver
from dasd_megatron.rollout.embedded.weight_receiver import MAX_JOINS, ReceiveError, WeightReceiver

GROUP = ("127.0.0.1", 1, 1, 2, "g", "gloo")
BUCKET = {
    "names": ["weight"],
    "dtypes": ["float32"],
    "shapes": [[2, 3]],
    "group": "g",
    "load_format": "flattened_bucket",
}


@pytest.fixture
def receiver():
    model = torch.nn.Linear(3, 2)
    made = WeightReceiver(lambda: model, {name: value.shape for name, value in model.named_parameters()})
    made.served = model
    return made


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (1, 0, "master_port must be in"),
        (1, -1, "master_port must be in"),
        (1, 65536, "master_port must be in"),
        (1, 10**400, "master_port must be in"),
        (2, 0, "rank_offset must be in"),
        (2, 2, "rank_offset must be in"),
        (2, -(2**63), "rank_offset must be in"),
        (3, 1, "rank_offset must be in"),
        (3, 2**31, "world_size at most 4096"),
        (5, "nccl", "gloo is"),
        (5, "x" * 5000, "gloo is"),
    ],
)
def test_a_place_that_is_none_is_refused_at_once(receiver, monkeypatch, place, value, fault):
    monkeypatch.setattr(weight_receiver, "join_weight_group", None)
    with pytest.raises(ReceiveError, match="(?s)^.{1,300}$") as caught:
        receiver.join(*(value if i == place else given for i, given in enumerate(GROUP)))
    assert fault in str(caught.value)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, ValueError, OverflowError, MemoryError])
def test_whatever_torch_raises_there_is_no_group_and_the_name_is_free(receiver, monkeypatch, error):
    def fail(*_, **__):
        raise error("line 1\nline 2")

    monkeypatch.setattr(weight_receiver, "join_weight_group", fail)
    for _ in range(MAX_JOINS + 1):
        with pytest.raises(ReceiveError, match=r"^Failed to initialize custom process group: line 1\.$"):
            receiver.join(*GROUP)


def test_groups_that_never_come_are_bounded_and_hold_nothing_else(receiver, monkeypatch):
    release, entered = threading.Event(), threading.Semaphore(0)

    def wait(*_, **__):
        entered.release()
        release.wait(30)
        raise RuntimeError("nobody came")

    monkeypatch.setattr(weight_receiver, "join_weight_group", wait)
    with ThreadPoolExecutor(MAX_JOINS) as pool:
        pending = [pool.submit(receiver.join, *GROUP[:4], f"g{i}", "gloo") for i in range(MAX_JOINS)]
        for _ in pending:
            assert entered.acquire(timeout=30)
        with pytest.raises(ReceiveError, match="groups wait for their members already"):
            receiver.join(*GROUP)
        with pytest.raises(ReceiveError, match="'g0' exists already"):
            receiver.join(*GROUP[:4], "g0", "gloo")
        # An update goes on meanwhile.
        receiver.begin()
        with pytest.raises(ReceiveError, match="were not sent"):
            receiver.end(lambda model: Future())
        release.set()
        assert all(isinstance(job.exception(30), ReceiveError) for job in pending)
    with pytest.raises(ReceiveError, match="nobody came"):
        receiver.join(*GROUP)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"names": []}, "0 names, 1 dtypes and 1 shapes"),
        ({"shapes": [[2, 3], [1]]}, "1 names, 1 dtypes and 2 shapes"),
        ({"dtypes": ["load"]}, "'load' is no dtype of weights"),
        ({"dtypes": ["int64"]}, "'int64' is no dtype of weights"),
        ({"dtypes": ["complex64"]}, "is no dtype of weights"),
        ({"dtypes": ["__class__"]}, "is no dtype of weights"),
        ({"dtypes": ["float32" * 1000]}, "is no dtype of weights"),
        ({"shapes": [[-2, -3]]}, "larger than the served model"),
        ({"shapes": [[2**62, 2**62]]}, "larger than the served model"),
        ({"shapes": [[10**400]]}, "larger than the served model"),
        ({"shapes": [[17]]}, "larger than the served model"),
        ({"shapes": [[1] * 100]}, "larger than the served model"),
        ({"group": "h"}, "Group 'h' not in ['g']"),
        ({"load_format": "x" * 5000}, "flattened_bucket is"),
    ],
)
def test_a_bucket_that_cannot_be_one_is_refused_before_the_broadcast(receiver, monkeypatch, changes, fault):
    receiver._groups["g"] = object()
    monkeypatch.setattr(weight_receiver.dist, "broadcast", None)
    receiver.begin()
    with pytest.raises(ReceiveError, match="(?s)^.{1,400}$") as caught:
        receiver.receive(**{**BUCKET, **changes})
    assert fault in str(caught.value)
    with pytest.raises(ReceiveError, match="already open"):
        receiver.begin()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"names": ["bias"]}, "does not fit"),
        ({"names": ["weight", "bias"], "dtypes": ["bfloat16", "float32"], "shapes": [[1], [2]]}, "cannot be read"),
    ],
)
def test_a_bucket_that_does_not_fit_ends_the_update_after_the_broadcast(receiver, monkeypatch, changes, fault):
    receiver._groups["g"] = object()
    sent = []
    monkeypatch.setattr(weight_receiver.dist, "broadcast", lambda flat, **_: sent.append(flat))
    receiver.begin()
    with pytest.raises(ReceiveError, match=fault):
        receiver.receive(**{**BUCKET, **changes})
    assert len(sent) == 1
    with pytest.raises(ReceiveError, match="no weight update is open"):
        receiver.end(lambda model: Future())


def test_a_complete_model_waits_for_its_turn_before_another_begins(receiver, monkeypatch):
    receiver._groups["g"] = object()
    monkeypatch.setattr(weight_receiver.dist, "broadcast", lambda flat, **_: flat.zero_())
    both = {"names": ["weight", "bias"], "dtypes": ["float32"] * 2, "shapes": [[2, 3], [2]]}
    applied = Future()
    receiver.begin()
    receiver.receive(**{**BUCKET, **both})
    assert receiver.end(lambda model: applied) is applied
    with pytest.raises(ReceiveError, match="the last update still wait"):
        receiver.begin()
    applied.set_result(None)
    receiver.begin()
    assert receiver.served.weight.abs().sum() > 0, "the served weights are unchanged"
