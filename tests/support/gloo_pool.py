"""A group of gloo processes that stays up between the examples of a property test, and runs one check in all of them at
a time."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from types import TracebackType

# A rank that fails leaves the others in a collective for as long as the group's own limit.
_COLLECTIVE_SECONDS = 20
_CHECK_SECONDS = 150


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=_COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    while (request := connection.recv()) is not None:
        module, name, case, message = request
        try:
            getattr(importlib.import_module(module), name)(rank, world_size, case, message)
            connection.send(None)
        # Whatever a check raises is the test's result, and is raised again in the parent.
        except Exception:
            connection.send(traceback.format_exc()[-3000:])
    dist.destroy_process_group()


class GlooPool:
    """``run`` calls ``module.name(rank, world_size, case, message)`` in every process; after a failure the next call
    gets a new group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            self._members.append((process, ours))

    def _stop(self) -> None:
        for process, _ in self._members:
            process.kill()
            process.join()
        self._members = []

    def run(self, module: str, name: str, case: dict, message: str = "") -> None:
        if not self._members:
            self._start()
        for _, connection in self._members:
            connection.send((module, name, case, message))
        deadline = time.monotonic() + _CHECK_SECONDS
        failures = []
        for rank, (process, connection) in enumerate(self._members):
            if connection.poll(max(deadline - time.monotonic(), 0.1)):
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = f"the process died with exit code {process.exitcode}"
            else:
                answer = f"no answer within {_CHECK_SECONDS} s"
            if answer is not None:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            self._stop()
            raise AssertionError(f"{name} {case} {message}\n" + "\n".join(failures))
