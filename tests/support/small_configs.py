"""Configurations of the smallest runs, for tests of what happens before any process starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dasd_megatron.config import Config, load_config
from dasd_megatron.errors import ConfigError

SMALL = [
    "experiment=quickstart",
    "parallel=single",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.head_dim=8",
    "model.tiny.num_layers=4",
    "batch.groups=2",
    "warm_start.steps=0",
]
GOOD = {"problem": "1 + 1 =", "expected_answer": "2", "reference_solution": "1 + 1 = 2\n#### 2"}
"""A problem as a line of JSONL has it."""


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configure(*overrides: str) -> Config:
    return load_config([*SMALL, *overrides])
