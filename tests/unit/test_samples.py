"""Saved rollouts read back equal, and broken files are refused with their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.rollout.client import sampling_seed
from dasd_megatron.samples import ReplayError, Sample, load_samples, read_samples, rollouts_path, save_samples


def sample(group: int, index: int) -> Sample:
    return Sample(
        group,
        index,
        10 + group,
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


def test_masks_are_kept_and_say_what_was_sampled(tmp_path: Path) -> None:
    masked, whole = sample(0, 0), sample(0, 1)
    masked.response_mask, masked.rollout_log_probs = [0, 1], [0.0, -1.0]
    assert ([*masked.sampled], [*whole.sampled]) == ([1], [0, 1])
    path = rollouts_path(tmp_path, 1)
    save_samples(path, [masked, whole])
    assert load_samples(path, groups=1, samples_per_group=2) == [masked, whole]
    # As they were saved before there were masks.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({key: value for key, value in row.items() if key != "response_mask"}) + "\n" for row in rows)
    )
    assert [sample.response_mask for sample in load_samples(path, groups=1, samples_per_group=2)] == [None, None]


@pytest.mark.parametrize("mask", [[1], [0, 0], [0, 2], [1, None], [[1], 0], "01", 3])
def test_broken_masks_are_refused(mask: object, tmp_path: Path) -> None:
    path = rollouts_path(tmp_path, 1)
    save_samples(path, [sample(0, 0)])
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "rollout_log_probs": [0.0, 0.0], "response_mask": mask}) + "\n"
    )
    with pytest.raises(ReplayError, match="step_000001.jsonl:1: response_mask must be null, or"):
        load_samples(path, groups=1, samples_per_group=1)


def test_a_log_prob_of_a_token_that_was_not_sampled_is_refused(tmp_path: Path) -> None:
    shifted = sample(0, 0)
    shifted.response_mask, shifted.rollout_log_probs = [0, 1], [-1.0, 0.0]
    path = rollouts_path(tmp_path, 1)
    save_samples(path, [shifted])
    with pytest.raises(ReplayError, match="must be 0.0 where response_mask is 0"):
        load_samples(path, groups=1, samples_per_group=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows[:-1], "batch.groups"),
        (lambda rows: [*rows, rows[0]], "batch.groups"),
        (lambda rows: [*rows[:1], "{", *rows[2:]], ":2"),
        (lambda rows: [json.dumps({**json.loads(rows[0]), "rollout_log_probs": [0.0]}), *rows[1:]], ":1"),
        (
            lambda rows: [
                json.dumps({key: value for key, value in json.loads(rows[0]).items() if key != "reward"}),
                *rows[1:],
            ],
            "reward",
        ),
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
    seeds = [
        sampling_seed(seed, step, group, index)
        for seed in range(3)
        for step in range(5)
        for group in range(8)
        for index in range(8)
    ]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


SEPARATORS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")
RECORD = (
    '{"group": 0, "sample": 0, "position": 0, "problem_id": "p", "problem": "a", "expected_answer": "1", '
    '"reference_solution": "", "prompt_ids": [1], "response_ids": [2], "rollout_log_probs": [-0.1], "text": "x", '
    '"finish_reason": "stop", "weight_versions": [["v", 1]], "reward": 0.0, "predicted_answer": null, '
    '"timed_out": false}'
)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_other_writers_may_hold_any_character_that_json_allows(end: str, tmp_path: Path) -> None:
    text = "".join(character for character in SEPARATORS if ord(character) >= 32)
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes((RECORD.replace('"x"', f'"x{text}y"') + end).encode() * 2)
    assert [sample.text for sample in read_samples(path)] == [f"x{text}y"] * 2
    saved = read_samples(path)[0]
    saved.text = f"x{''.join(SEPARATORS)}y"
    save_samples(path, [saved])
    assert read_samples(path) == [saved]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b"[]",
        RECORD.replace("-0.1", "7" * 5_000).encode(),
        RECORD.encode()[:-1],
        b"",
    ],
    ids=["not UTF-8", "deep", "no object", "5,000 digits", "cut", "blank"],
)
def test_damaged_lines_are_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes(RECORD.encode() + b"\n" + line + b"\n")
    with pytest.raises(ReplayError, match="step_000001.jsonl:2: not a saved rollout") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)
