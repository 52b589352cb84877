"""Training steps from a checkpoint against those of a run that was never interrupted, for every kind of teacher's
weights: bit by bit in the layout that saved it, and up to rounding in another."""

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
TP2, DP2 = "parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=2"
NOT_REPRODUCIBLE = ("seconds/", "throughput/")
# The checkpoint is of the middle of an interval: the snapshot is of step 0, and is taken anew after step 2.
SAVED = 1


def configured(weights: str, layout: str) -> Config:
    return configure(
        folder, layout, f"teacher.weights={weights}", "teacher.snapshot_every=2", "teacher.trust_region_mix=0.3",
        "teacher.ema_decay=0.5", "algorithm.objective=distributional", "checkpoint.async_save=false",
    )  # fmt: skip


first = configured("live", TP2)
backend.select(first.backend)

from megatron.core import parallel_state  # noqa: E402

from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.checkpoint import CheckpointSaver, check_kept_teacher, load_checkpoint  # noqa: E402
from dasd_megatron.training.checkpoint_files import CheckpointError, checkpoint_path  # noqa: E402
from dasd_megatron.training.step import train_step  # noqa: E402


def run(config: Config, root: Path, *, resumes: bool) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Return the metrics of the steps behind the checkpoint, and all weights of this rank after them."""
    with open_replaying(config, folder) as trainer:
        model, optimizer, _, teacher = trainer.learner
        rows = []
        if resumes:
            trainer.state.step = load_checkpoint(checkpoint_path(root, SAVED), model, optimizer, teacher).step
        while trainer.state.step < STEPS:
            rows.append(train_step(trainer))
            if trainer.state.step == SAVED and not resumes:
                saver = CheckpointSaver(
                    root, config.checkpoint, model, optimizer, teacher,
                    template_dir=folder / "model", timeout_seconds=60.0,
                )  # fmt: skip
                with saver:
                    saver.save(trainer.state)
        weights = [*model.parameters(), *([] if teacher is None else teacher.tensors)]
        kept = [{key: row[key] for key in row if not key.startswith(NOT_REPRODUCIBLE)} for row in rows]
        return kept[-(STEPS - SAVED) :], [tensor.detach().clone() for tensor in weights]


parallel.initialize(first)
expected = {}
for weights in ("ema", "snapshot", "trust_region"):
    config = configured(weights, TP2)
    rows, tensors = run(config, folder / weights, resumes=False)
    found, again = run(config, folder / weights, resumes=True)
    assert found == rows, (weights, found, rows)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, again, strict=True)), weights
    expected[weights] = rows
# A teacher that a checkpoint does not have is refused in a line.
check_kept_teacher(checkpoint_path(folder / "ema", SAVED), "live")
for weights, other in (("ema", "trust_region"), ("snapshot", "ema")):
    try:
        check_kept_teacher(checkpoint_path(folder / other, SAVED), weights)
    except CheckpointError as error:
        assert f"has no weights of a teacher of teacher.weights={weights}" in str(error), error
    else:
        raise AssertionError(f"{weights} goes on from {other}")
# Otherwise the teacher's weights would not matter here.
gaps = {weights: [row["credit/delta_mean"] for row in rows] for weights, rows in expected.items()}
assert len({tuple(values) for values in gaps.values()}) == 3, gaps

parallel_state.destroy_model_parallel()
parallel.split_world(configured("live", DP2).parallel, 60.0, 1)
for weights, rows in expected.items():
    found, _ = run(configured(weights, DP2), folder / weights, resumes=True)
    for row, other in zip(found, rows, strict=True):
        for name in (
            "update/loss",
            "update/grad_norm",
            "update/divergence",
            "credit/delta_mean",
            "teacher/entropy_mean",
        ):
            assert abs(row[name] - other[name]) <= 2e-5 * max(1.0, abs(other[name])), (weights, name, row, other)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
