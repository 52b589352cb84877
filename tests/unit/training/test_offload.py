"""Memory that is given away and taken again, on a model of two parameters whose state lies in shared storages."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasd_megatron import backend, machine
from dasd_megatron.backend import cpu
from dasd_megatron.training import offload
from dasd_megatron.training.offload import (
    COPIES,
    GRADIENTS,
    OFFLOADED,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    DeviceMemoryError,
    TrainerMemory,
)
from tests.support.thread_ranks import ThreadRanks


class Model:
    """Two parameters that are views of one buffer, as DDP lays them, and their gradients in another."""

    def __init__(self) -> None:
        self.buffer, self.grad_buffer = torch.randn(12), torch.randn(12)
        self.weights: list[Any] = []
        for start, shape in ((0, (2, 3)), (6, (4,))):
            place = slice(start, start + torch.Size(shape).numel())
            parameter: Any = torch.nn.Parameter(self.buffer[place].view(shape))
            parameter.main_grad = self.grad_buffer[place].view(shape)
            self.weights.append(parameter)

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.weights


class Learner:
    """A model, an optimizer whose weights are the model's own, and a copy of the weights."""

    def __init__(self) -> None:
        self.model = Model()
        self.moments = [torch.randn(12), torch.rand(12)]
        self.step = torch.tensor(3.0)
        # The share that this replica changes, as DistributedOptimizer keeps it: a part of the model's buffer.
        self.share = self.model.buffer[3:9]
        self.copy: Any = SimpleNamespace(tensors=[torch.randn(2, 3), torch.randn(4)])
        self.optimizer: Any = SimpleNamespace(tensors=lambda: iter([self.share, *self.moments, self.step]))

    def memory(self, kind: str) -> TrainerMemory:
        return TrainerMemory(kind, self.model, self.optimizer, [None, self.copy])

    def kept(self) -> list[torch.Tensor]:
        return [*self.model.weights, self.share, *self.moments, self.step, *self.copy.tensors]


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Learner:
    ThreadRanks(1, monkeypatch)
    monkeypatch.setattr(backend, "_selected", cpu)
    return Learner()


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(
        storage.nbytes() for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values()
    )


def test_values_come_back_to_the_same_tensors(learner: Learner) -> None:
    memory, kept = learner.memory("all"), learner.kept()
    values = [tensor.detach().clone() for tensor in kept]
    for _ in range(2):
        memory.release(*STATE, WEIGHTS)
        assert bytes_of(*kept, learner.model.grad_buffer) == learner.step.nbytes
        assert all(memory.is_released(part) for part in (*STATE, WEIGHTS))
        memory.restore(*STATE, WEIGHTS)
        assert not any(memory.is_released(part) for part in (*STATE, WEIGHTS))
        assert [tensor.tolist() for tensor in kept] == [value.tolist() for value in values]
        # Gradients are not kept: an update begins with none.
        assert learner.model.grad_buffer.tolist() == [0.0] * 12
        learner.model.grad_buffer.normal_()
    # What is written through one view is seen through the others.
    learner.model.buffer.fill_(7.0)
    assert learner.share.tolist() == [7.0] * 6 and learner.model.weights[1].tolist() == [7.0] * 4


def test_parts_are_released_and_restored_by_themselves(learner: Learner) -> None:
    memory = learner.memory("all")
    sizes = {
        GRADIENTS: bytes_of(learner.model.grad_buffer),
        OPTIMIZER: bytes_of(*learner.moments),
        COPIES: bytes_of(*learner.copy.tensors),
        WEIGHTS: bytes_of(learner.model.buffer),
    }
    total = 0
    for part, size in sizes.items():
        memory.release(part)
        total += size
        assert memory.measures()["memory/released"] == pytest.approx(total / 1e9)
    memory.restore(OPTIMIZER)
    assert [memory.is_released(part) for part in sizes] == [True, False, True, True]
    assert bytes_of(*learner.moments) == sizes[OPTIMIZER] and bytes_of(learner.model.buffer) == 0
    # Nothing is to be done twice.
    memory.restore(OPTIMIZER)
    memory.release(GRADIENTS, COPIES, WEIGHTS)


@pytest.mark.parametrize("kind", OFFLOADED)
def test_only_what_is_configured_is_released(kind: str, learner: Learner) -> None:
    memory = learner.memory(kind)
    memory.release(*STATE, WEIGHTS)
    assert memory.is_released(WEIGHTS) == (kind == "all") == (bytes_of(learner.model.buffer) == 0)
    assert [memory.is_released(part) for part in STATE] == [kind != "none"] * 3
    assert (bytes_of(*learner.moments) == 0) == (kind != "none")
    assert memory.measures().keys() == (set() if kind == "none" else {
        "seconds/release", "seconds/restore", "memory/released"
    })  # fmt: skip


def test_released_values_are_read_on_the_host(learner: Learner) -> None:
    memory, kept = learner.memory("all"), learner.kept()
    values = [tensor.detach().clone() for tensor in kept]
    assert all(memory.reader()(tensor) is tensor for tensor in kept)
    memory.release(*STATE, WEIGHTS)
    read = memory.reader()
    for tensor, value in zip(kept, values, strict=True):
        found = read(tensor)
        assert torch.equal(found, value) and found.shape == tensor.shape and found.stride() == tensor.stride()
    assert read(learner.step) is learner.step
    memory.restore(COPIES)
    assert memory.reader()(learner.copy.tensors[0]) is learner.copy.tensors[0]


def test_moments_that_are_made_later_are_released_too(learner: Learner) -> None:
    memory = learner.memory("state")
    late, learner.moments = learner.moments, []
    memory.release(*STATE)
    memory.restore(*STATE)
    values = [moment.clone() for moment in late]
    learner.moments = late
    memory.release(*STATE)
    assert bytes_of(*late) == 0
    memory.restore(*STATE)
    assert all(torch.equal(moment, value) for moment, value in zip(late, values, strict=True))


def refusal(work: Callable[[], None]) -> str:
    with pytest.raises(DeviceMemoryError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_device_without_the_memory_is_told_and_nothing_is_lost(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_SETTLE_SECONDS", 0.0)
    memory, kept = learner.memory("all"), learner.kept()
    values = [tensor.detach().clone() for tensor in kept]
    memory.release(*STATE, WEIGHTS)
    monkeypatch.setattr(cpu, "free_memory", lambda device: 95)
    message = refusal(lambda: memory.restore(OPTIMIZER))
    assert message.startswith(
        "0.00 GB of the device are free, and the trainer needs 0.00 GB again for optimizer state: let the servers take "
        "less (rollout.sglang.mem_fraction_static,"
    )
    assert memory.is_released(OPTIMIZER) and bytes_of(*learner.moments) == 0
    assert all(torch.equal(memory.reader()(tensor), value) for tensor, value in zip(kept, values, strict=True))
    monkeypatch.setattr(cpu, "free_memory", lambda device: 96)
    memory.restore(OPTIMIZER)
    assert torch.equal(learner.moments[0], values[3])


def test_a_server_gets_time_to_give_its_memory_back(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([0, 0, 1000])
    memory = learner.memory("state")
    memory.release(*STATE)
    monkeypatch.setattr(cpu, "free_memory", lambda device: next(free))
    monkeypatch.setattr(offload, "_POLL_SECONDS", 0.0)
    memory.restore(OPTIMIZER)
    assert not memory.is_released(OPTIMIZER)


def test_memory_in_too_many_pieces_leaves_everything_released(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = learner.memory("all")
    memory.release(*STATE, WEIGHTS)
    resize, sizes = torch.UntypedStorage.resize_, []

    def fail_late(storage: torch.UntypedStorage, size: int) -> Any:
        sizes.append(size)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 48 bytes")
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", fail_late)
    assert "again for optimizer state" in refusal(lambda: memory.restore(OPTIMIZER))
    monkeypatch.undo()
    assert bytes_of(*learner.moments) == 0 and memory.is_released(OPTIMIZER)


def test_one_rank_without_the_memory_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_selected", cpu)
    monkeypatch.setattr(offload, "_SETTLE_SECONDS", 0.0)
    ranks = ThreadRanks(2, monkeypatch)
    free = cpu.free_memory

    def be_rank(rank: int) -> TrainerMemory:
        memory = Learner().memory("state")
        memory.release(*STATE)
        monkeypatch.setattr(cpu, "free_memory", lambda device: 0 if ranks._rank() else free(device))
        try:
            memory.restore(OPTIMIZER)
        finally:
            assert memory.is_released(OPTIMIZER)
        return memory

    outcomes = ranks.run(be_rank)
    assert [type(outcome) for outcome in outcomes] == [DeviceMemoryError] * 2, outcomes
    assert str(outcomes[0]) == str(outcomes[1])
    assert "more ranks" not in str(outcomes[0])


def test_the_message_is_one_line_however_many_ranks_lack_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(3, monkeypatch)

    def refuse(rank: int) -> None:
        raise DeviceMemoryError(f"{rank} GB are free")

    outcomes = ranks.run(lambda rank: offload._on_all_ranks(lambda: refuse(rank)))
    assert [str(outcome) for outcome in outcomes] == ["0 GB are free (and 2 more ranks)"] * 3


def test_a_host_without_the_memory_is_told_before_any_is_taken(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = learner.memory("state")
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "4")
    needed = 4 * bytes_of(*learner.moments, *learner.copy.tensors)
    monkeypatch.setattr(machine, "free_memory", lambda: needed - 1)
    message = refusal(lambda: memory.release(*STATE))
    assert message.startswith("backend.offload=state needs 0.00 GB of this machine's memory for 4 processes")
    assert bytes_of(*learner.moments) == 96 and not memory.is_released(OPTIMIZER)
    monkeypatch.setattr(machine, "free_memory", lambda: needed)
    memory.release(*STATE)
    memory.restore(*STATE)
    # The memory is there already.
    monkeypatch.setattr(machine, "free_memory", lambda: 0)
    memory.release(*STATE)
    assert memory.is_released(OPTIMIZER)


def test_host_memory_that_cannot_be_pinned_is_told_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_selected", cpu)
    ranks = ThreadRanks(2, monkeypatch)
    host_memory = cpu.host_memory

    def fail_on_one(size: int) -> torch.Tensor:
        if ranks._rank() == 1:
            raise MemoryError("0.00 GB of host memory could not be pinned")
        return host_memory(size)

    monkeypatch.setattr(cpu, "host_memory", fail_on_one)
    learners = [Learner(), Learner()]
    outcomes = ranks.run(lambda rank: learners[rank].memory("state").release(*STATE))
    assert {str(outcome) for outcome in outcomes} == {
        "0.00 GB of host memory could not be pinned: raise the machine's limit of locked memory (ulimit -l), or write "
        "backend.offload=none"
    }
    assert all(bytes_of(*learner.moments) == 96 for learner in learners)
