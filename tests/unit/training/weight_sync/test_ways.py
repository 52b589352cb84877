"""The table of ways."""

from __future__ import annotations

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.training.weight_sync import WAYS


def test_the_configuration_offers_the_ways_that_there_are() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["experiment=quickstart", "rollout.weight_sync=pigeon"])
    offered = str(refused.value).partition("pigeon")[2]
    for way in WAYS:
        assert way in offered
        assert load_config(["experiment=quickstart", f"rollout.weight_sync={way}"]).rollout.weight_sync == way
