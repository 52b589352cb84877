"""The places of ranks and the schedule of stages, by arithmetic."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from dasd_megatron.config import ParallelConfig
from dasd_megatron.planning.layout import Place, check_layout, check_teacher_lengths, place_of, warmup_passes
from tests.support.small_configs import configure, refusal


def test_places_are_those_of_nested_loops() -> None:
    draw = random.Random()
    for _ in range(20):
        tensor, context, data, pipeline = (draw.randint(1, 4) for _ in range(4))
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            data_parallel_size=data,
            pipeline_model_parallel_size=pipeline,
        )
        loops = itertools.product(range(pipeline), range(data), range(context), range(tensor))
        assert [place_of(parallel, rank) for rank in range(parallel.world_size)] == [
            Place(t, c, d, p) for p, d, c, t in loops
        ]


def test_texts_of_the_run_have_to_fit_into_the_models_positions() -> None:
    sizes = ["rollout.max_prompt_tokens=100", "rollout.max_new_tokens=50"]

    def check(positions: int, *overrides: str) -> None:
        check_teacher_lengths(configure(*sizes, *overrides), SimpleNamespace(max_position_embeddings=positions))

    check(150)
    check(200, "teacher.privileged=[peer]")
    assert "teacher.max_privileged_tokens=10240: the teacher reads up to 50 tokens" in refusal(
        lambda: check(199, "teacher.privileged=[peer]")
    )
    check(199, "teacher.privileged=[peer]", "teacher.max_privileged_tokens=49")
    check(199, "teacher.privileged=[peer]", "algorithm=grpo")
    feedback = ["teacher.privileged=[feedback]", "verify.reward=my:reward"]
    assert "over max_position_embeddings=1000 of the model: write at most 850" in refusal(
        lambda: check(1000, *feedback)
    )
    check(1000, *feedback, "teacher.max_privileged_tokens=850")
    assert "lower rollout.max_prompt_tokens" in refusal(lambda: check(150, *feedback))


@pytest.mark.parametrize(
    ("processes", "change", "refused"),
    [
        (1, {}, None),
        (8, {}, None),
        # Each process has one of the two key-value heads, which is a whole block, and two blocks of queries.
        (4, {"num_key_value_heads": 2}, None),
        (8, {"intermediate_size": 1024 + 128}, "intermediate_size is 1152"),
        (1, {"num_key_value_heads": 4, "head_dim": 80}, "num_key_value_heads x head_dim is 320"),
        (
            1,
            {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
            "num_attention_heads x head_dim is 576",
        ),
    ],
)
def test_fp8_weights_have_whole_blocks_on_every_process_of_a_server(
    processes: int, change: dict[str, int], refused: str | None
) -> None:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 4,
        "max_position_embeddings": 100_000,
    }
    server = ["rollout.engine=sglang", "rollout.dtype=bfloat16", f"rollout.sglang.tensor_parallel_size={processes}"]
    config = configure(*server, "rollout.weight_format=fp8_blockwise", "parallel=single")
    model = SimpleNamespace(**sizes | change)

    def check() -> None:
        check_layout(config.model, config.parallel, config.rollout, model)

    if refused is None:
        check()
    else:
        message = refusal(check)
        assert "rollout.weight_format=fp8_blockwise" in message and refused in message


@pytest.mark.parametrize(
    ("stages", "virtual", "micro_batches", "expected"),
    [
        (1, None, 8, [0]),
        (4, None, 8, [3, 2, 1, 0]),
        # There are no more passes than micro-batches.
        (4, None, 2, [2, 2, 1, 0]),
        (4, 2, 8, [10, 8, 6, 4]),
        (2, 2, 2, [4, 2]),
    ],
)
def test_forward_passes_before_the_first_backward_pass(
    stages: int, virtual: int | None, micro_batches: int, expected: list[int]
) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual)
    assert warmup_passes(parallel, micro_batches) == expected
