"""Training steps between which the trainer's memory is given away and taken again, against those of a trainer that
keeps it: metrics, weights, optimizer and checkpoints, bit by bit; and the bytes that are given."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.parity import STEPS, configure, open_replaying
from dasd_megatron import backend
from dasd_megatron.config import Config

arguments = json.loads(sys.argv[1])
folder = Path(arguments["folder"])
NOT_REPRODUCIBLE = ("seconds/", "throughput/")
TP2, DP2, PP2 = (
    f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "data", "pipeline_model")
)  # fmt: skip
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20001"]
ALONE = ["optimizer.distributed=false"]
SAVED = 2
# Every kind of teacher's weights, with and without the distributed optimizer, and what it overlaps.
CASES = {
    DP2: [
        ("all", "ema", "fp32", OVERLAP),
        ("all", "snapshot", "bf16", OVERLAP),
        ("state", "frozen", "bf16", ALONE),
    ],
    TP2: [("all", "trust_region", "fp32", ["parallel.sequence_parallel=true", *ALONE])],
    PP2: [("all", "frozen", "bf16", ["parallel.virtual_pipeline_model_parallel_size=2"])],
}


def configured(layout: str, weights: str, dtype: str, others: list[str]) -> Config:
    return configure(
        folder, layout, f"teacher.weights={weights}", "teacher.snapshot_every=2", "teacher.ema_decay=0.5",
        f"precision.params_dtype={dtype}", "checkpoint.async_save=true", *others,
    )  # fmt: skip


first = configured(DP2, "live", "fp32", [])
backend.select(first.backend)

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from dasd_megatron.planning.estimate import Architecture, training_state  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.checkpoint import CheckpointSaver, load_checkpoint  # noqa: E402
from dasd_megatron.training.checkpoint_files import checkpoint_path  # noqa: E402
from dasd_megatron.training.offload import COPIES, GRADIENTS, OPTIMIZER, STATE, WEIGHTS  # noqa: E402
from dasd_megatron.training.step import train_step  # noqa: E402


def state_of(trainer: Any) -> list[torch.Tensor]:
    learner = trainer.learner
    copies = [tensor for copy in (learner.start, learner.teacher) if copy is not None for tensor in copy.tensors]
    # The order of Adam's state of a parameter is another after it was loaded.
    whole = learner.optimizer.optimizer
    adams = [inner.optimizer for inner in getattr(whole, "chained_optimizers", [whole])]
    masters = [master for adam in adams for group in adam.param_groups for master in group["params"]]
    moments = [
        adam.state[master][name] for adam in adams for master in adam.state for name in ("exp_avg", "exp_avg_sq")
    ]
    assert len(masters) + 3 * len(moments) // 2 == len(list(learner.optimizer.tensors()))
    return [*learner.model.parameters(), *masters, *moments, *copies]


def save(trainer: Any, config: Config, root: Path) -> CheckpointSaver:
    learner = trainer.learner
    saver = CheckpointSaver(
        root, config.checkpoint, learner.model, learner.optimizer, learner.teacher,
        template_dir=folder / "model", timeout_seconds=60.0, memory=trainer.memory,
    )  # fmt: skip
    saver.save(trainer.state)
    return saver


def check_released(trainer: Any, config: Config) -> None:
    """Release everything part by part, and compare the bytes with those of the planner, which its own tests compare
    with Megatron's."""
    memory, learner = trainer.memory, trainer.learner
    planned = training_state(
        Architecture.of(learner.model.bridge.hf_config), config.parallel, config.precision, config.optimizer,
        parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank(),
    )  # fmt: skip
    steps = 4 * sum(tensor.numel() == 1 for tensor in learner.optimizer.tensors())
    copies = sum(
        tensor.nbytes for copy in (learner.start, learner.teacher) if copy is not None for tensor in copy.tensors
    )
    expected = {
        GRADIENTS: planned.gradients, OPTIMIZER: planned.optimizer - steps, COPIES: copies, WEIGHTS: planned.weights
    }  # fmt: skip
    memory.measures()
    before = 0.0
    for part in (*STATE, WEIGHTS):
        memory.release(part)
        released = memory.measures()["memory/released"] * 1e9
        wanted = expected[part] if part in memory.parts else 0
        assert round(released - before) == wanted, (part, released - before, wanted, config.backend.offload)
        before = released
    if memory.kind == "all":
        large = [tensor for tensor in state_of(trainer) if tensor.numel() > 1]
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in large)


def run(config: Config, root: Path, *, resumes: bool = False) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Return the metrics of the steps behind the checkpoint, and all that this rank has after them."""
    with open_replaying(config, folder) as trainer:
        learner, rows = trainer.learner, []
        if resumes:
            loaded = load_checkpoint(checkpoint_path(root, SAVED), learner.model, learner.optimizer, learner.teacher)
            trainer.state.step = loaded.step
        while trainer.state.step < STEPS:
            rows.append(train_step(trainer))
            saver = None
            if trainer.state.step == 1 and config.backend.offload != "none" and not resumes:
                # Memory that a checkpoint has been made of can be given away all the same.
                save(trainer, config, root).finish()
            if config.backend.offload != "none":
                check_released(trainer, config)
            if trainer.state.step == SAVED and not resumes:
                saver = save(trainer, config, root)
            trainer.memory.restore(WEIGHTS)
            if saver is not None:
                # Written by another process while the weights come back here.
                saver.finish()
                saver._await_removal()
        trainer.memory.restore(WEIGHTS, *STATE)
        kept = [{key: row[key] for key in row if not key.startswith(NOT_REPRODUCIBLE)} for row in rows]
        return kept[-(STEPS - SAVED) :], [tensor.detach().clone() for tensor in state_of(trainer)]


def check(layout: str, index: int, case: tuple[str, str, str, list[str]]) -> None:
    offload, weights, dtype, others = case
    config = configured(layout, weights, dtype, others)
    kept, released = (folder / f"{layout}-{index}-{name}" for name in ("kept", "released"))
    rows, tensors = run(config, kept)
    # Past the check that refuses it without servers.
    config.backend.offload = offload
    # What is resumed from is compared below; one case shows that memory comes and goes after that too.
    for root, resumes in ((released, False), (released, True))[: 2 if index == 1 else 1]:
        found, again = run(config, root, resumes=resumes)
        assert found == rows, (layout, case, resumes, found, rows)
        assert len(again) == len(tensors), (layout, case)
        assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, again, strict=True)), (
            layout,
            case,
            root,
            resumes,
        )
    one, other = (dist_checkpointing.load_plain_tensors(str(checkpoint_path(root, SAVED))) for root in (kept, released))
    assert one.keys() == other.keys()
    compared = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
    assert any(name.startswith("optimizer.") for name in compared)
    assert all(torch.equal(value, other[name]) for name, value in compared.items()), (layout, case)


parallel.initialize(first)
for layout, cases in CASES.items():
    if layout != DP2:
        parallel_state.destroy_model_parallel()
        parallel.split_world(configured(layout, "live", "fp32", cases[0][-1]).parallel, 60.0, 1)
    for index, case in enumerate(cases):
        check(layout, index, case)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
