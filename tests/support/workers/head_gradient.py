"""Gradients that the loss adds to DDP's own sums against gradients that autograd hands to DDP: every parameter's sum
after the same micro-batches, reduced over replicas and pipeline stages."""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(
    ["experiment=quickstart", "parallel=single", f"model.path={arguments['path']}", *arguments["overrides"]]
)
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from dasd_megatron.losses import GradientSum  # noqa: E402
from dasd_megatron.models.gpt import ShardedModel, build_model  # noqa: E402
from dasd_megatron.training import parallel, passes  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, make_micro_batches  # noqa: E402
from dasd_megatron.training.optimizer import OptimizerState, StepResult, build_optimizer  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=1, updates_per_step=1)
generator = torch.Generator().manual_seed(arguments["seed"] + dist.get_rank() // config.parallel.replica_size)
sizes = torch.randint(2, 12, (8,), generator=generator).tolist()
prompts, responses = (
    [torch.randint(0, model.vocab_size, (size,), generator=generator).tolist() for size in sizes] for _ in range(2)
)
layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
batches = make_micro_batches(prompts, responses, layout)
# The gradients are looked at, and not applied.
OptimizerState.step = lambda self: StepResult(1.0, 0.0, applied=True)


def sums() -> list[torch.Tensor]:
    passes.supervised_update(model, optimizer, batches, config.loss)
    return [parameter.main_grad.clone() for parameter in model.parameters()]


found_sums = []
head_gradient = ShardedModel.head_gradient


def watched(self: ShardedModel) -> GradientSum | None:
    found_sums.append(head_gradient(self))
    return found_sums[-1]


ShardedModel.head_gradient = watched
found, again = sums(), sums()
on_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
assert len(batches) > 1 and len(found_sums) == (2 * len(batches) if on_last_stage else 0) and None not in found_sums
ShardedModel.head_gradient = lambda self: None
expected = sums()
for (name, _), one, other, plain in zip(model.named_parameters(), found, again, expected, strict=True):
    assert torch.equal(one, other), f"{name} differs between two passes over the same"
    scale = float(plain.abs().max())
    error = float((one - plain).abs().max())
    assert scale > 0 and error <= arguments["tolerance"] * scale, (name, error, scale)
dist.barrier()
dist.destroy_process_group()
