"""Every record of the table of ways has its class."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from dasd_megatron.config import RolloutConfig, load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.training import export
from dasd_megatron.training.export import Policy, WeightDirectory
from dasd_megatron.training.fleet import ServerFleet
from dasd_megatron.training.weight_sync import make_weight_sync, weight_sync_class
from dasd_megatron.training.weight_sync.base import WeightSync
from dasd_megatron.weight_ways import WEIGHT_WAYS
from tests.support.fake_servers import FakeModel
from tests.support.thread_ranks import ThreadRanks


def test_the_configuration_offers_the_ways_that_there_are() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["experiment=quickstart", "rollout.weight_sync=pigeon"])
    offered = str(refused.value).partition("pigeon")[2]
    for way in WEIGHT_WAYS:
        assert way in offered
        assert load_config(["experiment=quickstart", f"rollout.weight_sync={way}"]).rollout.weight_sync == way


def test_every_way_has_a_class_of_its_own() -> None:
    classes = [weight_sync_class(name) for name in WEIGHT_WAYS]
    assert len(set(classes)) == len(classes)
    for found in classes:
        assert issubclass(found, WeightSync) and not inspect.isabstract(found)


@pytest.mark.parametrize("name", WEIGHT_WAYS)
def test_servers_that_are_back_catch_up_with_what_is_on_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ThreadRanks(1, monkeypatch)
    monkeypatch.setattr(export, "export_model", lambda model, path, **_: path.mkdir(parents=True))
    config = RolloutConfig(engine="external", weight_sync=name)
    directory = WeightDirectory(tmp_path / "weights")
    sync = make_weight_sync(config, ServerFleet(config, [], tmp_path / "log"), directory)
    assert isinstance(sync, weight_sync_class(name))
    assert not sync.can_catch_up("v1") and not sync.can_catch_up(None)
    directory.write(Policy(FakeModel(), "v1", Path("template")))
    assert sync.can_catch_up("v1") and not sync.can_catch_up("v2")
