"""Saved rollouts read back equal, and broken files are refused with their place."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.rollout_files import load_samples, read_samples
from dasd_megatron.rollout_json import as_json
from dasd_megatron.samples import (
    ReplayError,
    Sample,
    ids_array,
    log_probs_array,
    mask_array,
    sampling_seed,
)


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


def lines_path(folder: Path | str, step: int = 1) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def write_lines(path: Path, samples: Iterable[Sample]) -> None:
    """Write rollouts as earlier versions did."""
    path.write_text("".join(json.dumps(as_json(sample)) + "\n" for sample in samples))


def test_lines_are_read_exactly_and_in_order(tmp_path: Path) -> None:
    samples = [sample(group, index) for group in range(2) for index in range(3)]
    write_lines(lines_path(tmp_path, 7), reversed(samples))
    assert load_samples(tmp_path, 7, groups=2, samples_per_group=3) == samples


def test_masks_are_kept_and_say_what_was_sampled(tmp_path: Path) -> None:
    masked, whole = sample(0, 0), sample(0, 1)
    masked.measures = {"thinks": 1.0, "steps": -0.25}
    masked.response_mask, masked.rollout_log_probs = mask_array([0, 1]), log_probs_array([0.0, -1.0])
    assert ([*masked.sampled], [*whole.sampled]) == ([1], [0, 1])
    path = lines_path(tmp_path)
    write_lines(path, [masked, whole])
    assert load_samples(tmp_path, 1, groups=1, samples_per_group=2) == [masked, whole]
    # As they were saved before there were masks and measures.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["response_mask"], row["measures"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.response_mask for sample in load_samples(tmp_path, 1, groups=1, samples_per_group=2)] == [None, None]


def test_what_the_teacher_saw_is_kept_for_people_and_its_prompt_is_not(tmp_path: Path) -> None:
    shown, bare = sample(0, 0), sample(0, 1)
    shown.feedback, shown.privileged_source, shown.privileged = "no\u2028", "feedback", "Feedback:\nno"
    shown.teacher_prompt_ids = ids_array([1, 2, 3])
    path = lines_path(tmp_path)
    write_lines(path, [shown, bare])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("teacher_prompt_ids" not in row for row in rows)
    shown.teacher_prompt_ids = None
    assert read_samples(path) == [shown, bare]
    # As they were saved before there were other sources than the problem's own.
    later = ("response_mask", "feedback", "privileged_source", "privileged")
    path.write_text("".join(json.dumps({key: row[key] for key in row if key not in later}) + "\n" for row in rows))
    shown.feedback, shown.privileged_source, shown.privileged = None, None, ""
    assert read_samples(path) == [shown, bare]


@pytest.mark.parametrize("name", ["feedback", "privileged_source", "privileged"])
@pytest.mark.parametrize("value", [3, ["a"], "\ud800"])
def test_broken_texts_of_the_teacher_are_refused(name: str, value: object, tmp_path: Path) -> None:
    path = lines_path(tmp_path)
    write_lines(path, [sample(0, 0)])
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}) + "\n")
    with pytest.raises(ReplayError, match=f"step_000001.jsonl:1: {name} must be a text"):
        read_samples(path)


@pytest.mark.parametrize("mask", [[1], [0, 0], [0, 2], [1, None], [[1], 0], "01", 3])
def test_broken_masks_are_refused(mask: object, tmp_path: Path) -> None:
    path = lines_path(tmp_path)
    write_lines(path, [sample(0, 0)])
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "rollout_log_probs": [0.0, 0.0], "response_mask": mask}) + "\n"
    )
    with pytest.raises(ReplayError, match="step_000001.jsonl:1: response_mask must be null"):
        load_samples(tmp_path, 1, groups=1, samples_per_group=1)


def test_a_log_prob_of_a_token_that_was_not_sampled_is_refused(tmp_path: Path) -> None:
    shifted = sample(0, 0)
    shifted.response_mask, shifted.rollout_log_probs = mask_array([0, 1]), log_probs_array([-1.0, 0.0])
    path = lines_path(tmp_path)
    write_lines(path, [shifted])
    with pytest.raises(ReplayError, match="must be 0.0 where response_mask is 0"):
        load_samples(tmp_path, 1, groups=1, samples_per_group=1)


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
    path = lines_path(tmp_path)
    write_lines(path, [sample(group, index) for group in range(2) for index in range(3)])
    path.write_text("\n".join(change(path.read_text().split("\n")[:-1])) + "\n")
    with pytest.raises(ReplayError) as caught:
        load_samples(tmp_path, 1, groups=2, samples_per_group=3)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="rollout.replay"):
        load_samples(tmp_path, 1, groups=1, samples_per_group=1)


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
    write_lines(path, [saved])
    assert read_samples(path) == [saved]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b"[]",
        RECORD.replace("-0.1", "7" * 5_000).encode(),
        RECORD.encode()[:-1],
    ],
    ids=["not UTF-8", "deep", "no object", "5,000 digits", "cut"],
)
def test_damaged_lines_are_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes(RECORD.encode() + b"\n" + line + b"\n")
    with pytest.raises(ReplayError, match="step_000001.jsonl:2: not a saved rollout") as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)


NAN, INFINITY = float("nan"), float("inf")
# Values of one field that cannot be trained on, with the rest of the rollout sound; ids are of a model of 10 tokens.
UNSOUND: dict[str, list[object]] = {
    **dict.fromkeys(("group", "sample", "position"), [-1, 0.0, True, "0", None, [0], 2**63]),
    **dict.fromkeys(
        ("problem_id", "problem", "expected_answer", "reference_solution", "text", "finish_reason"),
        [None, 1, ["a"], {}, True, "\ud800"],
    ),
    **dict.fromkeys(
        ("prompt_ids", "response_ids"),
        [[], None, [1, -1], [1, 10], [1, 10**30], [1, 2.0], [True, 1], [1, None], [[1], 2], "12", {"0": 1, "1": 2}],
    ),
    "rollout_log_probs": [
        [],
        [-0.1],
        [-0.1] * 3,
        [-0.1, 0.5],
        [-0.1, NAN],
        [-0.1, -INFINITY],
        [-0.1, INFINITY],
        [-0.1, -1e300],
        [-0.1, "-0.1"],
        [-0.1, None],
        [-0.1, False],
        None,
        -0.1,
    ],
    "weight_versions": [
        [],
        None,
        "step_000000",
        [["step_000000"]],
        [["step_000000", 1, 1]],
        [[0, 1]],
        [["step_000000", "1"]],
        [["step_000000", 1.0]],
        [["step_000000", True]],
        [["step_000000", -1]],
        [["step_000000", 3]],
        {"step_000000": 2},
    ],
    "reward": [NAN, INFINITY, -INFINITY, 1e16, -1e300, 10**400, True, "1", None, [1.0]],
    "predicted_answer": [2, True, ["2"], "\ud800"],
    "timed_out": [None, 0, 1.0, "false"],
    "response_mask": [[], [1], [0, 0], [0, 2], [1, 1.0], [1, True], [1, None], "11", 3, {"0": 1}],
}


def write_record(path: Path, **changes: object) -> None:
    record = as_json(sample(0, 0)) | changes
    path.write_text(json.dumps(record, allow_nan=True) + "\n")


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_rollouts_are_refused_with_line_field_and_value(name: str, tmp_path: Path) -> None:
    path = lines_path(tmp_path)
    for value in UNSOUND[name]:
        write_record(path, **{name: value})
        with pytest.raises(ReplayError) as caught:
            load_samples(tmp_path, 1, groups=1, samples_per_group=1, vocab_size=10)
        message = str(caught.value)
        assert message.startswith(f"{path}:1: ") and name in message and "\n" not in message, (value, message)
        assert len(message) < len(str(path)) + 250, message
    # Nothing but the field was wrong.
    write_record(path)
    assert load_samples(tmp_path, 1, groups=1, samples_per_group=1, vocab_size=10) == [sample(0, 0)]


def test_sound_rollouts_at_the_bounds_are_taken(tmp_path: Path) -> None:
    path = lines_path(tmp_path)
    for changes in (
        {"prompt_ids": [0, 9], "response_ids": [9, 0]},
        {"rollout_log_probs": [0, -3e38]},
        {"rollout_log_probs": [1e-4, -0.0]},
        {"reward": 1e15},
        {"reward": -3},
        {"weight_versions": [["v", 1]]},
        {"response_mask": [1, 0], "rollout_log_probs": [-1.0, 0.0]},
        {"predicted_answer": None, "text": "", "problem": "\u2028"},
    ):
        write_record(path, **changes)
        (found,) = load_samples(tmp_path, 1, groups=1, samples_per_group=1, vocab_size=10)
        assert found == dataclasses.replace(sample(0, 0), **changes)


@pytest.mark.parametrize(
    ("index", "changes", "named"),
    [
        (1, {"problem_id": "p1"}, "group 0 has the problems 'p0'"),
        (1, {"position": 77}, "position 77"),
        (1, {"sample": 0}, "batch.groups"),
        (3, {"group": 0}, "batch.groups"),
        (slice(3, 6), {"position": 10}, "groups 0 and 1 have the same position 10"),
    ],
)
def test_groups_of_several_prompts_are_refused(index: int | slice, changes: dict, named: str, tmp_path: Path) -> None:
    path = lines_path(tmp_path)
    samples = [sample(group, number) for group in range(2) for number in range(3)]
    for changed in samples[index] if isinstance(index, slice) else [samples[index]]:
        for name, value in changes.items():
            setattr(changed, name, value)
    write_lines(path, samples)
    with pytest.raises(ReplayError) as caught:
        load_samples(tmp_path, 1, groups=2, samples_per_group=3)
    assert named in str(caught.value) and str(path) in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(list(UNSOUND)), JSON_VALUES, max_size=3), cut=st.integers(0, 2000))
@settings(max_examples=120, deadline=None)
def test_any_rollout_is_sound_or_refused_in_one_line(changes: dict[str, object], cut: int) -> None:
    """Whatever stands in a file: what is taken can be trained on, and what cannot is named."""
    with tempfile.TemporaryDirectory() as folder:
        path = lines_path(folder)
        write_record(path, **changes)
        if cut < 500:
            path.write_bytes(path.read_bytes()[:cut])
        try:
            samples = read_samples(path, vocab_size=10)
        except ReplayError as error:
            assert str(error).startswith(f"{path}:1: ") and "\n" not in str(error)
            return
        for found in samples:
            count = len(found.response_ids)
            assert count == len(found.rollout_log_probs) > 0 and len(found.sampled) > 0
            assert {found.prompt_ids.dtype, found.response_ids.dtype} == {np.dtype(np.int32)}
            assert all(0 <= token < 10 for token in [*found.prompt_ids, *found.response_ids])
            assert found.rollout_log_probs.dtype == np.float32 and np.isfinite(found.rollout_log_probs).all()
            assert torch.tensor(found.reward, dtype=torch.float32).square().mul(1e6).isfinite()
            write_record(path, **as_json(found))
            assert read_samples(path) == [found]
