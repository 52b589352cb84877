"""``dasd plan``: what it prints, what it refuses, and numbers that can be done by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dasd_megatron
from dasd_megatron.commands.plan import plan
from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.estimate import (
    Architecture,
    activation_bytes,
    bubble_fraction,
    communication,
    kv_bytes_per_token,
    total_parameters,
    training_state,
)
from dasd_megatron.planning.plan import model_config, model_sizes, plan_config

PRESETS = sorted(
    path.stem
    for path in (Path(dasd_megatron.__file__).parent / "conf" / "model").glob("*.yaml")
    if path.stem not in ("hf", "tiny")
)
# As published with the weights.
PARAMETERS = {
    "llama3_70b": 70_553_706_496,
    "llama3_8b": 8_030_261_248,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_72b": 72_706_203_648,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
}
TP, PP, VPP, DP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.virtual_pipeline_model_parallel_size=",
    "parallel.data_parallel_size=",
)


def test_there_is_a_published_count_for_every_preset() -> None:
    assert sorted(PARAMETERS) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    from dasd_megatron.models.hf_config import expected_tensors

    config = plan_config([f"model={name}"])
    hf_config = model_config(config)
    assert Architecture.of(model_sizes(config)) == Architecture.of(hf_config)
    assert total_parameters(Architecture.of(hf_config)) == PARAMETERS[name]
    shapes = expected_tensors(hf_config).values()
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    assert total == PARAMETERS[name]


def test_the_tiny_model_has_the_sizes_that_it_is_made_with() -> None:
    config = load_config(["experiment=quickstart"])
    assert Architecture.of(model_sizes(config)) == Architecture.of(model_config(config))


def test_numbers_by_hand() -> None:
    config = plan_config(["model=llama3_8b", TP + "2", PP + "4", DP + "2", "batch.groups=8"])
    arch = Architecture.of(model_sizes(config))
    assert bubble_fraction(config, 32) == 3 / 35
    assert bubble_fraction(plan_config(["model=llama3_8b", PP + "4", VPP + "2", "batch.groups=8"]), 32) == 3 / 67
    # 32 layers x 8 heads x 128 x (keys, values) x 2 bytes, on two GPUs half of it.
    assert kv_bytes_per_token(arch, 2) == 65536
    # Stages between first and last hold eight layers and no vocabulary.
    state = training_state(arch, config, 1)
    layer = 2 * 4096 + (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 2
    assert state.parameters == 8 * layer
    assert state.weights == 2 * state.parameters and state.gradients == 4 * state.parameters
    # 12 bytes a parameter on half of the replicas, and a step counter for each of some fifty parameters.
    assert abs(state.optimizer - 6 * state.parameters) < 4 * 50
    traffic = communication(arch, config, 1000, state)
    # Two all-reduces a layer for each of 3 forward passes and 1 backward pass; of a ring of two each rank sends its
    # tensor once.
    assert traffic.tensor == 1000 * 4096 * 2 * 8 * 2 * 4
    assert traffic.pipeline == 1000 * 4096 * 2 * 4
    assert traffic.data == 0.5 * 6 * state.parameters
    assert traffic.weight_sync == 2 * PARAMETERS["llama3_8b"]


def test_an_experiment_is_planned_as_it_is() -> None:
    for name in ("dasd_7b", "dasd_32b", "dasd_70b"):
        planned, trained = plan_config([f"experiment={name}"]), load_config([f"experiment={name}"], needs_files=False)
        assert (planned.rollout, planned.batch, planned.parallel) == (trained.rollout, trained.batch, trained.parallel)
    assert plan_config(["experiment=dasd_32b", "rollout.max_new_tokens=30000"]).rollout.max_new_tokens == 30000


def test_fields_of_the_layout_come_through() -> None:
    base = ["model=llama3_8b", TP + "2", "parallel.sequence_parallel=true", "batch.groups=8"]
    arch = Architecture.of(model_sizes(plan_config(base)))

    def kept(*overrides: str, stage: int = 0) -> float:
        config = plan_config([*base, *overrides])
        return activation_bytes(arch, config, 8192, stage, micro_batches=8, transformer_engine=True)

    none, selective, full = (kept(f"precision.recompute={how}") for how in ("none", "selective", "full"))
    # Per token and layer: of the feed-forward the input's norm and three widths of it, in bf16; one layer's is there
    # once.
    assert none - selective == 8192 * 31 * 2 * (4096 / 2 + 3 * 14336 / 2)
    assert full < selective / 3
    assert abs(kept("parallel.context_parallel_size=2") - none / 2) < 1
    # Three quarters of the layers on the first stage, for two micro-batches in flight.
    uneven = [PP + "2", "parallel.first_pipeline_num_layers=24"]
    assert abs(kept(*uneven) / (none * 1.5) - 1) < 0.02
    assert kept(*uneven, stage=1) < kept(*uneven) / 5
    config = plan_config([*base, *uneven])
    first, last = (training_state(arch, config, stage) for stage in (0, 1))
    layer = 2 * 4096 + (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 2
    vocabulary = 128256 // 2 * 4096
    assert first.parameters == 24 * layer + vocabulary and last.parameters == 8 * layer + 4096 + vocabulary
    # Optimizer state is spread over context-parallel ranks too, and keys and values go round them.
    shared = plan_config([*base, "parallel.context_parallel_size=4"])
    assert training_state(arch, shared, 0).optimizer < training_state(arch, plan_config(base), 0).optimizer / 3.9
    traffic = communication(arch, shared, 4000, training_state(arch, shared, 0))
    assert traffic.context == 1000 * 2 * 512 * 2 * 32 * 3 * 5
    assert (
        traffic.tensor
        == communication(arch, plan_config(base), 1000, training_state(arch, plan_config(base), 0)).tensor
    )


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    plan(list(arguments))
    return capsys.readouterr().out


def test_a_plan_says_whether_it_fits(capsys: pytest.CaptureFixture) -> None:
    job = ["model=qwen3_8b", TP + "8", "parallel.sequence_parallel=true"]
    assert "fits" in printed(capsys, *job) and "DOES NOT FIT" in printed(capsys, "--gpu-memory", "20", *job)
    text = printed(capsys, *job[:2])
    assert "sequence_parallel=false" in text and "8,190,735,360 in all" in text
    assert "over the network" in printed(capsys, "--gpus-per-node", "4", *job)
    assert "weights" in printed(capsys)
    assert "turns them off" in printed(capsys, "model=qwen3_8b", PP + "2", VPP + "2")
    fused, dense = (
        float(number) for number in re.search(r"last stage +([\d.]+) GB fused \(([\d.]+) GB", text).groups()
    )
    assert fused < dense
    assert "no context parallelism" in printed(
        capsys, "model=smollm2_135m", "backend.kind=cpu", "rollout.max_new_tokens=64"
    )


def test_search_lists_layouts_that_fit(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--search", "--gpus", "32", "model=qwen3_32b", "batch.groups=64")
    rows = [line.split() for line in text.splitlines()[2:]]
    assert 1 <= len(rows) <= 10
    for tensor, pipeline, _, data, _, memory, *_ in rows:
        assert int(tensor) * int(pipeline) * int(data) == 32 and float(memory) <= 80
    assert [float(row[-1]) for row in rows] == sorted(float(row[-1]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model=qwen3_8b", TP + "3"], "num_attention_heads=32"),
        (["model=qwen3_8b", PP + "5"], "num_hidden_layers=36"),
        (["model=qwen9"], "choose one of"),
        (["--search", "model=qwen3_8b"], "--gpus"),
        (["--search", "--gpus", "1", "model=llama3_70b"], "needs"),
        (["--search", "--gpus", "7", "model=llama3_70b"], "batch.groups"),
        (["model=qwen3_8b", "rollout.max_new_tokens=100000"], "max_position_embeddings"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)
