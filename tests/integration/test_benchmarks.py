"""The benchmarks of the rollout plane run to their end in their quick mode, and say what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import one_threaded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "rollout.py"


def test_rollout_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "rollout.json"
    output.write_text(json.dumps({"kept": True}))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        env=one_threaded(),
    )
    assert result.returncode == 0, result.stderr
    assert "SGLang is left out" in result.stderr
    record = json.loads(output.read_text())
    assert record["kept"]
    generation = record["generation"]["tokens_per_second"]
    assert {way: sorted(cells) for way, cells in generation.items()} == {
        "transformers.generate": ["1", "4"],
        "embedded, one request": ["1", "4"],
        "embedded, 2 requests, merged": ["4"],
        "embedded, 2 requests, deterministic": ["4"],
    }
    client = record["client"]
    rows = [row for cells in generation.values() for row in cells.values()]
    rows += [*client["requests_per_second"].values(), *client["tokens_per_second"].values()]
    assert len(rows) == 12
    for row in rows:
        least, most = row["spread"]
        assert 0 < least <= row["rate"] <= most and row["ratio"] > 0
    assert "| transformers.generate |" in result.stdout and "| RolloutClient |" in result.stdout


def test_rollout_benchmark_without_a_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--parts", "generation", "--output", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "the part generation needs --model DIR" in result.stderr
    assert not (tmp_path / "out.json").exists()
