"""Rollouts as columns: they come back equal from a file, and no file is read that is not sound in whole."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dasd_megatron.rollout_files import (
    load_samples,
    read_samples,
    remove_other_layouts,
    rollouts_path,
    save_columns,
    save_samples,
    whole_steps,
)
from dasd_megatron.sample_columns import Columns, columns_fault, from_columns, to_columns
from dasd_megatron.samples import ReplayError, Sample
from tests.support.random_samples import random_group


@pytest.fixture
def draw() -> random.Random:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


def groups_of(draw: random.Random, groups: int, size: int, **options: bool) -> list[Sample]:
    return [sample for group in range(groups) for sample in random_group(draw, group, size, **options)]


def test_columns_hold_every_field_of_every_sample(draw: random.Random) -> None:
    samples = groups_of(draw, 20, 4)
    again = from_columns(to_columns(samples, with_teacher=True))
    assert again == samples
    # Every field took part, of the type that it was made with, and a comparison finds a difference in each.
    for field in dataclasses.fields(Sample):
        one = next(sample for sample in again if getattr(sample, field.name) is not None)
        assert type(getattr(one, field.name)) is type(getattr(samples[again.index(one)], field.name))
        other = one.copy()
        setattr(other, field.name, another(getattr(one, field.name)))
        assert other != one, field.name


def another(value: Any) -> Any:
    """A value of the same type that is not equal."""
    if isinstance(value, np.ndarray | list):
        return value[1:]
    if isinstance(value, dict):
        return {"x": 1.0}
    return (not value) if isinstance(value, bool) else value + type(value)("1")


def test_a_token_takes_eight_bytes_and_a_prompt_is_there_once(draw: random.Random) -> None:
    samples = random_group(draw, 0, 64, with_teacher=False)
    for sample in samples:
        sample.response_ids, sample.rollout_log_probs = np.zeros(4096, np.int32), np.zeros(4096, np.float32)
        sample.response_mask, sample.weight_versions, sample.text = None, [["step_000000", 4096]], "7"
        sample.prompt_ids = samples[0].prompt_ids.copy()
    columns = to_columns(samples, with_teacher=False)
    assert sum(column.nbytes for column in columns.values()) < 8.1 * 64 * 4096
    assert len(columns["prompt_ids"]) == len(samples[0].prompt_ids)
    # What is read shares the memory of the columns.
    assert all(sample.response_ids.base is not None for sample in from_columns(columns))


def test_files_of_all_replicas_are_a_step_in_order(tmp_path: Path, draw: random.Random) -> None:
    samples = groups_of(draw, 4, 3, with_teacher=False)
    dealt = draw.sample(samples, len(samples))
    for replica in range(3):
        save_samples(rollouts_path(tmp_path, 7, replica, 3), dealt[4 * replica : 4 * replica + 4])
    assert load_samples(tmp_path, 7, groups=4, samples_per_group=3) == samples
    rollouts_path(tmp_path, 7, 1, 3).unlink()
    with pytest.raises(ReplayError, match="step_000007.safetensors: no such file"):
        load_samples(tmp_path, 7, groups=4, samples_per_group=3)


def test_another_layout_takes_the_place_of_the_former(tmp_path: Path, draw: random.Random) -> None:
    samples = groups_of(draw, 2, 2, with_teacher=False)
    (tmp_path / "step_000001.jsonl").write_text("old")
    for replica in range(2):
        save_samples(rollouts_path(tmp_path, 1, replica, 2), samples)
    save_samples(rollouts_path(tmp_path, 10), samples)
    remove_other_layouts(tmp_path, 1, 1)
    save_samples(rollouts_path(tmp_path, 1), samples)
    assert sorted(os.listdir(tmp_path)) == ["step_000001.safetensors", "step_000010.safetensors"]


def test_only_whole_steps_count() -> None:
    names = [
        "step_000001.jsonl", "step_000001.safetensors", "step_000002.jsonl", "step_000003-00001-of-00002.safetensors",
        "step_000004-00002-of-00002.safetensors", "step_000004-00001-of-00002.safetensors", ".step_000005.jsonl.9.tmp",
        "step_000006.safetensors.bak", "notes",
    ]  # fmt: skip
    assert whole_steps(names) == {
        1: ["step_000001.safetensors"],
        2: ["step_000002.jsonl"],
        4: ["step_000004-00001-of-00002.safetensors", "step_000004-00002-of-00002.safetensors"],
    }


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Columns], Columns]:
    return lambda columns: columns | {name: change(columns[name].copy())}


def at(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


UNSOUND: list[tuple[str, Callable[[Columns], Columns]]] = [
    ("reward is missing", lambda columns: {name: columns[name] for name in columns if name != "reward"}),
    ("response_ids must be a row of int32", changed("response_ids", lambda ids: ids.astype(np.int64))),
    ("response_ids must be a row of int32", changed("response_ids", lambda ids: ids[None])),
    ("rollout_log_probs must be a row", changed("rollout_log_probs", lambda values: values.astype(np.float16))),
    ("reward has 5 entries for 6 samples", changed("reward", lambda values: values[1:])),
    ("response_lengths do not add up", changed("response_ids", lambda ids: ids[1:])),
    ("response_lengths do not add up", changed("response_lengths", lambda counts: counts + [0, 0, 0, 0, 2**62, 2**62])),
    ("response_lengths do not add up", changed("response_lengths", lambda counts: counts + [-99, 99, 0, 0, 0, 0])),
    ("response_lengths do not add up .* response_mask", changed("response_mask", lambda mask: np.append(mask, True))),
    ("text_lengths do not add up", changed("texts", lambda texts: texts[:-1])),
    ("version_counts do not add up", changed("version_tokens", lambda tokens: np.append(tokens, 1))),
    ("measure_counts do not add up", changed("measure_counts", at(0, -2))),
    ("prompt_number has the number of an entry that is not there", changed("prompt_number", at(0, 99))),
    ("problem_number has the number of", changed("problem_number", at(0, -1))),
    ("feedback_number has the number of", changed("feedback_number", at(0, -2))),
    ("version_numbers has the number of", changed("version_numbers", at(0, 10**6))),
    ("is no UTF-8", changed("texts", at(0, 255))),
    ("rollout 1: group must be a whole number", changed("group", at(0, -1))),
    ("rollout 6: reward must be", changed("reward", at(5, np.nan))),
    ("rollout 6: reward must be", changed("reward", at(5, 2e15))),
    ("rollout 1: rollout_log_probs must be finite .* nan", changed("rollout_log_probs", at(0, np.nan))),
    ("rollout 1: rollout_log_probs must be finite .* 0.5", changed("rollout_log_probs", at(0, 0.5))),
    ("rollout 1: rollout_log_probs must be finite .* -inf", changed("rollout_log_probs", at(0, -np.inf))),
    ("rollout 1: response_ids must be a list of token ids", changed("response_ids", at(0, -5))),
    ("rollout 1: response_ids has token 2147483647, and the", changed("response_ids", at(0, 2**31 - 1))),
    ("rollout 1: prompt_ids must be", changed("prompt_ids", at(0, -5))),
    ("rollout 1: weight_versions must be a list", changed("version_tokens", at(0, -1))),
    ("rollout 1: weight_versions has .* tokens, and response_ids only", changed("version_tokens", at(0, 10**6))),
    ("measures must be null, or finite", changed("measure_values", at(0, np.inf))),
    ("response_mask must be null", changed("response_mask", np.zeros_like)),
    ("rollout_log_probs must be 0.0 where", changed("rollout_log_probs", lambda values: np.full_like(values, -1.0))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("named", "change"), UNSOUND, ids=[f"{place}-{name}" for place, (name, _) in enumerate(UNSOUND)]
)
def test_unsound_columns_are_refused_in_one_line(
    named: str, change: Callable[[Columns], Columns], tmp_path: Path
) -> None:
    draw, samples = random.Random(3), []
    while not (any(s.measures for s in samples) and any(s.response_mask is not None for s in samples)):
        samples = groups_of(draw, 2, 3, with_teacher=False)
    path = rollouts_path(tmp_path, 1)
    columns = to_columns(samples, with_teacher=False)
    save_columns(path, columns)
    assert read_samples(path) == samples
    save_columns(path, change(columns))
    with pytest.raises(ReplayError, match=named) as caught:
        read_samples(path, vocab_size=2**31 - 1)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_any_damage_of_a_file_is_refused_or_harmless(tmp_path: Path, draw: random.Random) -> None:
    path = rollouts_path(tmp_path, 1)
    save_samples(path, groups_of(draw, 2, 2, with_teacher=False))
    content = path.read_bytes()
    for _ in range(300):
        start = draw.randrange(len(content)) if draw.random() < 0.5 else draw.randrange(min(1500, len(content)))
        damaged = content[:start] + draw.randbytes(draw.randrange(9)) + content[start + draw.randrange(9) :]
        path.write_bytes(damaged[: draw.choice([len(damaged), start])])
        try:
            samples = read_samples(path, vocab_size=2**31)
        except ReplayError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert columns_fault(to_columns(samples, with_teacher=False)) is None


def test_what_is_no_file_of_columns_is_refused(tmp_path: Path) -> None:
    path = rollouts_path(tmp_path, 1)
    for content in (b"", b"{}", safetensors.numpy.save({"other": np.zeros(3)})):
        path.write_bytes(content)
        with pytest.raises(ReplayError, match="no saved rollouts"):
            read_samples(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ReplayError, match="step_000001.safetensors"):
        read_samples(path)
