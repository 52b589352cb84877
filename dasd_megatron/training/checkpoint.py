"""Checkpoints from which a killed run goes on with the numbers it would have had.

A checkpoint is a directory ``checkpoints/step_<n>`` with Megatron's distributed state (model, optimizer, schedule, averaged teacher),
``rng.pt`` (the generators of every rank), ``hf`` (config and tokenizer, so that ``dasd convert`` needs nothing else), ``trainer.json``
(step, data position and prompts that were under way; the weight version is the step's) and, where there are any, ``ready.jsonl`` and
``refused.jsonl`` (rollouts collected for steps to come). It is written under another name, fsynced and renamed; ``checkpoints/latest``
then names it, by rename again. A crash or a full disk leaves the previous one in place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from dasd_megatron import backend
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.hf_weights import WeightsError, copy_side_files, fsync_tree
from dasd_megatron.models.megatron_checkpoint import read_metadata
from dasd_megatron.rollout.buffer import BufferState, Counts, read_groups
from dasd_megatron.rollout.samples import save_samples
from dasd_megatron.training.optimizer import OptimizerState
from dasd_megatron.training.parallel import PeerError, broadcast_from_rank0, on_selected_rank
from dasd_megatron.training.snapshots import WeightSnapshot

_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


# The groups of a BufferState, each in a file of its own.
_COLLECTED = ("ready", "refused")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do. Raised on every rank."""

    on_all_ranks = True


@dataclass
class TrainerState:
    """Where the run is: ``step`` finished steps, and the rollouts under way (on rank 0)."""

    step: int = 0
    rollouts: BufferState = field(default_factory=BufferState)


def architecture(hf_config: Any) -> dict[str, Any]:
    """The numbers of a Hugging Face config that a checkpoint's tensors depend on."""
    return {name: getattr(hf_config, name) for name in _ARCHITECTURE}


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The directory that ``checkpoints/latest`` names, or None where there is no checkpoint yet."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not (path / "trainer.json").is_file():
        raise CheckpointError(f"{pointer} names {path.name}, which is not a complete checkpoint; write the name of a complete one into it")
    return path


def read_state(path: Path) -> tuple[TrainerState, dict[str, Any]]:
    """What ``trainer.json`` of a checkpoint says, as state and whole. Collective over all ranks: rank 0 reads.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint.
    """
    file = path / "trainer.json"
    record = broadcast_from_rank0(json.loads(file.read_text()) if dist.get_rank() == 0 and file.is_file() else None)
    if record is None:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no trainer.json; give a folder like RUN/checkpoints/step_000010"
        )
    # The last two are absent in checkpoints from before them.
    rollouts = BufferState(record["position"], record.get("pending", []), counts=Counts(**record.get("collected", {})))
    return TrainerState(record["step"], rollouts), record


def check_architecture(path: Path, record: dict[str, Any], hf_config: Any) -> None:
    """Refuse (CheckpointError) a checkpoint, by the record of :func:`read_state`, whose tensors are not those of ``hf_config``'s model."""
    for name, value in architecture(hf_config).items():
        if record["architecture"][name] != value:
            raise CheckpointError(
                f"{path} was saved from a model with {name}={record['architecture'][name]}, this model has {value}; "
                "set model.path to the model that the checkpoint came from, or start a new run"
            )


def depart_from(run_dir: Path, path: Path) -> None:
    """Remove the checkpoints of ``run_dir`` that are later than ``path``, one of them, and make ``path`` the latest. For rank 0, when a run
    goes on from an earlier checkpoint: what it departs from must not be resumed, counted or kept in place of its own."""
    folder = run_dir / "checkpoints"
    if path.resolve().parent != folder.resolve():
        return
    _point_to(folder, path.name)
    for later in _complete_checkpoints(folder):
        if later.name > path.name:
            shutil.rmtree(later)


def _point_to(folder: Path, name: str) -> None:
    pointer = folder / "latest.partial"
    with open(pointer, "w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.rename(folder / "latest")


def _complete_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.suffix == "")


def _sharded_state(model: ShardedModel, optimizer: OptimizerState, average: WeightSnapshot | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model_state = {f"model{index}": unwrap_model(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(model.chunks)}
    state = {**model_state, **optimizer.sharded_state_dict(model_state, is_loading=is_loading)}
    if average is not None:
        state["average"] = average.sharded_state_dict(model, model_state, "average.")
    return state


def _rng_state() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
        "device": backend.current().get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    backend.current().set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _last_line(error: BaseException) -> str:
    """The cause: a CheckpointException quotes the tracebacks of the ranks that failed, and the cause is their last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    model: ShardedModel,
    optimizer: OptimizerState,
    average: WeightSnapshot | None,
    *,
    keep_last: int,
    template_dir: Path,
) -> Path:
    """Write ``checkpoints/step_<n>`` and make it the latest; older ones beyond ``keep_last`` are removed. Collective over all ranks.

    Config and tokenizer of the Hugging Face directory ``template_dir`` go into its folder ``hf``, so that it can be converted by itself.

    Raises:
        CheckpointError: writing failed (a full disk, say); the previous checkpoint is untouched.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{state.step:06d}"
    partial = folder / f"{final.name}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    rng: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rng, _rng_state())
    failure: BaseException | None = None
    try:
        on_selected_rank(dist.get_rank() == 0, prepare, (OSError,))
        dist_checkpointing.save(_sharded_state(model, optimizer, average, is_loading=False), str(partial))
    except (Exception, CheckpointException) as error:
        # The writers report a full disk in several types, one of them no Exception; every one of them means "not written".
        failure = error

    def raise_failure() -> None:
        if failure is not None:
            raise CheckpointError(
                f"could not write {final}: {_last_line(failure)}; "
                "the previous checkpoint is untouched: free disk space and continue with resume=auto"
            )

    def finish() -> None:
        torch.save(rng, partial / "rng.pt")
        record = {
            "step": state.step,
            "position": state.rollouts.position,
            "pending": state.rollouts.pending,
            "collected": dataclasses.asdict(state.rollouts.counts),
            "world_size": dist.get_world_size(),
            "architecture": architecture(model.bridge.hf_config),
        }
        (partial / "trainer.json").write_text(json.dumps(record, indent=2) + "\n")
        for name in _COLLECTED:
            groups = getattr(state.rollouts, name)
            if groups:
                save_samples(partial / f"{name}.jsonl", (sample for group in groups for sample in group.samples))
        (partial / "hf").mkdir()
        copy_side_files(template_dir, partial / "hf", model.config.params_dtype)
        fsync_tree(partial)
        if final.exists():
            # Aside and not away: a crash between the two renames must leave something to resume from.
            final.rename(final.with_suffix(".replaced"))
        partial.rename(final)
        _point_to(folder, final.name)
        fsync_tree(folder)
        for old in [*folder.glob("*.replaced"), *_complete_checkpoints(folder)[:-keep_last]]:
            shutil.rmtree(old)

    try:
        on_selected_rank(True, raise_failure, (CheckpointError,))
        on_selected_rank(dist.get_rank() == 0, finish, (OSError, RuntimeError))
    except PeerError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(str(error)) from failure
    return final


def load_checkpoint(path: Path, model: ShardedModel, optimizer: OptimizerState, average: WeightSnapshot | None) -> TrainerState:
    """Restore everything that :func:`save_checkpoint` wrote, in place. Collective over all ranks.

    The parallel layout may differ from the one that saved; the generators are then seeded anew, since each belongs to a rank. Call
    :func:`check_architecture` first.
    """
    state, record = read_state(path)
    for name in _COLLECTED:
        if dist.get_rank() == 0 and (path / f"{name}.jsonl").exists():
            setattr(state.rollouts, name, read_groups(path / f"{name}.jsonl"))
    try:
        on_selected_rank(dist.get_rank() == 0, lambda: read_metadata(path), (WeightsError,))
    except PeerError as error:
        raise CheckpointError(str(error)) from error
    loaded = dist_checkpointing.load(_sharded_state(model, optimizer, average, is_loading=True), str(path))
    for index, chunk in enumerate(model.chunks):
        unwrap_model(chunk).load_state_dict(loaded[f"model{index}"])
    optimizer.load_state_dict(loaded)
    if average is not None:
        names = [(f"model{index}", name) for index, chunk in enumerate(model.chunks) for name, _ in unwrap_model(chunk).named_parameters()]
        for tensor, (chunk_name, name) in zip(average.tensors, names, strict=True):
            tensor.copy_(loaded["average"][chunk_name][name])
    if record["world_size"] == dist.get_world_size():
        _set_rng_state(torch.load(path / "rng.pt", weights_only=True)[dist.get_rank()])
    return state
