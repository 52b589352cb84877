"""``dasd rollouts show`` prints what stands in a file, for people and as JSON."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dasd_megatron.cli import main
from dasd_megatron.rollout_files import read_samples, rollouts_path, save_samples
from tests.support.random_samples import random_group


@pytest.fixture
def path(tmp_path: Path) -> Path:
    draw = random.Random(1)
    samples = [sample for group in range(3) for sample in random_group(draw, group, 2, with_teacher=False)]
    samples[0].text, samples[0].reward = "so\x1b[2J it\u202e is 7 × 6", 0.5
    path = rollouts_path(tmp_path, 1)
    save_samples(path, samples)
    return path


def test_json_is_what_earlier_versions_wrote_and_reads_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(path), "--json"]) == 0
    lines = capsys.readouterr().out
    assert {"response_ids", "rollout_log_probs", "text"} < json.loads(lines.splitlines()[0]).keys()
    old = path.with_suffix(".jsonl")
    old.write_text(lines)
    assert read_samples(old) == read_samples(path)


def test_people_see_texts_and_numbers_of_what_they_choose(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(path), "--first", "1"]) == 0
    shown = capsys.readouterr().out
    sample = read_samples(path)[0]
    mean = sample.of_sampled(sample.rollout_log_probs).mean()
    assert "group 0, sample 0: reward 0.5" in shown and f"mean log-prob {mean:.4f}" in shown
    assert "  text: so [2J it  is 7 × 6\n" in shown and shown.count("group") == 1
    assert main(["rollouts", "show", str(path), str(path), "--group", "2"]) == 0
    assert [line[:17] for line in capsys.readouterr().out.splitlines() if line.startswith("group")] == [
        "group 2, sample 0", "group 2, sample 1"
    ] * 2  # fmt: skip


def test_what_is_no_file_of_rollouts_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"{}")
    for name in (path, path.with_name("none.safetensors")):
        assert main(["rollouts", "show", str(name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"dasd: error: {name}") and error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(path: Path) -> None:
    command = f"{sys.executable} -m dasd_megatron.cli rollouts show {' '.join([str(path)] * 400)} --json | head -n 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr, found.stdout.count("\n")) == (0, "", 1)
