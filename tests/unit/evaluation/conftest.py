from __future__ import annotations

import pytest

from dasd_megatron.config import Config, load_config


@pytest.fixture
def config() -> Config:
    config = load_config(
        ["experiment=quickstart", "evaluation.samples=3", "evaluation.ks=[1]", "evaluation.samples_per_request=4"]
    )
    return config
