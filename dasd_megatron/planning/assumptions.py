"""The figures of a device and of a cluster that the plan's times rest on, each with its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dasd_megatron.errors import ConfigError, enumerate_names

PROMPT_SHARE, MEDIAN_SHARE, LENGTH_SIGMA = 0.25, 0.25, 0.8
"""Lengths of rollouts that are made up. A prompt has this share of the longest; responses have a log-normal spread
about a median of this share of the longest."""


def _figure(source: str, default: float | None = None, *, most: float = math.inf) -> Any:
    """Return a field for a number above 0 and up to ``most``, with its source."""
    metadata = {"source": source, "most": most}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Assumptions:
    """Figures in bytes, seconds and floating-point operations. None of them has been measured by a run of this package
    unless its source says so."""

    device: str
    gpu_memory: float = _figure("data sheet: bytes of one GPU's memory")
    peak_flops: float = _figure("data sheet: dense bf16 operations a second")
    memory_bandwidth: float = _figure("data sheet: bytes a second of the GPU's memory")
    nvlink: float = _figure("data sheet: bytes a second of one GPU in one direction, half of the total that it names")
    network: float = _figure(
        "data sheet of the DGX of this GPU: bytes a second of the one network card that each GPU has"
    )
    mfu: float = _figure(
        "assumed: share of peak_flops that matrix products reach. Of an H100's peak, an H200 reached 0.57 in the "
        "layers of Qwen3 1.7B and 0.39 in the whole update (benchmarks/results/step_update_NVIDIA_H200.json)",
        0.45,
        most=1,
    )
    memory_share: float = _figure("assumed: share of memory_bandwidth that decoding reaches", 0.7, most=1)
    link_share: float = _figure("assumed: share of nvlink, network and host_link that transfers reach", 0.7, most=1)
    collective_seconds: float = _figure("assumed: an all-reduce of a few tokens inside a node, two a layer", 15e-6)
    decoding_seconds: float = _figure("assumed: scheduling, sampling and launches of one decoding step", 2e-3)
    host_link: float = _figure("PCI Express 5.0 x16 (A100: 4.0): bytes a second between a GPU and its host", 64e9)
    disk_write: float = _figure("assumed: bytes a second that the shared file system takes from all nodes", 10e9)
    disk_read: float = _figure("assumed: bytes a second that the shared file system gives to all nodes", 20e9)
    process_write: float = _figure("assumed: bytes a second that one process writes, syncs and hashes", 1e9)
    server_memory: float = _figure(
        "assumed: share of a GPU's memory for a server's weights, keys and values", 0.9, most=1
    )
    prompt_share: float = _figure(
        "assumed: tokens of a typical prompt, as a share of the longest", PROMPT_SHARE, most=1
    )
    median_share: float = _figure(
        "assumed: tokens of the median response, as a share of the longest", MEDIAN_SHARE, most=1
    )
    length_sigma: float = _figure(
        "assumed: spread of the responses' log-normal distribution, which is cut at the longest", LENGTH_SIGMA
    )
    heldout_problems: float = _figure("assumed where data.heldout.size is null: problems of an evaluation", 500)


DEVICES = {
    "a100": Assumptions("A100 SXM 80 GB", 80e9, 312e12, 2.039e12, 300e9, 25e9, host_link=32e9),
    "h100": Assumptions("H100 SXM", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Assumptions("H200 SXM", 141e9, 989e12, 4.8e12, 450e9, 50e9),
}
"""The devices that ``dasd plan --device`` takes."""

FIGURES = {figure.name: figure for figure in dataclasses.fields(Assumptions) if figure.name != "device"}
"""The figures that ``dasd plan --assume`` takes."""


def assume(device: str, changes: Sequence[str]) -> Assumptions:
    """Return the figures of ``device`` with ``changes``, each as name=value.

    Raises:
        ConfigError: an unknown name, or a value that is no number within its bounds.
    """
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in FIGURES:
            raise ConfigError(f"--assume {change[:80]}: name one of {enumerate_names(FIGURES, 'or')}, as name=value")
        most = FIGURES[name].metadata["most"]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # The comparison is negated so that nan is refused.
        if not 0 < value <= most or math.isinf(value):
            bound = "" if math.isinf(most) else f" and at most {most:g}"
            raise ConfigError(f"--assume {change[:80]}: write a number above 0{bound}")
        values[name] = value
    return dataclasses.replace(DEVICES[device], **values)
