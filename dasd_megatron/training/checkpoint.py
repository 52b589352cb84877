"""Checkpoints from which a killed run goes on with the numbers it would have had.

A checkpoint is a directory ``checkpoints/step_<n>`` with Megatron's distributed state (model, optimizer, schedule,
averaged teacher), ``rng.pt`` (the generators of every rank), ``hf`` (config and tokenizer, so that ``dasd convert``
needs nothing else), ``trainer.json`` (step, data position and prompts that were under way; the weight version is the
step's), where there are any ``ready.jsonl`` and ``refused.jsonl`` (rollouts collected for steps to come), and a
manifest with the SHA-256 of every file. It is written under another name, fsynced and renamed when every rank is done,
see :mod:`~dasd_megatron.training.checkpoint_files`. A crash or a full disk leaves the previous one in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import multiprocessing
import os
import pickle
import queue
import random
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from dasd_megatron import backend
from dasd_megatron.config import CheckpointConfig
from dasd_megatron.files import atomic_file
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.hf_weights import WeightsError, copy_side_files
from dasd_megatron.models.megatron_checkpoint import read_metadata
from dasd_megatron.rollout.buffer import BufferState, Counts, read_groups
from dasd_megatron.samples import save_samples
from dasd_megatron.training.checkpoint_files import (
    STATE_FILE,
    changed_file,
    checkpoint_path,
    hash_files,
    listed_files,
    prune,
    publish,
    recover_replaced,
    resumable,
    set_aside,
)
from dasd_megatron.training.optimizer import OptimizerState
from dasd_megatron.training.parallel import (
    PeerError,
    broadcast_from_rank0,
    gather_world,
    is_lost_peer,
    on_selected_rank,
    true_on_any,
)
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


logger = logging.getLogger(__name__)

_RESERVE_FILE = "reserve.partial"
_RESERVE_BYTES = 2**28
# What is stored with each tensor.
_HEADER_BYTES = 2048
_COUNTERS = ("skipped", "discarded", "rollbacks", "rolled_back_to")
# The groups of a BufferState, each in a file of its own.
_COLLECTED = ("ready", "refused")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do. Raised on every rank, unless
    ``on_all_ranks`` is false: then this process has to end, since the others wait for it."""

    on_all_ranks = True


@dataclass
class TrainerState:
    """Where the run is: ``step`` finished steps, and the rollouts under way (on rank 0).

    ``skipped``: how many of the last steps in a row were skipped; ``rollbacks``: how often the run went back to a
    checkpoint, the last time to that of step ``rolled_back_to`` (-1: never); ``discarded``: replayed steps that were
    undone by it, and are not used again.
    """

    step: int = 0
    rollouts: BufferState = field(default_factory=BufferState)
    skipped: int = 0
    discarded: int = 0
    rollbacks: int = 0
    rolled_back_to: int = -1


def architecture(hf_config: Any) -> dict[str, Any]:
    """The numbers of a Hugging Face config that a checkpoint's tensors depend on."""
    return {name: getattr(hf_config, name) for name in _ARCHITECTURE}


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that ``resume`` (none, auto or a path) means, once every file of it has been compared with its
    manifest. Collective: each rank reads its share of the files.

    Of auto's, a damaged one is named in a warning and set aside, and the one before it is taken; None where there is
    none.

    Raises:
        CheckpointError: the one at the path is damaged, or all are.
    """
    rank0 = dist.get_rank() == 0
    if resume == "none":
        return None
    if resume != "auto":
        problem = damage(Path(resume))
        if problem is not None:
            raise CheckpointError(f"resume={resume}: {problem}; restore it, or name another checkpoint")
        return Path(resume)
    if rank0:
        recover_replaced(run_dir)
    candidates = broadcast_from_rank0(resumable(run_dir) if rank0 else None)
    problems = []
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        problems.append(problem)
        if rank0:
            logger.warning(
                "%s: this checkpoint is damaged and set aside as %s.damaged, the one before it is taken",
                problem,
                path.name,
            )
            set_aside(path)
    if problems:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is intact: {'; '.join(problems)}; restore one, or start a new run"
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Collective: each rank reads its share of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        files = on_selected_rank(rank == 0, lambda: listed_files(path), (WeightsError, OSError))
    except PeerError as error:
        return str(error)
    names = sorted(broadcast_from_rank0(files).items())
    return next((problem for problem in gather_world(changed_file(path, dict(names[rank::world]))) if problem), None)


def read_state(path: Path) -> tuple[TrainerState, dict[str, Any]]:
    """What ``trainer.json`` of a checkpoint says, as state and whole. Collective over all ranks: rank 0 reads."""
    record = broadcast_from_rank0(json.loads((path / STATE_FILE).read_text()) if dist.get_rank() == 0 else None)
    rollouts = BufferState(record["position"], record["pending"], counts=Counts(**record["collected"]))
    counters = {name: record[name] for name in ("step", *_COUNTERS)}
    return TrainerState(rollouts=rollouts, **counters), record


def check_architecture(path: Path, record: dict[str, Any], hf_config: Any) -> None:
    """Refuse (CheckpointError) a checkpoint, by the record of :func:`read_state`, whose tensors are not those of
    ``hf_config``'s model."""
    for name, value in architecture(hf_config).items():
        if record["architecture"][name] != value:
            raise CheckpointError(
                f"{path} was saved from a model with {name}={record['architecture'][name]}, this model has {value}; "
                "set model.path to the model that the checkpoint came from, or start a new run"
            )


def _sharded_state(
    model: ShardedModel, optimizer: OptimizerState, average: WeightSnapshot | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model_state = {
        f"model{index}": unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model.chunks)
    }
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
    """The cause: a CheckpointException quotes the tracebacks of the ranks that failed, and the cause is their last
    line."""
    if isinstance(error, PeerError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


class CheckpointSaver:
    """Writes the checkpoints of a run. With ``checkpoint.async_save`` a process forked for each writes and hashes the
    files while training goes on; it sees the memory as it was.

    ``pending`` says, alike on every rank, whether a checkpoint has been begun and not finished; ``stalled`` counts the
    seconds that training has waited.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        model: ShardedModel,
        optimizer: OptimizerState,
        average: WeightSnapshot | None,
        *,
        template_dir: Path,
        timeout_seconds: float,
    ) -> None:
        self.run_dir, self.settings, self.template_dir, self.timeout_seconds = (
            run_dir,
            settings,
            template_dir,
            timeout_seconds,
        )
        self.model, self.optimizer, self.average = model, optimizer, average
        self.stalled = 0.0
        self._begun: _Begun | None = None
        # One for all checkpoints: their tensors are the same, and from the third on so is what the ranks have agreed to
        # write.
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self._validated = False
        self._removal: threading.Thread | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun is not None and self._begun.process is not None:
            self._begun.process.kill()
        self._await_removal()

    def _await_removal(self) -> None:
        """Of the checkpoints before, which takes up the room of the next."""
        if self._removal is not None:
            self._removal.join(self.timeout_seconds)

    @property
    def pending(self) -> bool:
        return self._begun is not None

    def writing(self) -> bool:
        """Whether this rank's files are not all written."""
        return self._begun is not None and self._begun.process is not None and self._begun.process.is_alive()

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
        # A name of its own: a writer whose trainer was killed may be alive yet.
        partial = broadcast_from_rank0(final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.partial"))
        rng = gather_world(_rng_state())
        failure = None
        # Megatron-Core would start a process that imports this program again, seconds, and outlives a trainer that is
        # killed.
        filesystem_async._results_queue = _ResultFile(partial / f"results_{dist.get_rank()}.pickle")
        begun = self._begun = _Begun(partial, final)
        try:
            sharded = _sharded_state(self.model, self.optimizer, self.average, is_loading=False)
            _in_storage_of_their_own(sharded)
            size = sum(gather_world(_bytes_to_write(sharded)))
            self._await_removal()
            on_selected_rank(dist.get_rank() == 0, lambda: _make_room(partial, size), (OSError,))
            with self._ending_alone():
                begun.request = dist_checkpointing.save(
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
        self._raise_failure(failure)
        # A rank that went by the former plan alone would leave the others waiting for it.
        self._strategy.validated_cache_reuse = not any(true_on_any(not self._strategy.validated_cache_reuse))
        begun.start(background=self.settings.async_save)
        self.stalled += time.perf_counter() - started
        if not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that has been begun, if there is one, and make it the latest; older ones that are not
        to be kept are removed. Collective over all ranks.

        Raises:
            CheckpointError: see :meth:`save`.
        """
        if self._begun is None:
            return
        started, begun, failure, hashes = time.perf_counter(), self._begun, None, {}
        try:
            hashes = begun.join(self.timeout_seconds)
        except (OSError, RuntimeError) as error:
            failure = error
        if dist.get_rank() == 0:
            (begun.partial.parent / _RESERVE_FILE).unlink(missing_ok=True)
        try:
            # The ranks exchange what they have written, and all of them raise what one could not write.
            with self._ending_alone():
                for finalize in begun.request.finalize_fns:
                    finalize()
        except CheckpointException as error:
            failure = error
        self._raise_failure(failure)
        hashes = {name: record for part in gather_world(hashes) for name, record in part.items()}

        def publish_and_prune() -> None:
            publish(begun.partial, begun.final, hashes)
            removed = prune(self.run_dir, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every)
            # File systems take seconds for it, and training need not wait.
            self._removal = threading.Thread(
                target=lambda: [shutil.rmtree(path, ignore_errors=True) for path in removed], name="prune"
            )
            self._removal.start()

        try:
            on_selected_rank(dist.get_rank() == 0, publish_and_prune, (OSError, RuntimeError))
        except PeerError as error:
            self._raise_failure(error)
        self._begun = None
        self.stalled += time.perf_counter() - started

    def _raise_failure(self, failure: BaseException | None) -> None:
        """Raise CheckpointError on every rank if there was a failure on any, and remove what has been written."""

        def report() -> None:
            if failure is not None:
                raise self._not_written(failure)

        try:
            on_selected_rank(True, report, (CheckpointError,))
        except PeerError as error:
            self._abandon()
            raise CheckpointError(str(error).removeprefix("CheckpointError: ")) from failure

    @contextlib.contextmanager
    def _ending_alone(self) -> Iterator[None]:
        """Around what Megatron-Core writes on one rank while the others wait for it in collectives of its own: only the
        end of this process ends theirs. What it raises on every rank passes."""
        try:
            yield
        except (OSError, RuntimeError) as failure:
            if isinstance(failure, RuntimeError) and is_lost_peer(failure):
                raise
            error = self._not_written(failure)
            error.on_all_ranks = False
            self._abandon()
            raise error from failure

    def _not_written(self, failure: BaseException) -> CheckpointError:
        return CheckpointError(
            f"could not write {self._begun.final}: {_last_line(failure)}; "
            "the previous checkpoint is untouched: free disk space and continue with resume=auto"
        )

    def _abandon(self) -> None:
        """Remove what has been written of the checkpoint that was begun."""
        if dist.get_rank() == 0:
            shutil.rmtree(self._begun.partial, ignore_errors=True)
            (self._begun.partial.parent / _RESERVE_FILE).unlink(missing_ok=True)
        self._begun = None

    def _write_own_files(self, partial: Path, state: TrainerState, rng: list[Any]) -> None:
        """What is not sharded, by rank 0."""
        torch.save(rng, partial / "rng.pt")
        record = {
            "step": state.step,
            **{name: getattr(state, name) for name in _COUNTERS},
            "position": state.rollouts.position,
            "pending": state.rollouts.pending,
            "collected": dataclasses.asdict(state.rollouts.counts),
            "world_size": dist.get_world_size(),
            "architecture": architecture(self.model.bridge.hf_config),
        }
        (partial / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        for name in _COLLECTED:
            groups = getattr(state.rollouts, name)
            if groups:
                save_samples(partial / f"{name}.jsonl", (sample for group in groups for sample in group.samples))
        (partial / "hf").mkdir()
        copy_side_files(self.template_dir, partial / "hf", self.model.config.params_dtype)


def _in_storage_of_their_own(sharded: dict[str, Any]) -> None:
    """Make tensors of ``sharded`` in host memory, parts of Megatron's buffers, end where their storage ends, in place
    and without a copy.

    Megatron-Core copies every other one while training waits, since all of a tensor's storage is written. The writing
    process has the memory as it was, whatever training does to it.
    """
    apply_factories(sharded)
    for one in nested_values(sharded):
        if isinstance(one, ShardedTensor) and one.data.device.type == "cpu" and one.data.is_contiguous():
            # NumPy has no bfloat16.
            content = one.data.detach().view(torch.uint8) if one.data.ndim else one.data.detach()
            one.data = torch.from_numpy(content.numpy()).view(one.dtype)


def _bytes_to_write(sharded: dict[str, Any]) -> int:
    """About what the files of this rank will take."""
    mine = [one for one in nested_values(sharded) if isinstance(one, ShardedTensor) and is_main_replica(one.replica_id)]
    return sum(one.data.numel() * one.data.element_size() + _HEADER_BYTES for one in mine)


def _make_room(partial: Path, size: int) -> None:
    for old in partial.parent.glob("step_*.partial"):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    # Megatron-Core's rank 0 writes files of its own while the others wait for it, first and last: what fails there
    # fails on one rank alone.
    free, reserve = shutil.disk_usage(partial).free, min(_RESERVE_BYTES, 2**17 + size // 50)
    if free >= size + reserve:
        # Written, since file systems of clusters lack fallocate, and it would be imitated with a write for every block.
        with open(partial.parent / _RESERVE_FILE, "wb") as file:
            for offset in range(0, reserve, 2**20):
                file.write(bytes(min(2**20, reserve - offset)))
    else:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {size / 1e6:.1f} MB are to be written, {free / 1e6:.1f} MB are free",
        )


@dataclass
class _ResultFile:
    """What Megatron-Core wants of a queue, for the one result that a writing process has for its trainer."""

    path: Path

    def put(self, result: Any) -> None:
        # A full disk must not leave a part of the result, which the trainer would read.
        with atomic_file(self.path) as partial:
            partial.write_bytes(pickle.dumps(result))

    def get_nowait(self) -> Any:
        if not self.path.exists():
            raise queue.Empty
        result = pickle.loads(self.path.read_bytes())
        self.path.unlink()
        return result


@dataclass
class _Begun:
    """A checkpoint on its way to the disk: where, what Megatron-Core asks this rank to do, and the process that does
    it."""

    partial: Path
    final: Path
    request: Any = None
    process: multiprocessing.process.BaseProcess | None = None
    error: Exception | None = None

    def start(self, *, background: bool) -> None:
        if self.request.async_fn is None:
            return
        arguments = list(self.request.async_fn_args)
        if self.request.preload_fn is not None:
            # From the GPU to host memory; the second argument is what is to be written.
            arguments[1] = self.request.preload_fn()
        work = (self.request.async_fn, arguments, dict(self.request.async_fn_kwargs), self.partial, dist.get_rank())
        try:
            if background:
                self.process = multiprocessing.get_context("fork").Process(
                    target=_write_in_background, args=work, name="checkpoint"
                )
                self.process.start()
            else:
                _write_and_hash(*work)
        except OSError as error:
            # The other ranks hear of it when all finish.
            self.process, self.error = None, error

    def join(self, timeout_seconds: float) -> dict[str, dict[str, Any]]:
        """Size and hash of each file that this rank has written.

        Raises:
            RuntimeError: the writer did not end in time, or was killed. OSError: it failed.
        """
        if self.error is not None:
            raise self.error
        if self.process is not None:
            self.process.join(timeout_seconds)
            if self.process.is_alive():
                self.process.kill()
                raise RuntimeError(f"not written within backend.timeout_seconds={timeout_seconds:g}")
            if self.process.exitcode < 0:
                raise RuntimeError(f"the writing process was ended by {signal.Signals(-self.process.exitcode).name}")
            if self.process.exitcode:
                raise OSError(self.process.exitcode, os.strerror(self.process.exitcode))
        if self.request.async_fn is None:
            return {}
        hashes = self.partial / _hashes_file(dist.get_rank())
        record = json.loads(hashes.read_text())
        hashes.unlink()
        return record


def _hashes_file(rank: int) -> str:
    return f"hashes_{rank}.json"


def _write_in_background(*work: Any) -> None:
    # OpenMP's threads are not in a forked process, and whoever waits for them waits forever.
    torch.set_num_threads(1)
    # Collecting tensors that are the trainer's would reach for its GPU.
    gc.disable()
    threading.Thread(target=_end_with_children, daemon=True).start()
    try:
        _write_and_hash(*work)
    except OSError as error:
        # A full disk takes no message.
        sys.exit(error.errno)


def _end_with_children() -> None:
    """Megatron-Core's writer starts processes of its own, and would wait forever for one that is killed."""
    while True:
        time.sleep(0.5)
        for child in psutil.Process().children():
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    os.kill(os.getpid(), signal.SIGKILL)


def _write_and_hash(
    write: Callable[..., None], arguments: list[Any], keywords: dict[str, Any], folder: Path, rank: int
) -> None:
    """Megatron-Core's writing of one rank's files, fsynced, and then their hashes, in a file of their own."""
    write(*arguments, **keywords)
    hashes = hash_files(folder, [path.name for path in folder.glob(f"__{rank}_*.distcp")])
    (folder / _hashes_file(rank)).write_text(json.dumps(hashes))


def load_checkpoint(
    path: Path, model: ShardedModel, optimizer: OptimizerState, average: WeightSnapshot | None
) -> TrainerState:
    """Restore everything that :class:`CheckpointSaver` wrote, in place. Collective over all ranks.

    The parallel layout may differ from the one that saved; the generators are then seeded anew, since each belongs to a
    rank. Call :func:`find_checkpoint` and :func:`check_architecture` first.
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
        names = [
            (f"model{index}", name)
            for index, chunk in enumerate(model.chunks)
            for name, _ in unwrap_model(chunk).named_parameters()
        ]
        for tensor, (chunk_name, name) in zip(average.tensors, names, strict=True):
            tensor.copy_(loaded["average"][chunk_name][name])
    if record["world_size"] == dist.get_world_size():
        _set_rng_state(torch.load(path / "rng.pt", weights_only=True)[dist.get_rank()])
    return state
