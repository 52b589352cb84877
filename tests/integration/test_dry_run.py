"""``dasd train --dry-run`` of the cluster experiments, as a user runs it on a laptop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

SECONDS, BYTES = 60, 4 * 2**30
# Processes, nodes, what Megatron-Core says of a middle rank, and of micro-batches.
CASES = {
    "7b": (
        ["experiment=dasd_7b", "--response-tokens", "1000"],
        8,
        "rank 4    PP 0  DP 1  CP 0  TP 0: layers 0-27, embedding, head;",
        # Prompts of 512 and responses of 1,000 tokens, of which the last is no input, filled up to a multiple of the four that share it.
        ["256 micro-batches for each of 2 replicas in each of 1 minibatches, of 1,512 to 1,512 tokens on a rank; 0.1% are padding"],
    ),
    "32b": (
        ["experiment=dasd_32b"],
        32,
        "rank 16   PP 1  DP 0  CP 0  TP 0: layers 32-63, head;",
        ["512 micro-batches for each of 2 replicas", "1F1B, 512 forward", "backward: stage 0 1, stage 1 0", "waits 0.2% of its time"],
    ),
    "70b": (
        ["experiment=dasd_70b"],
        128,
        "rank 64   PP 2  DP 0  CP 0  TP 0: layers 20-29 and 60-69;",
        ["256 micro-batches for each of 4 replicas", "backward: stage 0 10, stage 1 8, stage 2 6, stage 3 4", "waits 0.6% of its time"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_is_rehearsed_in_a_minute_without_a_gpu(case: str, tmp_path: Path) -> None:
    arguments, world, middle, expected = CASES[case]
    command = [sys.executable, "-m", "dasd_megatron.cli", "train", "--dry-run", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DASD_API_KEY": "not-to-be-printed"}
    started = time.monotonic()
    with (tmp_path / "output").open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds, output = time.monotonic() - started, (tmp_path / "output").read_text()
    assert status == 0, output[-4000:]
    print(f"{seconds:.1f} s, {usage.ru_maxrss / 2**20:.2f} GiB")
    assert seconds < SECONDS and usage.ru_maxrss * 1024 < BYTES
    assert "Warning" not in output and "not-to-be-printed" not in output
    assert middle in output and output.count("as planned") == 3
    for part in expected:
        assert part in output, part
    # Every rank stands on one node, in order.
    nodes = re.findall(r"^  node(\d+) +rank (\d+)-(\d+) ", output, re.MULTILINE)
    ranks = [rank for _, first, last in nodes for rank in range(int(first), int(last) + 1)]
    assert ranks == list(range(world)) and {int(node) for node, _, _ in nodes} == set(range(world // 8))
    assert output.count("dasd train experiment=") == world // 8 and "sglang/launch.py cuda" in output
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
