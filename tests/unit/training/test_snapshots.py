"""Copies of the weights beside the live ones, on a model of two parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from dasd_megatron.training.snapshots import WeightSnapshot


class Model:
    """The part of a sharded model that snapshots read."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weights = [torch.nn.Parameter(torch.tensor(values, dtype=dtype)) for values in ([1.0, 2.0], [3.0])]

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.weights

    def values(self) -> list[list[float]]:
        return [parameter.tolist() for parameter in self.weights]

    def fill(self, value: float) -> None:
        for parameter in self.weights:
            parameter.data.fill_(value)


def test_a_copy_stays_when_the_model_learns() -> None:
    model = Model()
    start = WeightSnapshot(model, "start")
    storages = [parameter.data_ptr() for parameter in model.weights]
    model.fill(9.0)
    with start.applied(model):
        assert model.values() == [[1.0, 2.0], [3.0]]
    assert model.values() == [[9.0, 9.0], [9.0]]
    # Megatron's buffers hold the live weights, so these must lie where they were.
    assert [parameter.data_ptr() for parameter in model.weights] == storages


def test_live_weights_come_back_after_an_error() -> None:
    model = Model()
    start = WeightSnapshot(model, "start")
    model.fill(9.0)
    with pytest.raises(ZeroDivisionError), start.applied(model):
        raise ZeroDivisionError
    assert model.values() == [[9.0, 9.0], [9.0]]


def test_an_average_keeps_what_half_precision_would_round_away() -> None:
    model = Model(torch.bfloat16)
    average = WeightSnapshot(model, "average", dtype=torch.float32)
    model.fill(3.0)
    average.average_in(model, decay=0.999)
    assert average.tensors[0].tolist() == pytest.approx([1.002, 2.001], abs=1e-6)
    assert average.tensors[1].tolist() == [3.0]
    assert model.values() == [[3.0, 3.0], [3.0]]
    with average.applied(model):
        assert {parameter.dtype for parameter in model.weights} == {torch.bfloat16}


def test_a_snapshot_takes_the_weights_of_its_moment() -> None:
    model = Model(torch.bfloat16)
    snapshot = WeightSnapshot(model, "snapshot")
    tensors = snapshot.tensors
    model.fill(9.0)
    snapshot.copy(model)
    model.fill(3.0)
    assert [tensor.tolist() for tensor in snapshot.tensors] == [[9.0, 9.0], [9.0]]
    # A checkpoint that is being written refers to the tensors.
    assert all(tensor is old for tensor, old in zip(snapshot.tensors, tensors, strict=True))
    assert {tensor.dtype for tensor in snapshot.tensors} == {torch.bfloat16}


def test_a_checkpoint_gets_the_copies_under_keys_of_their_own() -> None:
    model = Model(torch.bfloat16)
    average = WeightSnapshot(model, "average", dtype=torch.float32)

    def sharded(key: str, data: torch.Tensor) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data)

    first, second = model.weights
    state = {
        "model0": {
            "first": sharded("layer.first", first.data),
            # Not a tensor, and a tensor that is no parameter.
            "extra": SimpleNamespace(data=None),
            "buffer": sharded("layer.buffer", torch.zeros(2)),
        },
        "model1": {"second": sharded("layer.second", second.data)},
    }
    # Megatron's sharded state refers to the parameters themselves.
    state["model0"]["first"].data, state["model1"]["second"].data = first, second
    found = average.sharded_state_dict(model, state)
    assert {chunk: list(values) for chunk, values in found.items()} == {"model0": ["first"], "model1": ["second"]}
    replaced = found["model0"]["first"]
    assert (replaced.key, replaced.dtype) == ("average.layer.first", torch.float32)
    assert replaced.data is average.tensors[0]
    # The live model's state is left as it was.
    assert (state["model0"]["first"].key, state["model0"]["first"].dtype) == ("layer.first", torch.bfloat16)
