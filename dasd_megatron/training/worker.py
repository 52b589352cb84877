"""One process of a training run: ``torchrun ... -m dasd_megatron.training.worker RUN_DIR``, as ``dasd train`` starts
it."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from dasd_megatron import backend, stopping
from dasd_megatron.config import Config, read_config
from dasd_megatron.training.launch import LAUNCHER_PID

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def run(config: Config, root: Path, *, prepared: bool) -> None:
    """Train in this process as one rank of the group that torchrun's environment describes; rank 0 prepares ``root`` if
    need be.

    Raises:
        StopRequested: a signal asked for it; on every rank, once all have saved what there is and ended what they had
            started.
    """
    stopping.listen(config.checkpoint.grace_seconds)
    _tie_forked_processes()
    # These are about Megatron-Core's calls, which a user of this package cannot change.
    for message in (
        r"`torch\.distributed\.\w+` is deprecated",
        r"full scope is deprecated",
        r"`load_state_dict` is deprecated",
        r"Please use DTensor",
        r"The \.grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Log lines about the rollout servers carry the time.
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("dasd_megatron").setLevel(logging.INFO)
    backend.select(config.backend).check_precision(config.precision)
    # Megatron-Core is imported from here on, after the backend has prepared torch. Collecting garbage meanwhile would
    # find none and take a fifth of the start.
    gc.disable()
    import torch.distributed as dist

    from dasd_megatron.access import AccessError
    from dasd_megatron.data.prompts import DataError
    from dasd_megatron.data.rendering import TemplateError
    from dasd_megatron.rollout.discovery import DiscoveryError
    from dasd_megatron.run.paths import RunPaths
    from dasd_megatron.run.prepare import prepare_run
    from dasd_megatron.training import parallel
    from dasd_megatron.training.loop import train

    gc.enable()
    parallel.initialize(config)
    end_exchange = stopping.spread(dist.get_rank())
    root = parallel.broadcast_from_rank0(root)
    if not prepared:
        refusals = (ValueError, DataError, TemplateError, OSError, AccessError, DiscoveryError)
        parallel.on_selected_rank(dist.get_rank() == 0, lambda: prepare_run(config, root), refusals)
        config = read_config(RunPaths(root).config)
    try:
        with parallel.naming_lost_peers(config.backend.timeout_seconds):
            train(config, RunPaths(root))
    except stopping.StopRequested:
        # When the first worker is gone, its agent ends the others.
        dist.barrier()
        raise
    finally:
        end_exchange()
    # This comes only after success: on an error the others may be inside a collective, and the process has to exit for
    # the agent to end them.
    dist.destroy_process_group()


def _end_with_launcher() -> None:
    """Kill this process soon after ``dasd train`` is gone. The agent starts workers in sessions of their own, so a
    launcher that is killed would leave them training, and writing into the run directory beside a resumed run."""
    # The launcher says its own number: it may be gone already, and the system would name another parent.
    launcher = int(os.environ[LAUNCHER_PID])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _tie_forked_processes() -> None:
    """Let processes that are forked here, like those that write checkpoints, end with this one and leave signals to
    it."""
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    os.register_at_fork(after_in_child=in_child)


def main() -> int:
    """Train as a worker of ``dasd train``, with the run directory as argument; return the exit status."""
    from dasd_megatron.errors import report_errors

    _end_with_launcher()
    root = Path(sys.argv[1])
    return report_errors(lambda: run(read_config(root / "config.yaml"), root, prepared=True))


if __name__ == "__main__":
    sys.exit(main())
