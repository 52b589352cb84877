"""``dasd train --dry-run`` of the cluster experiments, as a user runs it on a laptop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

SECONDS, BYTES = 60, 4 * 2**30
PIPELINE, VIRTUAL = "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
# Processes, nodes, what Megatron-Core says of a middle rank, and of micro-batches.
CASES = {
    "7b": (
        ["experiment=dasd_7b", "--response-tokens", "1000"],
        8,
        "rank 4    PP 0  DP 2  CP 0  TP 0: layers 0-27, embedding, head;",
        # Prompts of 512 and responses of 1,000 tokens, of which the last is no input, filled up to a multiple of the
        # two that share it.
        [
            "128 micro-batches for each of 4 replicas in each of 1 minibatches, of 1,512 to 1,512 tokens on a rank; "
            "0.1% are padding"
        ],
    ),
    "32b": (
        ["experiment=dasd_32b"],
        32,
        "rank 16   PP 2  DP 0  CP 0  TP 0: layers 32-47;",
        [
            "512 micro-batches for each of 2 replicas",
            "1F1B, 512 forward",
            "backward: stage 0 3, stage 1 2, stage 2 1, stage 3 0",
            "waits 0.6% of its time",
        ],
    ),
    "70b": (
        # Twice as many stages as the preset has, of two chunks each.
        ["experiment=dasd_70b", f"{PIPELINE}=4", f"{VIRTUAL}=2"],
        128,
        "rank 64   PP 2  DP 0  CP 0  TP 0: layers 20-29 and 60-69;",
        [
            "256 micro-batches for each of 4 replicas",
            "backward: stage 0 10, stage 1 8, stage 2 6, stage 3 4",
            "waits 0.6% of its time",
        ],
    ),
}


@dataclass
class Rehearsal:
    status: int
    seconds: float
    bytes: int
    output: str
    files: list[str]


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rehearsal]:
    """All of them, at once."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "DASD_API_KEY": "not-to-be-printed",
    }

    def run(case: str) -> Rehearsal:
        folder = tmp_path_factory.mktemp(case)
        command = [sys.executable, "-m", "dasd_megatron.cli", "train", "--dry-run", *CASES[case][0]]
        with (folder / "output").open("w") as file:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        files = [path.name for path in folder.iterdir()]
        # Of a processor: on a busy machine the clock tells of others.
        seconds = usage.ru_utime + usage.ru_stime
        return Rehearsal(status, seconds, 1024 * usage.ru_maxrss, (folder / "output").read_text(), files)

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_is_rehearsed_in_a_minute_without_a_gpu(case: str, rehearsals: dict[str, Rehearsal]) -> None:
    _, world, middle, expected = CASES[case]
    found, output = rehearsals[case], rehearsals[case].output
    assert found.status == 0, output[-4000:]
    print(f"{found.seconds:.1f} s, {found.bytes / 2**30:.2f} GiB")
    assert found.seconds < SECONDS and found.bytes < BYTES
    assert "Warning" not in output and "not-to-be-printed" not in output
    assert middle in output and output.count("as planned") == 3
    for part in expected:
        assert part in output, part
    # Every rank stands on one node, in order.
    nodes = re.findall(r"^  node(\d+) +rank (\d+)-(\d+) ", output, re.MULTILINE)
    ranks = [rank for _, first, last in nodes for rank in range(int(first), int(last) + 1)]
    assert ranks == list(range(world)) and {int(node) for node, _, _ in nodes} == set(range(world // 8))
    assert output.count("dasd train experiment=") == world // 8 and "sglang/start_server.py cuda" in output
    assert found.files == ["output"]
