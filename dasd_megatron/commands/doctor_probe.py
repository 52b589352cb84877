"""The checks of ``dasd doctor`` that import torch: ``python -m dasd_megatron.commands.doctor_probe NAME ...``.

They run in short-lived child processes. So a broken installation shows as a row and not as a traceback, the parent
loads nothing heavy, and no CUDA context is left behind. Each answer is printed as soon as it is there, so that a check
that kills its process does not take the answers before it along.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = ("-m", "dasd_megatron.commands.doctor_probe")
TIMEOUT_SECONDS = 180.0
_MARK = "DASD-PROBE "

Answers = dict[str, dict[str, Any]]
"""By the name of a check: {"ok": value} or {"error": text}."""


def _torch_facts() -> dict[str, Any]:
    import torch

    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
    }


def _cuda_devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        for device in devices
    ]


def _gloo_works() -> bool:
    import datetime

    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value.item() == 1.0


def _cpu_kernels() -> dict[str, str]:
    """Import what a training process imports under the CPU backend, and return the kernels of that backend."""
    from dasd_megatron.backend import cpu
    from dasd_megatron.config import BackendConfig

    cpu.install(BackendConfig())
    import megatron.core.models.gpt  # noqa: F401
    import transformers  # noqa: F401

    import dasd_megatron.models.mbridge_families  # noqa: F401

    return cpu.kernels("auto")


def _cuda_kernels() -> dict[str, str]:
    from dasd_megatron.backend import cuda
    from dasd_megatron.config import BackendConfig

    cuda.install(BackendConfig(kind="cuda"))
    return cuda.kernels("auto")


CHECKS: dict[str, Callable[[], Any]] = {
    "torch": _torch_facts,
    "cuda": _cuda_devices,
    "gloo": _gloo_works,
    "cpu_stack": _cpu_kernels,
    "cuda_kernels": _cuda_kernels,
}


class Probe(NamedTuple):
    """A child process that answers some of :data:`CHECKS`."""

    names: tuple[str, ...]
    child: subprocess.Popen[str]
    deadline: float


def start_probe(*names: str) -> Probe:
    """Start a child process that runs these checks in this order."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.Popen(
        [sys.executable, *PROGRAM, *names],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    return Probe(names, child, time.monotonic() + TIMEOUT_SECONDS)


def read_answers(probe: Probe) -> Answers:
    """Wait for a probe to end and return its answer to each of its checks. A check without one has an error that says
    what became of the process."""
    try:
        output, errors = probe.child.communicate(timeout=max(0.0, probe.deadline - time.monotonic()))
        death = f"the process that imports it died with status {probe.child.returncode}: {errors.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        probe.child.kill()
        output, _ = probe.child.communicate()
        death = f"no answer within {TIMEOUT_SECONDS:.0f} s"
    rows = [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]
    answers = {row["name"]: row for row in rows}
    return {name: answers.get(name, {"error": death}) for name in probe.names}


def main(names: list[str]) -> None:
    """Run the checks of these names and print an answer to each."""
    warnings.simplefilter("ignore")
    # While modules are imported there is hardly any garbage, and the process ends soon.
    gc.disable()
    for name in names:
        try:
            answer = {"ok": CHECKS[name]()}
        # A broken installation raises anything, and the row is to show it.
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(_MARK + json.dumps({"name": name, **answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
