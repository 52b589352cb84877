"""Saved rollouts read back equal, and broken files are refused with their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.rollout.generation import sampling_seed
from dasd_megatron.rollout.samples import ReplayError, Sample, load_samples, rollouts_path, save_samples


def sample(group: int, index: int) -> Sample:
    return Sample(
        group,
        index,
        f"p{group}",
        "1+1 =",
        "2",
        "#### 2",
        [1, 2],
        [3, 4],
        [-0.1, -1 / 3],
        "#### 2\u2028",
        "stop",
        [["step_000000", 1], ["step_000001", 1]],
        1.0,
        "2",
        False,
    )


def test_round_trip_is_exact_and_ordered(tmp_path: Path) -> None:
    samples = [sample(group, index) for group in range(2) for index in range(3)]
    path = rollouts_path(tmp_path, 7)
    save_samples(path, reversed(samples))
    assert path.name == "step_000007.jsonl"
    assert load_samples(path, groups=2, samples_per_group=3) == samples


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows[:-1], "batch.groups"),
        (lambda rows: [*rows, rows[0]], "batch.groups"),
        (lambda rows: [*rows[:1], "{", *rows[2:]], ":2"),
        (lambda rows: [json.dumps({**json.loads(rows[0]), "rollout_log_probs": [0.0]}), *rows[1:]], ":1"),
        (lambda rows: [json.dumps({key: value for key, value in json.loads(rows[0]).items() if key != "reward"}), *rows[1:]], "reward"),
    ],
)
def test_broken_files_are_refused(change, named: str, tmp_path: Path) -> None:
    path = rollouts_path(tmp_path, 1)
    save_samples(path, [sample(group, index) for group in range(2) for index in range(3)])
    path.write_text("\n".join(change(path.read_text().split("\n")[:-1])) + "\n")
    with pytest.raises(ReplayError) as caught:
        load_samples(path, groups=2, samples_per_group=3)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="rollout.replay"):
        load_samples(tmp_path / "none.jsonl", groups=1, samples_per_group=1)


def test_sampling_seeds_are_distinct_and_fit_31_bits() -> None:
    seeds = [sampling_seed(seed, step, group, index) for seed in range(3) for step in range(5) for group in range(8) for index in range(8)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
