"""Checkpoints from which a killed run goes on with the numbers it would have had.

A checkpoint is a directory ``checkpoints/step_<n>`` with Megatron's distributed state (model, optimizer, schedule, and
the weights of a teacher that follows the policy), ``rng.pt`` (the generators of every rank), ``hf`` (config and
tokenizer, so that ``dasd convert`` needs nothing else), ``trainer.json`` (step, data position and prompts that were
under way; the weight version is the step's), where there are any ``ready.safetensors`` and ``refused.safetensors``
(rollouts collected for steps to come), and a manifest with the SHA-256 of every file. It is written under another name,
fsynced and renamed when every rank is done, see :mod:`~dasd_megatron.training.checkpoint_files`. A crash or a full disk
leaves the previous one in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from dasd_megatron import backend
from dasd_megatron.config import CheckpointConfig
from dasd_megatron.errors import first_line
from dasd_megatron.models.extra_state import kept_scaling, load_state, without_extra_states
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.hf_weights import WeightsError, copy_side_files
from dasd_megatron.models.megatron_checkpoint import read_metadata
from dasd_megatron.rollout.buffer import BufferState, Group, read_groups
from dasd_megatron.rollout_files import save_samples
from dasd_megatron.training.checkpoint_files import STATE_FILE, CheckpointError, checkpoint_path, prune, publish
from dasd_megatron.training.checkpoint_search import COUNTERS, TrainerState, do_on_rank0, read_state
from dasd_megatron.training.checkpoint_writer import PendingCheckpoint, ResultFile
from dasd_megatron.training.offload import TrainerMemory
from dasd_megatron.training.optimizer import OptimizerState
from dasd_megatron.training.parallel import (
    PeerError,
    broadcast_from_rank0,
    gather_world,
    is_lost_peer,
    on_selected_rank,
    true_on_any,
)
from dasd_megatron.training.snapshots import KEPT_COPIES, WeightSnapshot

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


_RESERVE_FILE = "reserve.partial"
_RESERVE_BYTES = 2**28
_HEADER_BYTES = 2048
"""Room for what is stored beside each tensor's values."""
_COLLECTED = ("ready", "refused")
"""The lists of groups in a BufferState, each of which is a file of its own."""


def architecture(hf_config: Any) -> dict[str, Any]:
    """Return the numbers of a Hugging Face config that a checkpoint's tensors depend on."""
    return {name: getattr(hf_config, name) for name in _ARCHITECTURE}


def check_architecture(path: Path, record: dict[str, Any], hf_config: Any) -> None:
    """Refuse (CheckpointError) a checkpoint, by the record of :func:`read_state`, whose tensors are not those of
    ``hf_config``'s model."""
    for name, value in architecture(hf_config).items():
        saved = record["architecture"].get(name)
        if saved != value:
            raise CheckpointError(
                f"{path} was saved from a model with {name}={saved}, this model has {value}; "
                "set model.path to the model that the checkpoint came from, or start a new run"
            )


def check_kept_teacher(path: Path, weights: str) -> None:
    """Refuse (CheckpointError) a checkpoint without what a teacher of these ``teacher.weights`` has to go on from.
    Collective: rank 0 reads."""

    def look() -> None:
        name = KEPT_COPIES.get(weights)
        if name is not None and not any(key.startswith(f"{name}.") for key in read_metadata(path).state_dict_metadata):
            raise CheckpointError(
                f"{path} has no weights of a teacher of teacher.weights={weights}: go on with the algorithm.name and "
                "teacher.weights of the run that saved it, or start a new run"
            )

    do_on_rank0(look)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _sharded_state(
    model: ShardedModel,
    optimizer: OptimizerState,
    teacher: WeightSnapshot | None,
    *,
    is_loading: bool,
    read: Callable[[torch.Tensor], torch.Tensor] = _as_it_is,
) -> dict[str, Any]:
    """Return Megatron's sharded state of all that a checkpoint has. ``read`` gives the tensor that has the values of
    one whose memory is released."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model_state = {
        f"model{index}": unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model.chunks)
    }
    state = {**model_state, **optimizer.sharded_state_dict(model_state, is_loading=is_loading, read=read)}
    if teacher is not None:
        state[teacher.name] = teacher.sharded_state_dict(model, model_state)
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            value.data = read(value.data)
    return state


def _rng_state() -> dict[str, Any]:
    # NumPy's annotation has the dictionary of another call in it.
    numpy_state: Any = np.random.get_state()
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


def _cause(error: BaseException) -> str:
    """Return the cause in one line: a CheckpointException quotes the tracebacks of the ranks that failed, and the cause
    is their last line."""
    if isinstance(error, PeerError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


class CheckpointSaver:
    """Writer of a run's checkpoints. With ``checkpoint.async_save`` a process forked for each checkpoint writes and
    hashes the files while training goes on; it sees the memory as it was.

    ``memory``: parts of the state that it has released are read where they are, on the host. ``stalled``: seconds that
    training has waited; the training loop sets it back.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        model: ShardedModel,
        optimizer: OptimizerState,
        teacher: WeightSnapshot | None,
        *,
        template_dir: Path,
        timeout_seconds: float,
        memory: TrainerMemory | None = None,
    ) -> None:
        self.run_dir, self.settings, self.template_dir = run_dir, settings, template_dir
        self.timeout_seconds = timeout_seconds
        self.model, self.optimizer, self.teacher, self.memory = model, optimizer, teacher, memory
        self.stalled = 0.0
        self._pending: PendingCheckpoint | None = None
        # All checkpoints share one strategy: their tensors are the same, and from the third on so is what the ranks
        # have agreed to write.
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self._validated = False
        self._removal: threading.Thread | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None and self._pending.process is not None:
            self._pending.process.kill()
        self._await_removal()

    def _await_removal(self) -> None:
        """Wait until older checkpoints are removed, which take up the room of the next."""
        if self._removal is not None:
            self._removal.join(self.timeout_seconds)

    @property
    def pending(self) -> bool:
        """A checkpoint has been begun and not finished; alike on every rank."""
        return self._pending is not None

    def is_writing(self) -> bool:
        """Return whether a process of this rank is still writing."""
        return self._pending is not None and self._pending.process is not None and self._pending.process.is_alive()

    def save(self, state: TrainerState) -> None:
        """Begin ``checkpoints/step_<n>``, after the one before it is finished. Collective over all ranks.

        Config and tokenizer of the Hugging Face directory ``template_dir`` go into its folder ``hf``, so that it can be
        converted by itself.

        Raises:
            CheckpointError: writing failed (a full disk, say); the previous checkpoint is untouched.
        """
        self.finish()
        started = time.perf_counter()
        final = checkpoint_path(self.run_dir, state.step)
        # The name is new each time, since the writer of a trainer that was killed may still be alive.
        partial = broadcast_from_rank0(final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.partial"))
        rng = gather_world(_rng_state())
        failure: BaseException | None = None
        # Megatron-Core's own queue would start a process that takes seconds to import this program again, and that
        # outlives a trainer that is killed.
        filesystem_async._results_queue = ResultFile(partial / f"results_{dist.get_rank()}.pickle")
        checkpoint = self._pending = PendingCheckpoint(partial, final)
        try:
            read = _as_it_is if self.memory is None else self.memory.reader()
            sharded = _sharded_state(self.model, self.optimizer, self.teacher, is_loading=False, read=read)
            _narrow_storages(sharded)
            size = sum(gather_world(_bytes_to_write(sharded)))
            self._await_removal()
            on_selected_rank(dist.get_rank() == 0, lambda: _make_room(partial, size), (OSError,))
            with self._ending_alone(checkpoint):
                checkpoint.request = dist_checkpointing.save(
                    sharded,
                    str(partial),
                    self._strategy,
                    async_sharded_save=True,
                    validate_access_integrity=not self._validated,
                )
            self._validated = True
            on_selected_rank(
                dist.get_rank() == 0, lambda: self._write_own_files(partial, state, rng), (OSError, RuntimeError)
            )
        except (PeerError, CheckpointException) as error:
            failure = error
        self._raise_failure(checkpoint, failure)
        # A single rank that reused the former plan would leave the others waiting for it.
        self._strategy.validated_cache_reuse = not true_on_any(not self._strategy.validated_cache_reuse)
        if dist.get_rank() == 0 and (state.rollouts.ready or state.rollouts.refused):
            checkpoint.extra = functools.partial(_write_collected, state.rollouts)
        checkpoint.start(background=self.settings.async_save)
        self.stalled += time.perf_counter() - started
        if not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that has been begun, if there is one, and make it the latest; older ones that are not
        to be kept are removed. Collective over all ranks.

        Raises:
            CheckpointError: see :meth:`save`.
        """
        if self._pending is None:
            return
        started, checkpoint = time.perf_counter(), self._pending
        own_hashes: dict[str, dict[str, Any]] = {}
        failure: BaseException | None = None
        try:
            own_hashes = checkpoint.join(self.timeout_seconds)
        except (OSError, RuntimeError) as error:
            failure = error
        if dist.get_rank() == 0:
            (checkpoint.partial.parent / _RESERVE_FILE).unlink(missing_ok=True)
        try:
            # The ranks exchange what they have written, and all of them raise what one could not write.
            with self._ending_alone(checkpoint):
                for finalize in checkpoint.request.finalize_fns:
                    finalize()
        except CheckpointException as error:
            failure = error
        self._raise_failure(checkpoint, failure)
        hashes = {name: record for part in gather_world(own_hashes) for name, record in part.items()}

        def publish_and_prune() -> None:
            publish(checkpoint.partial, checkpoint.final, hashes)
            removed = prune(self.run_dir, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every)
            # File systems take seconds to remove files, and training need not wait.
            self._removal = threading.Thread(target=_remove_folders, args=(removed,), name="prune")
            self._removal.start()

        try:
            on_selected_rank(dist.get_rank() == 0, publish_and_prune, (OSError, RuntimeError))
        except PeerError as error:
            self._raise_failure(checkpoint, error)
        self._pending = None
        self.stalled += time.perf_counter() - started

    def _raise_failure(self, checkpoint: PendingCheckpoint, failure: BaseException | None) -> None:
        """Raise CheckpointError on every rank if there was a failure on any, and remove what has been written."""

        def report() -> None:
            if failure is not None:
                raise _not_written(checkpoint, failure)

        try:
            on_selected_rank(True, report, (CheckpointError,))
        except PeerError as error:
            self._abandon(checkpoint)
            raise CheckpointError(str(error).removeprefix("CheckpointError: ")) from failure

    @contextlib.contextmanager
    def _ending_alone(self, checkpoint: PendingCheckpoint) -> Iterator[None]:
        """Turn a failure of what Megatron-Core writes on one rank into a CheckpointError of this rank alone: the others
        wait in collectives of Megatron-Core's, and only the end of this process ends theirs. What it raises on every
        rank passes."""
        try:
            yield
        except (OSError, RuntimeError) as failure:
            if isinstance(failure, RuntimeError) and is_lost_peer(failure):
                raise
            error = _not_written(checkpoint, failure)
            error.on_all_ranks = False
            self._abandon(checkpoint)
            raise error from failure

    def _abandon(self, checkpoint: PendingCheckpoint) -> None:
        """Remove what has been written of a checkpoint that failed."""
        if dist.get_rank() == 0:
            shutil.rmtree(checkpoint.partial, ignore_errors=True)
            (checkpoint.partial.parent / _RESERVE_FILE).unlink(missing_ok=True)
        self._pending = None

    def _write_own_files(self, partial: Path, state: TrainerState, rng: list[Any]) -> None:
        """Write on rank 0 what is not sharded."""
        torch.save(rng, partial / "rng.pt")
        record = {
            "step": state.step,
            **{name: getattr(state, name) for name in COUNTERS},
            "position": state.rollouts.position,
            "pending": state.rollouts.pending,
            "collected": dataclasses.asdict(state.rollouts.counts),
            "world_size": dist.get_world_size(),
            "architecture": architecture(self.model.bridge.hf_config),
            "teacher_switch": dataclasses.asdict(state.teacher_switch),
        }
        (partial / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        (partial / "hf").mkdir()
        copy_side_files(self.template_dir, partial / "hf", self.model.config.params_dtype)


def _not_written(checkpoint: PendingCheckpoint, failure: BaseException) -> CheckpointError:
    return CheckpointError(
        f"could not write {checkpoint.final}: {_cause(failure)}; "
        "the previous checkpoint is untouched: free disk space and continue with resume=auto"
    )


def _narrow_storages(sharded: dict[str, Any]) -> None:
    """Let the tensors of ``sharded`` in host memory, which are parts of Megatron's buffers, have storages of their own
    size, in place and without a copy.

    Megatron-Core writes all of a tensor's storage, and so copies a tensor that is only a part of one while training
    waits. No copy is needed, since the writing process has the memory as it was, whatever training does to it.
    """
    apply_factories(sharded)
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and value.data.device.type == "cpu":
            # NumPy would forbid that the storage is ever resized, which is how its memory is released.
            value.data = torch.from_dlpack(value.data.detach().contiguous())


def _bytes_to_write(sharded: dict[str, Any]) -> int:
    """Return about how much this rank's files will take."""
    own = [
        value
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
    ]
    return sum(value.data.numel() * value.data.element_size() + _HEADER_BYTES for value in own)


def _remove_folders(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _make_room(partial: Path, size: int) -> None:
    """Make the folder of a checkpoint of ``size`` bytes, and a reserve beside it; OSError if they do not fit."""
    for old in partial.parent.glob("step_*.partial"):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    # Megatron-Core's rank 0 writes files of its own, first and last, while the others wait for it. A disk that is full
    # then would fail one rank alone, so room for these files is kept.
    free, reserve = shutil.disk_usage(partial).free, min(_RESERVE_BYTES, 2**17 + size // 50)
    if free >= size + reserve:
        # The reserve is written out: clusters' file systems lack fallocate, which would then write every block anyway.
        with open(partial.parent / _RESERVE_FILE, "wb") as file:
            for offset in range(0, reserve, 2**20):
                file.write(bytes(min(2**20, reserve - offset)))
    else:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {size / 1e6:.1f} MB are to be written, {free / 1e6:.1f} MB are free",
        )


def load_checkpoint(
    path: Path, model: ShardedModel, optimizer: OptimizerState, teacher: WeightSnapshot | None
) -> TrainerState:
    """Restore everything that :class:`CheckpointSaver` wrote, in place. Collective over all ranks.

    The parallel layout may differ from the one that saved; the generators are then seeded anew, since each belongs to a
    rank. Call :func:`~dasd_megatron.training.checkpoint_search.find_checkpoint`, :func:`check_architecture` and
    :func:`check_kept_teacher` first.
    """
    state, record = read_state(path)
    for name, groups in (do_on_rank0(lambda: _read_collected(path)) or {}).items():
        setattr(state.rollouts, name, groups)
    do_on_rank0(lambda: read_metadata(path))
    recipe = kept_scaling(model.config)
    state_to_load = _sharded_state(model, optimizer, teacher, is_loading=True)
    if recipe is None:
        for index in range(len(model.chunks)):
            state_to_load[f"model{index}"] = without_extra_states(state_to_load[f"model{index}"])
    loaded = dist_checkpointing.load(state_to_load, str(path))

    def load_chunks() -> None:
        for index, chunk in enumerate(model.chunks):
            load_state(unwrap_model(chunk), loaded[f"model{index}"], recipe)

    try:
        on_selected_rank(True, load_chunks, (WeightsError,))
    except PeerError as error:
        raise CheckpointError(f"{path}: {error}") from error
    optimizer.load_state_dict(loaded)
    if teacher is not None:
        names = [
            (f"model{index}", name)
            for index, chunk in enumerate(model.chunks)
            for name, _ in unwrap_model(chunk).named_parameters()
        ]
        for tensor, (chunk_name, name) in zip(teacher.tensors, names, strict=True):
            tensor.copy_(loaded[teacher.name][chunk_name][name])
    if record["world_size"] == dist.get_world_size():
        _restore_generators(path / "rng.pt")
    return state


def _write_collected(rollouts: BufferState, folder: Path) -> list[str]:
    """Write the groups for steps to come and return the names of their files."""
    names = []
    for kind in _COLLECTED:
        samples = [sample for group in getattr(rollouts, kind) for sample in group.samples]
        if samples:
            names.append(f"{kind}.safetensors")
            save_samples(folder / names[-1], samples)
    return names


def _read_collected(path: Path) -> dict[str, list[Group]]:
    """Return the groups that a checkpoint has for steps to come, by the name of their list."""
    found = {}
    for kind in _COLLECTED:
        # Earlier versions have written a JSON object a line.
        files = [file for suffix in ("safetensors", "jsonl") if (file := path / f"{kind}.{suffix}").exists()]
        if files:
            found[kind] = read_groups(files[0])
    return found


def _restore_generators(path: Path) -> None:
    """Set this rank's generators to what the file says; CheckpointError where it says nothing that they take."""
    try:
        _set_rng_state(torch.load(path, weights_only=True)[dist.get_rank()])
    # A file that is no such record fails in any of these ways.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, PickleError) as error:
        raise CheckpointError(f"{path} has no generators of this run ({first_line(error)}): restore it") from error
