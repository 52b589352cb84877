"""A group of gloo processes that stays up between the examples of a property test, and runs one check in all of them at
a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
_CHECK_SECONDS = 150


class GlooPool:
    """``run`` calls ``module.name(rank, world_size, case, message)`` in every process; after a failure the next call
    gets a new group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._members: list[tuple[subprocess.Popen, Connection]] = []

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        store = os.path.join(tempfile.mkdtemp(), "store")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        for rank in range(self.world_size):
            ours, theirs = Pipe()
            arguments = [str(rank), str(self.world_size), store, str(theirs.fileno())]
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.gloo_rank", *arguments],
                    cwd=ROOT,
                    env=environment,
                    pass_fds=(theirs.fileno(),),
                )
            self._members.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._members:
            process.kill()
            process.wait()
            connection.close()
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
                    answer = f"the process died with exit code {process.wait()}"
            else:
                answer = f"no answer within {_CHECK_SECONDS} s"
            if answer is not None:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            self._stop()
            raise AssertionError(f"{name} {case} {message}\n" + "\n".join(failures))
