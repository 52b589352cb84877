"""The distributed optimizer's checkpoint: as it is saved, against Megatron's format that gathers, and as another layout
loads it."""

import json
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
folder = Path(arguments["folder"])
overrides = ["experiment=quickstart", f"model.path={arguments['path']}", *arguments["overrides"]]
config = load_config(overrides)
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402

from dasd_megatron.models.gpt import ShardedModel, build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.checkpoint_writer import ResultFile  # noqa: E402
from dasd_megatron.training.optimizer import OptimizerState, build_optimizer  # noqa: E402

parallel.initialize(config)


def model_state(model: ShardedModel) -> dict:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {
        f"model{index}": unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model.chunks)
    }


def update(model: ShardedModel, state: OptimizerState, seed: int) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(
            seed + 1000 * index + (rank if getattr(parameter, "tensor_model_parallel", False) else 0)
        )
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    state.step()


def save(path: Path, state: dict) -> None:
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    # Megatron-Core's own queue is a process that imports this script again.
    filesystem_async._results_queue = ResultFile(path / f"results_{dist.get_rank()}.pickle")
    dist_checkpointing.save(state, str(path))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = dist_checkpointing.load_plain_tensors(str(path))
    # Rows of padding differ between layouts.
    rows = arguments["rows"]
    return {
        name: value[:rows] if "word_embeddings" in name or "output_layer" in name else value
        for name, value in found.items()
        if name.startswith("optimizer.")
    }


def check_in_place(model: ShardedModel, state: OptimizerState, found: dict[str, torch.Tensor]) -> None:
    """Every element that this rank has is that of the whole tensors."""
    (optimizer,) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    shardings = {
        sharding.data: sharding for sharding in nested_values(model_state(model)) if hasattr(sharding, "replica_id")
    }
    for parameter in model.parameters():
        if parameter not in optimizer.model_param_gbuf_map:
            continue
        try:
            window = optimizer._get_model_param_range_map(parameter)["param"]
        except KeyError:
            # Another data-parallel rank has all of it.
            continue
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name in ("exp_avg", "exp_avg_sq", "param")[: 2 if parameter.dtype == torch.float32 else 3]:
            parts = shardings[parameter]
            parts = [parts] if isinstance(parts, ShardedTensor) else nested_values(parts.build())
            whole = torch.cat(
                [found[f"optimizer.state.{name}.{part.key}"][part.global_slice()].flatten() for part in parts]
            )
            assert torch.equal(whole[window.start : window.end], states[name]), (name, shardings[parameter].key)


for precision in ("fp32", "bf16"):
    config = load_config([*overrides, f"precision={precision}"])
    model = build_model(config, arguments["path"])
    state = build_optimizer(config.optimizer, model, steps=10, updates_per_step=1)
    ours, again = folder / precision / "ours", folder / precision / "again"
    if arguments["loads"]:
        # Something else than what is loaded.
        update(model, state, arguments["seed"] + 7)
        sharded = model_state(model)
        loaded = dist_checkpointing.load({**state.sharded_state_dict(sharded, is_loading=True), **sharded}, str(ours))
        for index, chunk in enumerate(model.chunks):
            unwrap_model(chunk).load_state_dict(loaded[f"model{index}"])
        state.load_state_dict(loaded)
        save(again, state.sharded_state_dict(model_state(model), is_loading=False))
        found, expected = tensors(again), tensors(ours)
        assert found.keys() == expected.keys() and all(
            torch.equal(value, expected[name]) for name, value in found.items()
        )
    else:
        for seed in (0, 1):
            update(model, state, arguments["seed"] + seed)
        sharded = model_state(model)
        save(ours, {**state.sharded_state_dict(sharded, is_loading=False), **sharded})
        gathering = {"distrib_optim_sharding_type": "fully_reshardable"}
        megatron = state.optimizer.sharded_state_dict(model_state(model), is_loading=False, metadata=gathering)
        save(folder / precision / "megatron", {"optimizer": megatron})
        found, expected = tensors(ours), tensors(folder / precision / "megatron")
        assert all(float(value.abs().max()) > 0 for value in found.values())
        # The weights of a float32 model are not kept twice.
        left_out = (
            {name for name in expected if name.startswith("optimizer.state.param.")} if precision == "fp32" else set()
        )
        assert found.keys() == expected.keys() - left_out, found.keys() ^ expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    check_in_place(model, state, dist_checkpointing.load_plain_tensors(str(ours)))
dist.barrier()
dist.destroy_process_group()
