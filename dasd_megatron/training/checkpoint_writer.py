"""The writing of one rank's part of a checkpoint, here or in a process of its own while training goes on."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dasd_megatron.files import atomic_file
from dasd_megatron.training.checkpoint_files import hash_files

_CHILDREN_POLL_SECONDS = 0.5

Extra = Callable[[Path], list[str]]


@dataclass
class ResultFile:
    """The part of a queue that Megatron-Core uses, for the one result that a writing process has for its trainer."""

    path: Path

    def put(self, result: Any) -> None:
        """Leave the result for the trainer."""
        # A full disk must not leave a part of the result, which the trainer would read.
        with atomic_file(self.path) as partial:
            partial.write_bytes(pickle.dumps(result))

    def get_nowait(self) -> Any:
        """Take the result out; raises queue.Empty while there is none."""
        if not self.path.exists():
            raise queue.Empty
        result = pickle.loads(self.path.read_bytes())
        self.path.unlink()
        return result


@dataclass
class PendingCheckpoint:
    """A checkpoint on its way to the disk.

    It is written to ``partial`` and becomes ``final``. ``request`` is what Megatron-Core asks this rank to do,
    ``process`` the process that does it, if there is one, and ``error`` why it could not be started. ``extra`` writes
    more of this rank's files into the folder that it is given and returns their names.
    """

    partial: Path
    final: Path
    request: Any = None
    process: BaseProcess | None = None
    error: Exception | None = None
    extra: Extra | None = None

    def start(self, *, background: bool) -> None:
        """Write this rank's files: here, or in a process forked for it, which has the memory as it is now."""
        if not self._writes:
            return
        write = None
        if self.request.async_fn is not None:
            arguments = list(self.request.async_fn_args)
            if self.request.preload_fn is not None:
                # This copies from the GPU to host memory. The second argument is what is to be written.
                arguments[1] = self.request.preload_fn()
            write = functools.partial(self.request.async_fn, *arguments, **self.request.async_fn_kwargs)
        work = (write, self.extra, self.partial, dist.get_rank())
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

    @property
    def _writes(self) -> bool:
        return self.request.async_fn is not None or self.extra is not None

    def join(self, timeout_seconds: float) -> dict[str, dict[str, Any]]:
        """Wait for the writing and return size and hash of each file that this rank has written.

        Raises:
            RuntimeError: the writer did not end in time, or was killed. OSError: it failed.
        """
        if self.error is not None:
            raise self.error
        if self.process is not None:
            self.process.join(timeout_seconds)
            _check_ended(self.process, timeout_seconds)
        if not self._writes:
            return {}
        hashes = self.partial / _hashes_file(dist.get_rank())
        record = json.loads(hashes.read_text())
        hashes.unlink()
        return record


def _check_ended(process: BaseProcess, timeout_seconds: float) -> None:
    """Raise what a writing process failed with; one that has not ended is killed."""
    status = process.exitcode
    if status is None:
        process.kill()
        raise RuntimeError(f"not written within backend.timeout_seconds={timeout_seconds:g}")
    if status < 0:
        raise RuntimeError(f"the writing process was ended by {signal.Signals(-status).name}")
    if status:
        raise OSError(status, os.strerror(status))


def _hashes_file(rank: int) -> str:
    return f"hashes_{rank}.json"


def _write_in_background(write: Callable[[], None] | None, extra: Extra | None, folder: Path, rank: int) -> None:
    """Do :func:`_write_and_hash` in a forked process; an OSError is its exit status."""
    # OpenMP's threads do not exist in a forked process, and whoever waits for them waits forever.
    torch.set_num_threads(1)
    # Collecting tensors that are the trainer's would reach for its GPU.
    gc.disable()
    threading.Thread(target=_end_with_children, daemon=True).start()
    try:
        _write_and_hash(write, extra, folder, rank)
    except OSError as error:
        # A full disk takes no message, so the number has to do.
        sys.exit(error.errno)


def _end_with_children() -> None:
    """End this process when one of its own is killed: Megatron-Core's writer starts some, and would wait for it
    forever."""
    while True:
        time.sleep(_CHILDREN_POLL_SECONDS)
        for child in psutil.Process().children():
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    os.kill(os.getpid(), signal.SIGKILL)


def _write_and_hash(write: Callable[[], None] | None, extra: Extra | None, folder: Path, rank: int) -> None:
    """Let Megatron-Core write one rank's files, fsynced, and ``extra`` its own, and then write their hashes into a file
    beside them."""
    names = [] if extra is None else extra(folder)
    if write is not None:
        write()
    hashes = hash_files(folder, [*names, *(path.name for path in folder.glob(f"__{rank}_*.distcp"))])
    (folder / _hashes_file(rank)).write_text(json.dumps(hashes))
