"""OptimizerState.step against Megatron's own on the same gradients, and a step whose gradients are not finite."""

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

from dasd_megatron.models.gpt import ShardedModel, build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.optimizer import OptimizerState, build_optimizer  # noqa: E402

parallel.initialize(config)


def make() -> tuple[ShardedModel, OptimizerState]:
    model = build_model(config, arguments["path"])
    return model, build_optimizer(config.optimizer, model, steps=10, updates_per_step=1)


def set_gradients(model: ShardedModel, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * size)


(ours, our_state), (theirs, their_state) = make(), make()
# The second one is clipped, the first is not.
for seed, size in ((1, 1e-4), (2, 3.0)):
    set_gradients(ours, seed, size)
    set_gradients(theirs, seed, size)
    norm, _, applied = our_state.step()
    _, expected_norm, _ = their_state.optimizer.step()
    their_state.scheduler.step(1)
    assert applied and norm == expected_norm, (norm, expected_norm)
    assert (norm > config.optimizer.clip_grad) == (seed == 2)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other)

before = [parameter.detach().clone() for parameter in ours.parameters()]
schedule = our_state.scheduler.state_dict()
for bad in (float("nan"), float("inf")):
    set_gradients(ours, 3, 1e-4)
    # In one place, which one rank of the distributed optimizer owns; all ranks must come to the same decision.
    ours.parameters()[-1].main_grad.view(-1)[-1] = bad
    norm, _, applied = our_state.step()
    assert not applied and not norm < float("inf"), (bad, norm, applied)
    assert all(torch.equal(parameter, old) for parameter, old in zip(ours.parameters(), before, strict=True))
    assert our_state.scheduler.state_dict() == schedule
# Moments and step count are untouched too: the next update equals Megatron's.
set_gradients(ours, 4, 1e-4)
set_gradients(theirs, 4, 1e-4)
our_state.step()
their_state.optimizer.step()
for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
    assert torch.equal(parameter, other)
dist.barrier()
dist.destroy_process_group()
