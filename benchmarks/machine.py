"""The machine of a benchmark, for its results file, and the peak memory of a call."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Return processor, cores, caches and versions; the GPU where there is one."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    machine = {
        "processor": name.group(1) if name else platform.machine(),
        "cores": os.cpu_count(),
        "l2_cache_of_a_core": cache.read_text().strip() if cache.exists() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    return machine


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most resident memory that ``call`` had beyond what was resident before it. Linux only: it resets the
    process's high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
