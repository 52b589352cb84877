from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from dasd_megatron.config import WATCH_CONDITIONS, WatchConfig
from dasd_megatron.observability.metric_files import WARNINGS, truncate_after
from dasd_megatron.observability.watch import (
    CONDITIONS,
    Alert,
    MetricHistory,
    Watch,
    open_watch,
    record_alerts,
)

SETTINGS = WatchConfig(patience=3, cooldown=20, baseline_steps=4)
HEALTHY = {
    "reward/accuracy": 0.6,
    "reward/groups_all_correct": 0.1,
    "reward/groups_all_wrong": 0.1,
    "entropy/mean": 0.3,
    "response/length_mean": 100.0,
    "response/truncated_share": 0.02,
    "rollout/log_prob_diff_mean": 0.01,
    "rollout/rejected_share": 0.05,
    "rollout/groups_filtered": 2,
    "rollout/groups_drawn": 10,
    "teacher/absent_share": 0.2,
    "credit/delta_abs_mean": 0.3,
    "credit/pushed_delta_mean": -0.6,
    "credit/pushed_log_prob_mean": -1.2,
    "update/loss": 0.1,
    "update/grad_norm": 1.0,
}


def rows_of(changes: dict[str, list[float]], steps: int | None = None) -> list[dict]:
    steps = steps or max(len(values) for values in changes.values())
    return [
        {"step": step, **HEALTHY, **{key: values[step - 1] for key, values in changes.items()}}
        for step in range(1, steps + 1)
    ]


def feed(rows: list[dict], settings: WatchConfig = SETTINGS, has_teacher: bool = True) -> list[Alert]:
    watch = Watch(settings, has_teacher=has_teacher)
    return [alert for row in rows for alert in watch.update(row)]


def changed(**changes) -> WatchConfig:
    return dataclasses.replace(SETTINGS, **changes)


# Condition, series, step of its first warning, what it says.
FIRES = [
    ("entropy_low", {"entropy/mean": [0.4] * 5 + [0.03] * 3}, 8, "entropy is 0.03 nat a token"),
    ("entropy_low", {"entropy/mean": [0.1] * 5 + [0.4] * 4 + [0.039] * 3}, 12, "its highest level 0.4"),
    ("entropy_high", {"entropy/mean": [0.3] * 4 + [1.0] * 3}, 7, "over watch.entropy_high=3 times its first level 0.3"),
    (
        "accuracy_drop",
        {"reward/accuracy": [0.5] * 4 + [0.8] * 4 + [0.5] * 3},
        11,
        "accuracy is 50.0% after a highest level of 80.0%",
    ),
    ("accuracy_drop", {"reward/accuracy": [0.8 - 0.01 * step for step in range(40)]}, 29, "algorithm.beta"),
    (
        "length",
        {"response/length_mean": [100.0] * 9 + [210.0] * 3},
        12,
        "210 tokens on average, over watch.length_growth=2 times 100",
    ),
    (
        "length",
        {"response/truncated_share": [0.0] + [0.9] * 3},
        4,
        "90% of the responses end at rollout.max_new_tokens",
    ),
    ("mismatch", {"rollout/log_prob_diff_mean": [0.01] * 4 + [0.05] * 3}, 7, "differ by 0.05 nats a token"),
    ("rejected", {"rollout/rejected_share": [0.2] * 2 + [0.6] * 3}, 5, "60% of the tokens are rejected"),
    ("rewards_all_right", {"reward/groups_all_correct": [0.95] * 3}, 3, "95% of the groups are all right"),
    ("rewards_all_wrong", {"reward/groups_all_wrong": [1.0] * 3}, 3, "100% of the groups are all wrong"),
    ("groups_filtered", {"rollout/groups_filtered": [10] * 3}, 3, "100% of 10 groups drawn are refused"),
    ("teacher_absent", {"teacher/absent_share": [0.95] * 3}, 3, "95% of the rollouts have no teacher"),
    ("teacher_equals_student", {"credit/delta_abs_mean": [1e-7] * 3}, 3, "teacher.template"),
    ("pushed_unlikely", {"credit/pushed_delta_mean": [-2.5] * 3}, 3, "are 2.5 nats less likely under it"),
    (
        "pushed_diverge",
        {"credit/pushed_log_prob_mean": [-1.0] * 4 + [-3.5] * 3},
        7,
        "2.5 nats under their highest level",
    ),
    ("non_finite", {"update/loss": [0.1, math.nan]}, 2, "update/loss not finite"),
    (
        "non_finite",
        {"update/loss": [math.nan], "update/grad_norm": [math.inf]},
        1,
        "update/loss and update/grad_norm not finite",
    ),
]


@pytest.mark.parametrize(("condition", "changes", "step", "words"), FIRES)
def test_fires_once_with_numbers_meaning_and_advice(condition, changes, step, words):
    (alert,) = feed(rows_of(changes))
    assert (alert.condition, alert.step) == (condition, step)
    assert words in alert.text and alert.text.startswith(f"step {step}, {condition}: ") and "\n" not in alert.text
    assert ". Usually " in alert.text and ". Advice: " in alert.text


SILENT = [
    {"entropy/mean": [0.4] * 5 + [0.041] * 9},
    {"entropy/mean": [0.4] * 5 + [0.001] * 2 + [0.4, 0.001, 0.001, 0.4]},
    {"entropy/mean": [0.001] * 9},
    {"entropy/mean": [0.1] * 5 + [0.59] * 9},
    {"entropy/mean": [1.0] * 5 + [2.9] * 9},
    {"reward/accuracy": [0.12] * 6 + [0.03] * 9},
    {"reward/accuracy": [0.8] * 6 + [0.6] * 20},
    {"response/length_mean": [10.0 * 1.05**step for step in range(100)]},
    {"response/truncated_share": [0.49] * 9},
    {"rollout/log_prob_diff_mean": [1e-7] * 5 + [0.029] * 9},
    {"rollout/log_prob_diff_mean": [0.05] * 5 + [0.14] * 9},
    {"reward/groups_all_correct": [0.89] * 9},
    {"rollout/groups_filtered": [8] * 9},
    {"rollout/groups_filtered": [0] * 9, "rollout/groups_drawn": [0] * 9},
    {"credit/delta_abs_mean": [0.0011] * 9},
    {"credit/pushed_delta_mean": [-1.9] * 9},
    {"credit/pushed_log_prob_mean": [-1.0] * 5 + [-2.9] * 9},
    {"credit/pushed_log_prob_mean": [-9.0] * 5 + [-1.0] * 9},
]


@pytest.mark.parametrize("changes", SILENT)
def test_thresholds_are_not_stricter_than_documented(changes):
    assert feed(rows_of(changes)) == []


def test_every_condition_is_known_to_the_configuration_and_tested():
    assert tuple(condition.name for condition in CONDITIONS) == WATCH_CONDITIONS
    assert {name for name, *_ in FIRES} == set(WATCH_CONDITIONS)
    assert set(WatchConfig().act_on) <= set(WATCH_CONDITIONS)


def test_a_warning_comes_again_after_the_cool_down_only():
    wrong = rows_of({"reward/groups_all_wrong": [1.0] * 50})
    assert [alert.step for alert in feed(wrong)] == [3, 24, 45]
    # Back within the cool-down, and after it.
    values = [1.0] * 3 + [0.0] * 5 + [1.0] * 5 + [0.0] * 20 + [1.0] * 3
    assert [alert.step for alert in feed(rows_of({"reward/groups_all_wrong": values}))] == [3, 36]
    assert [alert.step for alert in feed(wrong, changed(cooldown=0))] == list(range(3, 51))


def test_steps_without_metrics_neither_count_nor_break_a_row():
    rows = rows_of({"entropy/mean": [0.4] * 4 + [0.01] * 5})
    for row in rows[5:7]:
        row["entropy/mean"] = math.nan if row["step"] == 6 else None
    assert [alert.step for alert in feed(rows)] == [9]
    assert feed([{"step": step} for step in range(1, 30)]) == []


def test_what_is_left_out():
    equal = rows_of({"credit/delta_abs_mean": [0.0] * 9})
    assert feed(equal, has_teacher=False) == []
    assert feed(equal, changed(ignore=["teacher_equals_student"])) == []
    assert feed(rows_of({"response/truncated_share": [1.0] * 9}), changed(truncated_share=0.0)) == []


def test_action_is_taken_on_the_conditions_that_are_named_alone():
    (right,), (low,) = (
        feed(rows_of({"reward/groups_all_correct": [1.0] * 3})),
        feed(rows_of({"entropy/mean": [0.4] * 4 + [0.01] * 3})),
    )
    watch = Watch(changed(action="stop"), has_teacher=True)
    assert [watch.action(alerts) for alerts in ([], [right], [low], [right, low])] == ["warn", "warn", "stop", "stop"]
    assert Watch(changed(action="pause", act_on=["rewards_all_right"]), has_teacher=True).action([right]) == "pause"
    assert Watch(SETTINGS, has_teacher=True).action([low]) == "warn"


def test_levels_against_their_definition():
    for seed in range(30):
        draw = random.Random(seed)
        width, lag = draw.randint(1, 5), draw.randint(1, 5)
        values, series = [], MetricHistory(width, lag)
        for _ in range(30):
            # The step that is judged is the one after `values`.
            earlier = [*values, None][: len(values) + 1 - lag] if lag <= len(values) + 1 else []
            expected = sum(earlier[-width:]) / width if len(earlier) >= width else None
            assert series.before == (pytest.approx(expected) if expected is not None else None)
            levels = [sum(values[end - width : end]) / width for end in range(width, len(values) + 1)]
            assert series.first == (pytest.approx(levels[0]) if levels else None)
            assert (series.highest, series.lowest) == pytest.approx(
                (max(levels, default=-math.inf), min(levels, default=math.inf))
            )
            values.append(draw.random())
            series.add(values[-1])


def test_a_healthy_noisy_run_is_left_alone():
    for seed in range(20):
        noise = random.Random(seed)
        rows = []
        for step in range(1, 301):
            accuracy = min(1.0, max(0.0, 0.4 + 0.0015 * step + noise.gauss(0, 0.05)))
            changes = {
                "reward/accuracy": accuracy,
                "reward/groups_all_correct": accuracy**8,
                "reward/groups_all_wrong": (1 - accuracy) ** 8,
                "entropy/mean": 0.4 * math.exp(-step / 200) * noise.uniform(0.8, 1.2),
                "response/length_mean": (100 + step) * noise.uniform(0.85, 1.15),
                "rollout/log_prob_diff_mean": 0.01 * noise.uniform(0.5, 2.0),
                "rollout/groups_filtered": noise.randint(0, 8),
                "credit/delta_abs_mean": noise.uniform(0.05, 0.4),
                "credit/pushed_log_prob_mean": -1.2 + noise.gauss(0, 0.2),
            }
            rows.append({"step": step, **HEALTHY, **changes})
        assert feed(rows, WatchConfig()) == []


def test_a_resumed_watch_says_what_an_uninterrupted_one_says(tmp_path: Path):
    draw = random.Random(5)
    values = [draw.choice([0.4, 0.01]) if step % 40 < 20 else 0.01 for step in range(200)]
    rows = rows_of({"entropy/mean": values})
    whole = feed(rows)
    assert len(whole) > 2
    kept, wanted = draw.randint(60, 150), []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:kept]))
    record_alerts(tmp_path, [alert for alert in whole if alert.step <= kept + 30], "warn")
    truncate_after(tmp_path, kept)
    watch = open_watch(tmp_path, SETTINGS, has_teacher=True)
    for row in rows[kept:]:
        wanted += watch.update(row)
    assert wanted == [alert for alert in whole if alert.step > kept]
    lines = [json.loads(line) for line in (tmp_path / WARNINGS).read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [
        (alert.step, alert.text) for alert in whole if alert.step <= kept
    ]
    assert {(line["condition"], line["action"]) for line in lines} == {("entropy_low", "warn")}
