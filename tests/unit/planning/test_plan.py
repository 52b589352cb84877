"""The plan of a configuration: the sizes of its model, the memory of its stages, and the search for layouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import dasd_megatron
from dasd_megatron.config import Config, load_config
from dasd_megatron.planning.estimate import Architecture, total_parameters
from dasd_megatron.planning.layout import longest_teacher_prompt
from dasd_megatron.planning.plan import (
    OVERHEAD_BYTES,
    Plan,
    make_plan,
    model_config,
    model_sizes,
    plan_config,
)

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


def test_there_is_a_published_count_for_every_preset() -> None:
    assert sorted(PARAMETERS) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    from dasd_megatron.models.hf_config import expected_tensors

    model = plan_config([f"model={name}"]).model
    hf_config = model_config(model)
    assert Architecture.of(model_sizes(model)) == Architecture.of(hf_config)
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
    model = load_config(["experiment=quickstart"]).model
    assert Architecture.of(model_sizes(model)) == Architecture.of(model_config(model))


def test_an_experiment_is_planned_as_it_is() -> None:
    for name in ("dasd_7b", "dasd_32b", "dasd_70b"):
        planned, trained = plan_config([f"experiment={name}"]), load_config([f"experiment={name}"], needs_files=False)
        assert (planned.rollout, planned.batch, planned.parallel) == (trained.rollout, trained.batch, trained.parallel)
    assert plan_config(["experiment=dasd_32b", "rollout.max_new_tokens=30000"]).rollout.max_new_tokens == 30000


def plan_of(config: Config) -> Plan:
    arch = Architecture.of(model_sizes(config.model))
    return make_plan(config, arch, transformer_engine=True)


def test_micro_batches_keep_to_their_tokens() -> None:
    config = plan_config(["model=qwen3_8b", "rollout.max_prompt_tokens=1000", "rollout.max_new_tokens=3000"])
    batch = dataclasses.replace(
        config.batch, groups=8, samples_per_group=8, minibatches=2, micro_batch_size=8, micro_batch_tokens=None
    )
    # 64 sequences in two minibatches, of 8 at once.
    whole = plan_of(dataclasses.replace(config, batch=batch))
    assert (whole.rows, whole.micro_batches) == (8, 4)
    limited = plan_of(dataclasses.replace(config, batch=dataclasses.replace(batch, micro_batch_tokens=9000)))
    assert (limited.rows, limited.micro_batches) == (2, 16)


def test_longer_prompts_of_the_teacher_are_planned_for() -> None:
    sizes = ["model=qwen3_8b", "rollout.max_prompt_tokens=1000", "rollout.max_new_tokens=3000"]
    # Of the whole model nothing is kept for the backward pass, so that the teacher's pass can be the larger one.
    sizes += ["precision.recompute=full", "batch.micro_batch_size=4", "batch.groups=8"]
    sizes += ["batch.micro_batch_tokens=null"]

    def planned(privileged: str, *more: str) -> tuple[int, Plan]:
        config = plan_config([*sizes, f"teacher.privileged={privileged}", *more])
        return longest_teacher_prompt(config), plan_of(config)

    length, solution = planned("solution")
    assert length == 1000
    # A peer is a response. Feedback may be as long as the field says.
    length, peer = planned("[peer,answer]")
    assert length == 1000 + 3000 and peer.rows == solution.rows
    length, feedback = planned("[peer,feedback]", "verify.reward=my:reward")
    assert length == 1000 + 10240
    assert planned("[peer]", "teacher.max_privileged_tokens=500")[0] == 1500
    assert planned("[peer]", "algorithm=grpo")[0] == 1000
    assert solution.fullest.activations < feedback.fullest.activations
    # One sequence at a time needs less.
    split = planned("[peer,feedback]", "verify.reward=my:reward", "batch.micro_batch_tokens=15000")[1]
    assert split.rows == 3 and split.fullest.activations < solution.fullest.activations


def test_copies_of_the_weights_are_counted() -> None:
    config = plan_config(["model=qwen3_8b", "batch.groups=8"])

    def snapshots(algorithm: str, weights: str, kl_coef: float = 0.0) -> float:
        """Return the bytes of copies for each parameter."""
        changed = dataclasses.replace(
            config,
            algorithm=dataclasses.replace(config.algorithm, name=algorithm),
            teacher=dataclasses.replace(config.teacher, weights=weights),
            loss=dataclasses.replace(config.loss, kl_coef=kl_coef),
        )
        memory = plan_of(changed).fullest
        return memory.snapshots / memory.state.parameters

    assert [snapshots("dasd", weights) for weights in ("live", "frozen", "ema", "snapshot")] == [0, 2, 4, 2]
    # GRPO has no teacher, so it keeps none; the KL penalty needs the starting model.
    assert [snapshots("grpo", "frozen"), snapshots("grpo", "ema", kl_coef=0.1)] == [0, 2]


def test_states_and_heads_of_a_teacher_are_counted() -> None:
    def parts(*overrides: str) -> tuple[float, float]:
        """Return the bytes of copies beside whole copies of the weights, and of a head, in states of one model."""
        config = plan_config(["model=qwen3_8b", "batch.groups=8", "parallel.tensor_model_parallel_size=1", *overrides])
        memory = plan_of(config).fullest
        states = 8 * config.batch.samples_per_group * config.rollout.max_new_tokens
        copies = 2 * memory.state.parameters if "teacher.weights=trust_region" in overrides else 0
        return (memory.snapshots - copies) / (2 * 4096 * states), 151936 / states

    distributional, mixture = "algorithm.objective=distributional", "teacher.weights=trust_region"
    assert parts()[0] == 0
    assert parts(distributional)[0] == pytest.approx(1)
    found, head = parts(distributional, "batch.minibatches=2")
    assert found == pytest.approx(1 + head)
    for overrides in ([mixture], [mixture, distributional], [mixture, distributional, "batch.minibatches=2"]):
        found, head = parts(*overrides)
        assert found == pytest.approx(2 + 2 * head)


@pytest.mark.parametrize(("owner", "copies"), [("teacher", 1), ("student", 2)])
# qwen3_8b has a vocabulary of 151,936, and no more entries are kept.
@pytest.mark.parametrize(("asked", "entries"), [(100, 100), (10**30, 151_936)])
def test_the_most_probable_entries_are_counted_instead_of_states(
    owner: str, copies: int, asked: int, entries: int
) -> None:
    config = plan_config(
        [
            *("model=qwen3_8b", "batch.groups=8", "batch.minibatches=2", "algorithm.objective=distributional"),
            *(f"algorithm.divergence_top_k={asked}", f"algorithm.divergence_top_k_of={owner}"),
        ]
    )
    tokens = 8 * config.batch.samples_per_group * config.rollout.max_new_tokens
    assert plan_of(config).fullest.snapshots == pytest.approx(copies * tokens * entries * 8)


def test_the_total_is_the_sum_of_its_parts_and_a_reserve() -> None:
    found = plan_of(plan_config(["model=qwen3_8b", "batch.groups=8", "parallel.pipeline_model_parallel_size=2"]))
    assert [memory.stage for memory in found.stages] == [0, 1]
    assert found.stages[0].loss == 0 and found.stages[1].loss > 0
    assert found.fullest.total == max(memory.total for memory in found.stages)
    for memory in found.stages:
        state = memory.state
        parts = state.weights + state.gradients + state.optimizer + memory.snapshots + memory.activations + memory.loss
        assert memory.total == pytest.approx(parts + OVERHEAD_BYTES)


def test_the_blocks_of_the_loss_are_those_of_the_trainer() -> None:
    config = plan_config(["model=qwen3_8b", "rollout.max_new_tokens=30000"])
    arch, layout = Architecture.of(model_sizes(config.model)), dict(transformer_engine=True)
    found = {size: make_plan(config, arch, **layout, gpu_bytes=size * 1e9).loss_fused for size in (80, 141)}
    assert found[141] - found[80] == (16384 - 8192) * 8192 * 4 * 3 + 61e9 // 64
    config.loss.block_tokens = 1000
    assert found[80] - make_plan(config, arch, **layout).loss_fused == (8192 - 1000) * 8192 * 4 * 3
