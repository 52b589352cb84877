"""Peaks of memory in the phases of a step, on round numbers."""

from __future__ import annotations

import re

import pytest

from dasd_megatron.commands.plan import plan
from dasd_megatron.config import load_config
from dasd_megatron.planning.estimate import Architecture, State
from dasd_megatron.planning.phases import Phases, StepBytes, step_phases
from dasd_megatron.planning.plan import OVERHEAD_BYTES, make_plan, model_sizes, plan_config

# Powers of ten: each digit of a peak shows what is in it.
NEEDS = StepBytes(
    State(parameters=1, weights=1, gradients=10, optimizer=100),
    copies=1_000, teacher=10_000, scoring=100_000, activations=1_000_000, loss=10_000_000, reserve=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("offload", "minibatches", "expected"),
    [
        ("none", 1, Phases(1_111, 1_111, 10_111_111, 11_011_111, 11_111)),
        ("none", 2, Phases(1_111, 1_111, 10_111_111, 11_011_111, 11_111)),
        ("state", 1, Phases(1, 1, 10_111_001, 11_011_011, 11_111)),
        ("state", 2, Phases(1, 1, 10_111_001, 11_011_111, 11_111)),
        ("all", 1, Phases(0, 1, 10_111_001, 11_011_011, 11_111)),
    ],
)
def test_each_phase_has_what_it_needs(offload: str, minibatches: int, expected: Phases) -> None:
    config = load_config(
        [
            "experiment=quickstart", "batch.epochs=1", f"batch.minibatches={minibatches}",
            "rollout.release_memory=true", f"backend.offload={offload}",
        ]
    )  # fmt: skip
    assert step_phases(config, NEEDS) == expected
    assert step_phases(config, NEEDS).peak == max(expected)
    with_reserve = step_phases(config, NEEDS._replace(reserve=0.5))
    assert all(other - one == 0.5 for one, other in zip(expected, with_reserve, strict=True))


def test_the_plan_has_the_peaks_of_the_fullest_stage(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["model=qwen3_8b", "parallel.tensor_model_parallel_size=4", "parallel.data_parallel_size=2"]
    layout += ["parallel.sequence_parallel=true", "precision.recompute=full", "teacher.weights=ema"]
    config = plan_config([*layout, "rollout.release_memory=true", "backend.offload=all"])
    arch = Architecture.of(model_sizes(config.model))
    full = make_plan(config, arch, transformer_engine=True).fullest
    state, phases = full.state, full.phases
    # An average in float32 for each weight, while nothing but the reserve stays where servers sample.
    assert full.copies == 4 * state.parameters and phases.sampling == OVERHEAD_BYTES
    update = OVERHEAD_BYTES + state.weights + state.gradients + full.snapshots
    assert phases.optimizer == update + state.optimizer
    assert full.total == max(phases.optimizer, phases.backward, phases.scoring) < phases.backward + state.optimizer
    config.backend.offload = "none"
    kept = make_plan(config, arch, transformer_engine=True).fullest
    assert kept.total == update + state.optimizer + kept.activations + kept.loss

    plan([*layout, "rollout.release_memory=true", "backend.offload=all"])
    rows = dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert rows["peak of each phase"].startswith("sampling 4.00 GB, weight sync 8.10 GB, scoring ")
    host = (state.optimizer + full.copies + state.weights) / 1e9
    assert rows["host memory of each GPU"].startswith(f"{host:.2f} GB")
    beside, as_state, as_all = re.findall(r"([\d,]+) (?:tokens|with)", rows["rollouts on the same GPUs"])
    assert [int(text.replace(",", "")) for text in (beside, as_state, as_all)] == sorted(
        int(text.replace(",", "")) for text in (beside, as_state, as_all)
    )
    plan(layout)
    assert "peak of each phase" not in capsys.readouterr().out
