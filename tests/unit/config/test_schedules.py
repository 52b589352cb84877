"""Schedules: the course of a setting, and what a run takes of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import dasd_megatron
from dasd_megatron.config import AlgorithmConfig, ScheduleConfig, load_config, read_config, save_config
from dasd_megatron.errors import ConfigError

PRESETS = sorted(path.stem for path in (Path(dasd_megatron.__file__).parent / "conf/algorithm").glob("*.yaml"))
QUICK = "experiment=quickstart"


def test_the_courses_begin_at_the_value_and_end_at_the_final_one() -> None:
    linear, cosine = (ScheduleConfig(style, final=0.1, steps=4) for style in ("linear", "cosine"))
    assert [linear.value(0.5, step, 100) for step in (1, 2, 3, 4, 5, 60)] == pytest.approx(
        [0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    )
    half = math.cos(math.pi / 4)
    assert [cosine.value(0.5, step, 100) for step in (1, 2, 3, 5, 60)] == pytest.approx(
        [0.5, 0.3 + 0.2 * half, 0.3, 0.1, 0.1]
    )
    for schedule in (linear, cosine):
        assert schedule.value(0.5, 1, 100) == 0.5 and schedule.value(0.5, 5, 100) == 0.1
        assert schedule.value(0.0, 3, 100) == pytest.approx(0.05)
    assert ScheduleConfig(final=0.1, steps=4).value(0.5, 3, 100) == 0.5


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_without_steps_the_last_step_of_the_run_has_the_final_value(style: str) -> None:
    schedule = ScheduleConfig(style, final=0.2)
    values = [schedule.value(1.0, step, 11) for step in range(1, 12)]
    assert values[0] == 1.0 and values[-1] == 0.2 and values[5] == pytest.approx(0.6)
    assert sorted(values, reverse=True) == values
    assert [schedule.value(1.0, 1, run_steps) for run_steps in (1, 2)] == [1.0, 1.0]


def test_a_section_at_a_step_has_its_scheduled_values_and_nothing_else_changed() -> None:
    settings = AlgorithmConfig(
        beta=0.3,
        scale_floor=1.0,
        beta_schedule=ScheduleConfig("linear", final=0.1, steps=2),
        rho_schedule=ScheduleConfig("cosine", final=0.4, steps=2),
    )
    assert settings.at(1, 50) == settings
    later = settings.at(2, 50)
    assert (later.beta, later.rho) == pytest.approx((0.2, 0.3))
    assert (later.divergence_weight, later.rlsd_lambda) == (settings.divergence_weight, settings.rlsd_lambda)
    assert later.method_settings.beta == later.beta
    # The section that a run keeps is its own at every step.
    assert (settings.at(3, 50).beta, settings.beta) == (0.1, 0.3)


def test_schedules_are_given_and_kept_like_any_field(tmp_path: Path) -> None:
    config = load_config([QUICK, "algorithm.beta_schedule.style=cosine", "algorithm.beta_schedule.steps=7"])
    assert config.algorithm.beta_schedule == ScheduleConfig("cosine", 0.0, 7)
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").algorithm == config.algorithm
    # The teacher alone may begin at nothing.
    rising = ["algorithm=opsd", "algorithm.verifier_weight=0", "algorithm.beta=0"]
    rising += ["algorithm.beta_schedule.style=linear", "algorithm.beta_schedule.final=0.1"]
    assert load_config([QUICK, *rising]).algorithm.at(115, 115).beta == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.beta_schedule.style=sine", "algorithm.beta_schedule.style=sine.*constant"),
        ("algorithm.beta_schedule.steps=0", "algorithm.beta_schedule.steps=0: must be at least 1"),
        ("algorithm.beta_schedule.final=-1", "algorithm.beta_schedule.final=-1.0: must be at least 0"),
        ("algorithm.beta_schedule.final=nan", "algorithm.beta_schedule.final"),
        ("algorithm.beta_schedule=linear", "algorithm.beta_schedule"),
        ("algorithm.gamma_schedule.style=linear", "algorithm.gamma_schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([QUICK, override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rho", "rlsd_lambda"])
def test_a_share_does_not_rise_above_one(name: str) -> None:
    course = [f"algorithm.{name}_schedule.style=linear", f"algorithm.{name}_schedule.final=1.5"]
    with pytest.raises(ConfigError, match=f"algorithm.{name}_schedule.final=1.5: must be between 0 and 1"):
        load_config([QUICK, *course])


@pytest.mark.parametrize(
    ("name", "unread", "read"),
    [
        ("beta", ["algorithm=rlsd"], ["algorithm=opsd"]),
        ("beta", ["algorithm=dasd", "algorithm.objective=distributional"], ["algorithm=dasd"]),
        ("rho", ["algorithm=opsd"], ["algorithm=dasd"]),
        ("divergence_weight", ["algorithm=opsd"], ["algorithm=opsd_full"]),
        ("rlsd_lambda", ["algorithm=dasd"], ["algorithm=rlrt"]),
    ],
)
def test_schedules_of_what_nothing_reads_are_refused(name: str, unread: list[str], read: list[str]) -> None:
    course = f"algorithm.{name}_schedule.style=linear"
    with pytest.raises(ConfigError, match=f"{course} does nothing.*does not read algorithm.{name}: write constant"):
        load_config([QUICK, *unread, course])
    load_config([QUICK, *read, course])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_run(preset: str) -> None:
    config = load_config([QUICK, f"algorithm={preset}"])
    first, last = (config.algorithm.at(step, config.run.steps) for step in (1, config.run.steps))
    assert first == config.algorithm
    if preset == "rlsd":
        assert (first.rlsd_lambda, config.algorithm.at(26, 115).rlsd_lambda, last.rlsd_lambda) == (0.5, 0.25, 0.0)
    if preset in ("sdpo", "srpo"):
        assert (config.teacher.weights, config.teacher.ema_decay) == ("ema", 0.95)
        assert config.teacher.privileged == ["peer"]
    if preset == "pw_opsd":
        assert config.loss.aggregation == "seq_mean_token_mean"
    if preset == "dr_grpo":
        assert not config.algorithm.normalize_std and config.loss.aggregation == "seq_mean_token_sum_norm"
    if preset in ("sdpo", "pw_opsd", "opsd_full"):
        assert config.algorithm.verifier_weight == 0.0
