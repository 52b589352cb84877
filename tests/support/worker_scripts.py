"""Start a worker script with a time limit: under torchrun with gloo, or by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]
# What pytest has on its path: workers may import benchmarks, which import one another as scripts do.
SEARCHED = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]


def torchrun(worker: str, nproc: int, arguments: dict[str, Any], timeout: float = 240) -> str:
    """Run ``workers/<worker>.py`` in ``nproc`` processes with ``arguments`` as JSON and return the output; raises with
    it on failure or time-out."""
    return _run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)],
        worker,
        arguments,
        timeout,
    )


def run_alone(worker: str, arguments: Any, timeout: float = 240) -> str:
    """The same in one process, without torchrun; returns the output."""
    return _run([sys.executable], worker, arguments, timeout)


def _run(launcher: list[str], worker: str, arguments: Any, timeout: float) -> str:
    command = [*launcher, str(WORKERS / f"{worker}.py"), json.dumps(arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(SEARCHED),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{worker} with {arguments} did not end within {timeout} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, f"{worker} with {arguments} failed:\n{output[-6000:]}"
    return output
