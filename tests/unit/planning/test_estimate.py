"""The arithmetic of a rank's memory and traffic, against numbers that can be done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dasd_megatron.config import Config
from dasd_megatron.planning.estimate import (
    Architecture,
    Communication,
    State,
    activation_bytes,
    bubble_fraction,
    communication,
    head_operations,
    kv_bytes_per_token,
    layer_operations,
    loss_bytes,
    training_state,
)
from dasd_megatron.planning.plan import model_sizes, plan_config

TP, PP, DP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.data_parallel_size=",
)


def state_of(config: Config, stage: int) -> State:
    arch = Architecture.of(model_sizes(config.model))
    return training_state(arch, config.parallel, config.precision, config.optimizer, stage)


def traffic_of(config: Config, tokens: float, teacher_tokens: float | None = None) -> Communication:
    arch, state = Architecture.of(model_sizes(config.model)), state_of(config, 0)
    return communication(arch, config, tokens, teacher_tokens or tokens, state.gradients, state.weights)


def test_numbers_by_hand() -> None:
    config = plan_config(["model=llama3_8b", TP + "2", PP + "4", DP + "2", "batch.groups=8"])
    arch = Architecture.of(model_sizes(config.model))
    assert bubble_fraction(config.parallel, 32) == 3 / 35
    assert bubble_fraction(dataclasses.replace(config.parallel, virtual_pipeline_model_parallel_size=2), 32) == 3 / 67
    # 32 layers x 8 heads x 128 x (keys, values) x 2 bytes, on two GPUs half of it.
    assert kv_bytes_per_token(arch, 2) == 65536
    # Stages between first and last hold eight layers and no vocabulary.
    state = state_of(config, 1)
    layer = 2 * 4096 + (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 2
    assert state.parameters == 8 * layer
    assert state.weights == 2 * state.parameters and state.gradients == 4 * state.parameters
    # 12 bytes a parameter on half of the replicas, and a step counter for each of some fifty parameters.
    assert abs(state.optimizer - 6 * state.parameters) < 4 * 50
    traffic = communication(arch, config, 1000, 1000, state.gradients, state.weights)
    # Two all-reduces a layer for each of 2 forward passes, of teacher and update, and 1 backward pass; of a ring of two
    # each rank sends its tensor once.
    assert traffic.tensor == 1000 * 4096 * 2 * 8 * 2 * 3
    assert traffic.pipeline == 1000 * 4096 * 2 * 3
    assert traffic.data == 0.5 * 6 * state.parameters
    assert traffic.weight_sync == 2 * 8_030_261_248


def test_fields_of_the_layout_come_through() -> None:
    base = ["model=llama3_8b", TP + "2", "parallel.sequence_parallel=true", "batch.groups=8"]
    arch = Architecture.of(model_sizes(plan_config(base).model))

    def kept(*overrides: str, stage: int = 0) -> float:
        config = plan_config([*base, *overrides])
        return activation_bytes(
            arch, config.parallel, config.precision, 8192, stage, micro_batches=8, transformer_engine=True
        )

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
    first, last = (state_of(config, stage) for stage in (0, 1))
    layer = 2 * 4096 + (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 2
    vocabulary = 128256 // 2 * 4096
    assert first.parameters == 24 * layer + vocabulary and last.parameters == 8 * layer + 4096 + vocabulary
    # Optimizer state is spread over context-parallel ranks too, and keys and values go round them.
    shared = plan_config([*base, "parallel.context_parallel_size=4"])
    assert state_of(shared, 0).optimizer < state_of(plan_config(base), 0).optimizer / 3.9
    traffic = traffic_of(shared, 4000)
    assert traffic.context == 1000 * 2 * 512 * 2 * 32 * 3 * 5
    assert traffic.tensor == traffic_of(plan_config([*base, "loss.share_pass=never"]), 1000).tensor


def test_fused_loss_is_bounded_by_its_block() -> None:
    config = plan_config(["model=llama3_8b", TP + "2", "batch.groups=8"])
    arch = Architecture.of(model_sizes(config.model))
    loss = dataclasses.replace(config.loss, block_columns=1024)
    materialised, fused = loss_bytes(arch, config.parallel, config.precision, loss, 1000, 500, 64)
    # Half of the vocabulary: bf16 and fp32 logits of every token, and fp32 ones of the response.
    assert materialised == 128256 // 2 * (1000 * (2 + 4) + 500 * 4)
    # Three fp32 buffers of a block, and two fp32 hidden states of the response.
    assert fused == 64 * 1024 * 4 * 3 + 2 * 500 * 4096 * 4
    # Kept are bf16 logits, as far as there are any.
    for bound, kept in ((1e6, 1e6), (1e12, 500 * 128256 // 2 * 2)):
        assert loss_bytes(arch, config.parallel, config.precision, loss, 1000, 500, 64, bound)[1] == fused + kept


# A layer's hidden states of 1000 tokens in bf16. A rank of four sends three quarters of them in an all-gather and in a
# reduce-scatter, and twice that in an all-reduce.
GATHER = 1000 * 4096 * 2 * 3 / 4


@pytest.mark.parametrize(
    ("overrides", "gathers"),
    [
        # Of each of the two parts of a layer: forward passes of student, teacher and update, and a backward pass.
        ([], 2 * (3 * 2 + 2)),
        # The update's forward pass scores the student.
        (["loss.share_pass=auto"], 2 * (2 * 2 + 2)),
        # Sequences are cut: a backward pass gathers the input of the first product again.
        (["parallel.sequence_parallel=true"], 2 * (3 * 2 + 3)),
        (["parallel.sequence_parallel=true", "precision.recompute=full"], 2 * (4 * 2 + 3)),
        # The feed-forward alone is repeated.
        (["parallel.sequence_parallel=true", "precision.recompute=selective"], 2 * (3 * 2 + 3) + 2),
        (["parallel.sequence_parallel=true", "batch.epochs=2"], 2 * (4 * 2 + 2 * 3)),
        # Without a teacher there is no pass of one, and a mixture of two models has two.
        (["parallel.sequence_parallel=true", "algorithm=grpo"], 2 * (2 * 2 + 3)),
        (["parallel.sequence_parallel=true", "teacher.weights=trust_region"], 2 * (4 * 2 + 3)),
        (["parallel.sequence_parallel=true", "loss.kl_coef=0.1"], 2 * (4 * 2 + 3)),
    ],
    ids=str,
)
def test_collectives_of_tensor_parallel_ranks_are_counted_by_hand(overrides: list[str], gathers: int) -> None:
    config = plan_config(["model=llama3_8b", TP + "4", "batch.groups=8", "loss.share_pass=never", *overrides])
    assert traffic_of(config, 1000).tensor == pytest.approx(32 * gathers * GATHER)


def test_the_teachers_longer_sequences_are_sent_too() -> None:
    config = plan_config(["model=llama3_8b", TP + "4", "batch.groups=8", "loss.share_pass=never"])
    assert traffic_of(config, 1000, 3000).tensor == pytest.approx(32 * 2 * (2 * 2 + 3 * 2 + 2) * GATHER)


def test_operations_by_hand() -> None:
    arch = Architecture.of(model_sizes(plan_config(["model=llama3_8b"]).model))
    # The matrices of a layer: 4096 x 4096 for queries and for the result, 4096 x 1024 for keys and for values, and
    # three of 4096 x 14336.
    assert layer_operations(arch, 1, 0) == 2 * 218_103_808
    assert head_operations(arch, 1) == 2 * 525_336_576
    # The published parameters without the embedding and the 65 norms.
    matrices = 8_030_261_248 - 525_336_576 - 65 * 4096
    assert 32 * layer_operations(arch, 1, 0) + head_operations(arch, 1) == 2 * matrices
    # Token t looks at t tokens: of 4096 numbers there are a product with each key and one with each value.
    attention = sum(2 * 2 * 4096 * seen for seen in range(1, 1001))
    assert layer_operations(arch, 0, 1000**2) == pytest.approx(attention, rel=2e-3)
