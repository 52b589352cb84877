"""Bytes of parameters, gradients, optimizer state and activations of a real small model in one layout, against the
plan's."""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(["experiment=quickstart", *arguments["overrides"]])
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.models.hf_config import read_hf_config  # noqa: E402
from dasd_megatron.planning.estimate import Architecture, activation_bytes, recomputed_bytes, training_state  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=1, updates_per_step=1)
stage, replica = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
arch = Architecture.of(read_hf_config(arguments["path"]))
plan = training_state(arch, config.parallel, config.precision, config.optimizer, stage, replica)

storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
gradients = sum(
    buffer.grad_data.numel() * buffer.grad_data.element_size() for chunk in model.chunks for buffer in chunk.buffers
)


def tensors_of(state):
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from tensors_of(value)


for buffer in (chunk_buffer for chunk in model.chunks for chunk_buffer in chunk.buffers):
    buffer.grad_data.normal_()
if not config.optimizer.distributed:
    for parameter in model.parameters():
        parameter.main_grad.normal_()
assert optimizer.step()[2]
state_bytes = 0
for inner in getattr(optimizer.optimizer, "chained_optimizers", [optimizer.optimizer]):
    state_bytes += sum(tensor.nbytes for state in inner.optimizer.state.values() for tensor in tensors_of(state))
    if config.precision.params_dtype == "bf16":
        state_bytes += sum(parameter.nbytes for group in inner.optimizer.param_groups for parameter in group["params"])

found = {
    "parameters": sum(p.numel() for p in model.parameters()),
    "weights": sum(storages.values()),
    "gradients": gradients,
    "optimizer": state_bytes,
}
expected = {name: getattr(plan, name) for name in found}
assert found == expected, f"rank {dist.get_rank()}: found {found}, planned {expected}"

if config.parallel.pipeline_model_parallel_size == 1:
    kept: dict[int, int] = {}
    own = set(storages)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    rows, length = 2, 128
    tokens = torch.randint(0, model.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.chunks[0](tokens, torch.arange(length)[None].expand(rows, length), None)
    measured = sum(kept.values())
    predicted = activation_bytes(
        arch, config.parallel, config.precision, rows * length, stage, micro_batches=1, transformer_engine=False
    )
    # What is computed again lives in the backward pass only.
    predicted -= rows * length * recomputed_bytes(arch, config.parallel, config.precision, transformer_engine=False)
    print(f"activations: measured {measured}, planned {predicted:.0f}, ratio {predicted / measured:.3f}", flush=True)
    assert abs(predicted / measured - 1) < 0.2, (measured, predicted)
dist.destroy_process_group()
