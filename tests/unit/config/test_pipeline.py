"""Layers of pipeline stages."""

from __future__ import annotations

import pytest

from dasd_megatron.config import ParallelConfig, stage_layers
from dasd_megatron.errors import ConfigError

STAGES = [
    ({}, 8, [2, 2, 2, 2]),
    ({"first_pipeline_num_layers": 1, "last_pipeline_num_layers": 1}, 8, [1, 3, 3, 1]),
    ({"last_pipeline_num_layers": 3}, 9, [2, 2, 2, 3]),
    ({"first_pipeline_num_layers": 4, "virtual_pipeline_model_parallel_size": 2}, 10, [4, 2, 2, 2]),
    ({"pipeline_model_parallel_size": 2, "first_pipeline_num_layers": 5, "last_pipeline_num_layers": 3}, 8, [5, 3]),
    ({"pipeline_model_parallel_size": 1}, 7, [7]),
]


@pytest.mark.parametrize(("fields", "layers", "expected"), STAGES)
def test_layers_of_pipeline_stages(fields: dict[str, int], layers: int, expected: list[int]) -> None:
    assert stage_layers(ParallelConfig(**({"pipeline_model_parallel_size": 4} | fields)), layers) == expected


@pytest.mark.parametrize(
    ("fields", "layers", "named"),
    [
        ({}, 9, ["pipeline_model_parallel_size = 4", "first_pipeline_num_layers"]),
        ({"first_pipeline_num_layers": 2}, 9, ["first_pipeline_num_layers=2", "7 layers", "3 other"]),
        ({"first_pipeline_num_layers": 8}, 8, ["0 layers"]),
        ({"first_pipeline_num_layers": 9}, 8, ["-1 layers"]),
        (
            {"pipeline_model_parallel_size": 2, "first_pipeline_num_layers": 5, "last_pipeline_num_layers": 2},
            8,
            ["1 layers", "0 other"],
        ),
        ({"first_pipeline_num_layers": 3, "virtual_pipeline_model_parallel_size": 2}, 9, ["virtual", "3 layers"]),
    ],
)
def test_layers_that_do_not_come_out_whole_are_refused(fields: dict[str, int], layers: int, named: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        stage_layers(ParallelConfig(**({"pipeline_model_parallel_size": 4} | fields)), layers)
    assert all(name in str(refused.value) for name in named), refused.value
