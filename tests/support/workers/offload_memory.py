"""The bytes of a GPU that other processes can have while the trainer's memory is released, and the values after it."""

import json
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
folder = Path(arguments["folder"])
config = load_config(["experiment=quickstart", f"model.path={folder / 'model'}", *arguments["overrides"]])
device = backend.select(config.backend).device()

import torch  # noqa: E402

from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.checkpoint import CheckpointSaver, load_checkpoint  # noqa: E402
from dasd_megatron.training.checkpoint_files import checkpoint_path  # noqa: E402
from dasd_megatron.training.checkpoint_search import TrainerState  # noqa: E402
from dasd_megatron.training.offload import STATE, WEIGHTS  # noqa: E402
from dasd_megatron.training.trainer import build_learner, make_memory  # noqa: E402

SLACK = 64e6
"""Blocks of the allocator that hold something else too."""

parallel.initialize(config)
learner = build_learner(config, folder / "model")
memory = make_memory("all", learner)


def update(seed: int) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in learner.model.parameters():
        parameter.main_grad.normal_(generator=generator)
    learner.optimizer.step()


def kept() -> list[torch.Tensor]:
    return [*learner.model.parameters(), *learner.optimizer.tensors()]


update(1)
values = [tensor.detach().clone().cpu() for tensor in kept()]
torch.cuda.synchronize()
backend.current().release_cached_memory()
sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept() if tensor.is_cuda}
gradients = {
    parameter.main_grad.untyped_storage()._cdata: parameter.main_grad.untyped_storage().nbytes()
    for parameter in learner.model.parameters()
}
expected = sum(sizes.values()) + sum(gradients.values())
free, allocated = backend.current().free_memory(device), torch.cuda.memory_allocated()
for round_ in range(3):
    memory.release(*STATE)
    memory.release(WEIGHTS)
    gained = backend.current().free_memory(device) - free
    assert gained > expected - SLACK, (round_, gained, expected)
    assert torch.cuda.memory_allocated() < allocated - expected + SLACK
    assert all(host.is_pinned() for part in memory._host.values() for host in part)
    if round_ == 1:
        saver = CheckpointSaver(
            folder, config.checkpoint, learner.model, learner.optimizer, None,
            template_dir=folder / "model", timeout_seconds=120.0, memory=memory,
        )  # fmt: skip
        with saver:
            saver.save(TrainerState(step=1))
            assert backend.current().free_memory(device) - free > expected - SLACK, "a checkpoint needs no GPU memory"
            memory.restore(WEIGHTS, *STATE)
            # The same host memory is written to while the checkpoint is.
            update(2)
            memory.release(WEIGHTS, *STATE)
            memory.restore(WEIGHTS, *STATE)
            saver.finish()
        load_checkpoint(checkpoint_path(folder, 1), learner.model, learner.optimizer, None)
    memory.restore(WEIGHTS, *STATE)
    assert all(torch.equal(tensor.cpu(), value) for tensor, value in zip(kept(), values, strict=True)), round_
    assert abs(torch.cuda.memory_allocated() - allocated) < SLACK
measured = memory.measures()
print(
    f"{expected / 1e9:.2f} GB: released in {measured['seconds/release'] / 4:.3f} s, restored in "
    f"{measured['seconds/restore'] / 4:.3f} s"
)
# DDP's hooks still see the parameters' gradients.
loss = sum(parameter.float().square().sum() for parameter in learner.model.parameters())
for chunk in learner.model.chunks:
    chunk.zero_grad_buffer()
loss.backward()
assert all(float(parameter.main_grad.abs().max()) > 0 for parameter in learner.model.parameters())
torch.distributed.destroy_process_group()
