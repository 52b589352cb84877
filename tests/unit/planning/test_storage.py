"""Bytes on disk and the seconds of moving them, against figures by hand and a checkpoint that was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import assume
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.plan import model_sizes, plan_config
from dasd_megatron.planning.rollouts import Servers
from dasd_megatron.planning.storage import (
    Saving,
    checkpoint_bytes,
    checkpoints_at_once,
    evaluations_of,
    saving_time,
    storage_of,
    sync_time,
)

H100 = assume("h100", [])
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def arch_of(config: Config) -> Architecture:
    return Architecture.of(model_sizes(config.model))


def test_a_checkpoint_is_as_large_as_the_measured_one() -> None:
    config = plan_config(["model=smollm2_135m", "precision=fp32", "rollout.max_new_tokens=1024"])
    measured = json.loads((RESULTS / "checkpoint.json").read_text())["bytes"]
    assert checkpoint_bytes(arch_of(config), config) == pytest.approx(measured, rel=2e-3)


def test_bytes_by_hand() -> None:
    # Weights in bf16, and float32 weights and two moments: 14 bytes for each of the 8,030,261,248 parameters.
    config = plan_config(["model=llama3_8b", "run.steps=100", "checkpoint.every=10", "rollout.weight_sync=disk"])
    arch = arch_of(config)
    assert checkpoint_bytes(arch, config) == 112_423_657_472
    storage = storage_of(arch, config)
    # Two are kept while a third is written. Servers read one version while the next is written.
    assert storage.checkpoints == 3 * 112_423_657_472
    assert (storage.weights, storage.exports) == (2 * 16_060_522_496, 16_060_522_496)
    assert storage.total == 3 * 112_423_657_472 + 3 * 16_060_522_496
    more = ["checkpoint.export_every=25", "rollout.weight_sync=distributed", "teacher.weights=ema"]
    changed = plan_config(["model=llama3_8b", "run.steps=100", *more])
    assert checkpoint_bytes(arch, changed) == 18 * 8_030_261_248
    assert storage_of(arch, changed).exports == 5 * 16_060_522_496 and storage_of(arch, changed).weights == 0


@pytest.mark.parametrize(
    ("name", "each", "together"), [("dasd_7b", 107, 320), ("dasd_32b", 459, 1376), ("dasd_70b", 988, 2963)]
)
def test_checkpoints_of_the_presets(name: str, each: float, together: float) -> None:
    config = plan_config([f"experiment={name}"])
    storage = storage_of(arch_of(config), config)
    assert (round(storage.checkpoint / 1e9), round(storage.checkpoints / 1e9)) == (each, together)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        (["checkpoint.every=10"], 3),
        (["checkpoint.every=0"], 1),
        (["checkpoint.every=60", "checkpoint.keep_last=1"], 2),
        # Of the steps 10, 20, ... 100 those up to 70 have made room, but for 30 and 60.
        (["checkpoint.every=10", "checkpoint.keep_every=30"], 5),
        (["checkpoint.every=40", "checkpoint.keep_last=5"], 3),
        # Of 30, 60, 90 and 100 the first has gone, unless it is kept.
        (["checkpoint.every=30", "checkpoint.keep_every=15"], 4),
        (["checkpoint.every=30", "checkpoint.keep_every=60"], 3),
        (["checkpoint.every=1", "checkpoint.keep_every=2", "run.steps=1000000000000"], 500_000_000_001),
    ],
    ids=str,
)
def test_checkpoints_at_once(fields: list[str], count: int) -> None:
    assert checkpoints_at_once(plan_config(["model=llama3_8b", "run.steps=100", *fields])) == count


def test_checkpoints_at_once_are_those_of_a_run_step_by_step() -> None:
    config = plan_config(["model=llama3_8b"])
    draw = random.Random(0)
    for _ in range(300):
        steps, every, last, good = (draw.randint(low, 40) for low in (1, 0, 1, 0))
        config.run.steps, config.checkpoint.every = steps, every
        config.checkpoint.keep_last, config.checkpoint.keep_every = last, good
        kept: list[int] = []
        most = 0
        for step in range(1, steps + 1):
            if step == steps or (every and step % every == 0):
                kept.append(step)
                most = max(most, len(kept))
                kept = [old for old in kept[:-last] if good and old % good == 0] + kept[-last:]
        assert checkpoints_at_once(config) == most, (steps, every, last, good)


def test_saving_waits_where_the_one_before_is_not_written() -> None:
    config = plan_config(["model=llama3_8b", "parallel.data_parallel_size=8", "checkpoint.every=5"])
    saving = saving_time(arch_of(config), config, H100)
    # Eight processes write 1 GB/s each, less than the disk takes; each copies its part at 0.7 of 64 GB/s.
    assert saving.writing == 112_423_657_472 / 8e9
    assert saving.stall == pytest.approx(112_423_657_472 / 8 / 44.8e9)
    assert saving.per_step(5, 100.0) == saving.stall / 5
    assert saving.per_step(5, 1.0) == pytest.approx((saving.stall + saving.writing - 5) / 5)
    assert Saving(1.0, 1.0).per_step(0, 1.0) == 0
    waiting = plan_config(["model=llama3_8b", "parallel.data_parallel_size=8", "checkpoint.async_save=false"])
    assert saving_time(arch_of(waiting), waiting, H100) == Saving(saving.writing, 0.0)
    many = plan_config(["model=llama3_8b", "parallel.data_parallel_size=16"])
    assert saving_time(arch_of(many), many, H100).writing == 112_423_657_472 / 10e9


def test_weights_by_each_way() -> None:
    def seconds(way: str, nodes: int, form: str = "plain") -> float:
        config = plan_config(["model=llama3_8b"])
        config.rollout.weight_sync, config.rollout.weight_format = way, form
        return sync_time(arch_of(config), config, Servers(8 * nodes, 1, nodes, 0.0), H100)

    assert seconds("disk", 2) == pytest.approx(16_060_522_496 * (1 / 1e9 + 2 / 20e9))
    assert seconds("distributed", 2) == seconds("distributed", 1) == pytest.approx(16_060_522_496 / 35e9)
    assert seconds("distributed", 2, "fp8_blockwise") == pytest.approx(8_030_261_248 / 35e9)
    assert seconds("tensor", 1) == pytest.approx(16_060_522_496 / 44.8e9)


def test_evaluations_are_those_of_the_loop() -> None:
    def count(*fields: str) -> int:
        return evaluations_of(plan_config(["model=llama3_8b", "evaluation=avg16", "run.steps=100", *fields]))

    assert count() == 2 and count("evaluation.before=false", "evaluation.after=false") == 0
    # After steps 20, 40, 60 and 80; that after the last step has a setting of its own.
    assert count("evaluation.every=20") == 6
