"""The engine's checks that are the same on every device, on the CPU; tests/gpu has them on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.engine_checks import check_generation, check_weight_update, make_models

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_and_log_probs_are_those_of_transformers(dtype: torch.dtype, models: tuple[str, str]) -> None:
    check_generation(models[0], CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_take_the_place_of_released_ones(dtype: torch.dtype, models: tuple[str, str]) -> None:
    check_weight_update(*models, CPU, dtype)
