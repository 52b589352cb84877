from __future__ import annotations

import errno
import json
import math
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dasd_megatron.files import RunDirectoryError
from dasd_megatron.observability import metric_files
from dasd_megatron.observability.loggers import MetricsLogger
from dasd_megatron.observability.metric_files import missing_steps, read_metrics, set_rows_aside, truncate_after


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_steps_round_trip_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1.0, float(np.float32(0.1))]
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        for step, value in enumerate(values, start=1):
            logger.log_step(
                {
                    "step": step,
                    "x": value,
                    "np": np.float32(value if abs(value) < 1e30 else 1.0),
                    "t": torch.tensor(0.1),
                    "weight_version": "7",
                }
            )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [bits(row["x"]) for row in rows] == [bits(value) for value in values]
    assert (
        rows[0]["np"] == float(np.float32(0.1))
        and rows[0]["t"] == torch.tensor(0.1).item()
        and rows[0]["weight_version"] == "7"
    )
    assert all(row["time"] > 1e9 for row in rows)


@given(st.floats())
def test_any_float_survives_the_file_format(value):
    text = json.dumps({"x": metric_files.plain_value("x", value)}, allow_nan=False)
    back = strict(text)["x"]
    back = metric_files._NON_FINITE.get(back, back) if isinstance(back, str) else back
    assert bits(back) == bits(value) or (math.isnan(back) and math.isnan(value))


def test_non_finite_values_stay_valid_json_and_visible(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log_step({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert [strict(line)[key] for key in "abc"] == ["NaN", "Infinity", "-Infinity"]
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_other_kinds_of_line_go_to_their_files(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log_warm_start({"step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5})
        logger.log_evaluation({"step": 0, "label": "before", "avg@16": 0.5})
    assert read_metrics(tmp_path / "warm_start.jsonl") == [{"step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5}]
    assert read_metrics(tmp_path / "evaluation.jsonl") == [{"step": 0, "label": "before", "avg@16": 0.5}]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("metrics", "kind"),
    [({"x": 1.0}, RunDirectoryError), ({"step": 1.5}, RunDirectoryError), ({"step": 1, "x": [1, 2]}, TypeError)],
)
def test_a_line_that_cannot_be_logged_is_refused_and_leaves_no_trace(tmp_path, metrics, kind):
    with MetricsLogger(tmp_path, tensorboard=False) as logger, pytest.raises(kind):
        logger.log_step(metrics)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_step_is_never_logged_twice(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log_step({"step": 3})
    with (
        MetricsLogger(tmp_path, tensorboard=False) as logger,
        pytest.raises(RunDirectoryError, match="already holds step 3"),
    ):
        logger.log_step({"step": 3})
    truncate_after(tmp_path, 2)
    with MetricsLogger(tmp_path, tensorboard=False, resume_step=2) as logger:
        logger.log_step({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize(
    "half", ['{"step": 4, "x": 0.1', '{"step": 4, "x"', "{", "\0\0\0\0", '"text"', '{"step": 4, "x": "caf\ufffd']
)
def test_truncate_drops_later_steps_and_a_half_written_line(tmp_path, half):
    whole = [json.dumps({"step": step, "x": 0.1 * step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(whole) + "\n" + half)
    (tmp_path / "evaluation.jsonl").write_text('{"step": 0, "label": "before"}\n{"step": 3, "label": "step"}\n')
    (tmp_path / "warm_start.jsonl").write_text('{"step": 900, "loss": 1.0}\n')
    truncate_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole[0] + "\n" + whole[1] + "\n"
    assert [row["step"] for row in read_metrics(tmp_path / "evaluation.jsonl")] == [0]
    assert len(read_metrics(tmp_path / "warm_start.jsonl")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.jsonl", "metrics.jsonl", "warm_start.jsonl"]


def test_rows_of_an_attempt_that_is_given_up_are_kept_beside(tmp_path):
    assert set_rows_aside(tmp_path, "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").touch()
    assert set_rows_aside(tmp_path, "metrics.jsonl") is None
    for attempt in ("1", "2"):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {attempt}}}\n')
        assert set_rows_aside(tmp_path, "metrics.jsonl") == f"metrics.jsonl.{attempt}"
    assert {path.name: read_metrics(path) for path in tmp_path.iterdir()} == {
        f"metrics.jsonl.{step}": [{"step": step}] for step in (1, 2)
    }


@pytest.mark.parametrize(
    ("steps", "lacking"),
    [
        ([1, 2, 3], 0),
        ([1, 2, 3, 4], 0),
        ([1, 2], 1),
        ([1, 3], 1),
        ([], 3),
        # A run that has gone on from another one's checkpoint of step 1.
        ([2, 3], 0),
        ([-(10**12), 2, 3], 0),
        ([4, 5], 3),
    ],
)
def test_steps_that_metrics_lack_are_counted(tmp_path, steps, lacking):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    assert missing_steps(tmp_path, 3) == lacking


def test_a_file_of_which_nothing_is_dropped_is_not_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n')
    before = (tmp_path / "metrics.jsonl").stat()
    truncate_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").stat() == before


def test_a_number_that_no_float_holds_is_infinite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "x": {10**400}, "y": -{10**400}, "z": {2**70}}}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": math.inf, "y": -math.inf, "z": 2**70}]


def test_truncate_cuts_a_multibyte_character_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + '{"step": 2, "x": "é'.encode()[:-1])
    truncate_after(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_truncate_keeps_a_whole_line_without_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    truncate_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_damage_inside_a_file_is_reported_not_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl line 2 is damaged"):
        truncate_after(tmp_path, 9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


def test_truncate_leaves_the_old_file_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        truncate_after(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_without_files_does_nothing(tmp_path):
    truncate_after(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_new_logger_does_not_continue_a_half_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "x')
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log_step({"step": 2, "time": 5.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "time": 5.0}]


def test_a_full_disk_leaves_only_whole_lines(tmp_path, monkeypatch):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.log_step({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl: only 5 of"):
        logger.log_step({"step": 2})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    logger.log_step({"step": 2})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_read_only_directory_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*Read-only file system.*run.dir"):
        MetricsLogger(tmp_path, tensorboard=False)


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        MetricsLogger(tmp_path / "run", tensorboard=False)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_scalars_and_purge_on_resume(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        logger.log_warm_start({"step": 50, "loss": 1.5})
        for step in (1, 2, 3):
            logger.log_step({"step": step, "reward/accuracy": step / 4, "weight_version": "v", "update/loss": math.nan})
        logger.log_evaluation({"step": 3, "label": "step", "avg@16": 0.25})
    assert scalars(tmp_path / "tensorboard", "reward/accuracy") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert all(math.isnan(value) for _, value in scalars(tmp_path / "tensorboard", "update/loss"))
    assert scalars(tmp_path / "tensorboard", "evaluation/avg@16") == [(3, 0.25)]
    truncate_after(tmp_path, 1)
    with MetricsLogger(tmp_path, tensorboard=True, resume_step=1) as logger:
        logger.log_step({"step": 2, "reward/accuracy": 1.0})
    assert scalars(tmp_path / "tensorboard", "reward/accuracy") == [(1, 0.25), (2, 1.0)]
    assert scalars(tmp_path / "tensorboard" / "warm_start", "loss") == [(50, 1.5)]
