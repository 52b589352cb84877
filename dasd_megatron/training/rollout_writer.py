"""Writing of the rollouts of steps while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path

from megatron.core import parallel_state

from dasd_megatron.config import Config
from dasd_megatron.files import cannot_write
from dasd_megatron.rollout_files import remove_other_layouts, rollouts_path, save_columns
from dasd_megatron.sample_columns import Columns
from dasd_megatron.training.parallel import PeerError, on_selected_rank


class UnsavedRolloutsError(RuntimeError):
    """Rollouts that could not be written, so that the run must end. The message is one line. Raised on every rank."""

    on_all_ranks = True


class RolloutWriter:
    """Writer of one replica's rollouts, a step at a time in a thread of its own.

    Only the rank that got them for its replica writes. A run stops before it saves a checkpoint of a step whose
    rollouts are not on disk, so it goes on behind an earlier one and takes these steps again.
    """

    def __init__(self, folder: Path, *, replica: int, replicas: int, timeout_seconds: float) -> None:
        self.folder, self.replica, self.replicas = folder, replica, replicas
        self.timeout_seconds = timeout_seconds
        self._failure: str | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def of_this_rank(cls, config: Config, folder: Path) -> RolloutWriter:
        """Return the writer of this rank's replica. Needs the parallel state initialised."""
        return cls(
            folder,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=config.parallel.data_parallel_size,
            timeout_seconds=config.backend.timeout_seconds,
        )

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()

    @property
    def failed(self) -> bool:
        """Rollouts could not be written on this rank."""
        return self._failure is not None

    def save(self, step: int, columns: Columns) -> None:
        """Begin to write the replica's rollouts of a step, after those before are written."""
        self._wait()
        path = rollouts_path(self.folder, step, self.replica, self.replicas)
        # A process that ends does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._write, args=(path, step, columns), name="save", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all rollouts are on disk. Collective over all ranks.

        Raises:
            UnsavedRolloutsError: some are not, on any rank.
        """

        def check() -> None:
            self._wait()
            if self._failure is not None:
                raise UnsavedRolloutsError(self._failure)

        try:
            on_selected_rank(True, check, (UnsavedRolloutsError,))
        except PeerError as error:
            raise UnsavedRolloutsError(str(error).removeprefix(f"{UnsavedRolloutsError.__name__}: ")) from error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join(self.timeout_seconds)
            if self._thread.is_alive() and self._failure is None:
                self._failure = (
                    f"the rollouts in {self.folder} are not written within "
                    f"backend.timeout_seconds={self.timeout_seconds:g}: look at the disk, and continue with resume=auto"
                )
            self._thread = None

    def _write(self, path: Path, step: int, columns: Columns) -> None:
        try:
            if self.replica == 0:
                remove_other_layouts(self.folder, step, self.replicas)
            save_columns(path, columns)
        except OSError as error:
            self._failure = (
                f"{cannot_write(path, error)}; then continue with resume=auto: the steps behind the last checkpoint "
                "are taken again"
            )
