"""The places of ranks and the schedule of stages, by arithmetic."""

from __future__ import annotations

import itertools
import random

import pytest

from dasd_megatron.config import ParallelConfig
from dasd_megatron.planning.layout import Place, place_of, warmup_passes


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
