"""The nodes of a run are read from torchrun's variables; contradictions are refused."""

from __future__ import annotations

import pytest

from dasd_megatron import cli
from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.training.launch import Nodes, read_nodes

TWO = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "node0:29500", "PET_RDZV_ID": "42"}


def nodes(world_size: int, environment: dict[str, str], *overrides: str) -> Nodes:
    return read_nodes(load_config(["experiment=quickstart", *overrides]).run, world_size, environment)


def test_one_node_without_variables_and_several_with_them() -> None:
    assert nodes(3, {}) == Nodes(3)
    assert nodes(8, TWO, "run.dir=/shared/run") == Nodes(4, 2, 1, ("node0", 29500), "42")
    assert nodes(2, {**TWO, "PET_RDZV_ENDPOINT": "[fd00::1]:29500"}, "run.dir=/shared/run").endpoint == (
        "fd00::1",
        29500,
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES='1:4'"),
        ({"PET_NNODES": "0"}, "PET_NNODES=0"),
        ({"PET_NNODES": "3"}, "do not divide"),
        ({"PET_NNODES": "1"}, "PET_NODE_RANK=1"),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2"),
        ({"PET_NODE_RANK": None}, "PET_NODE_RANK is required"),
        ({"PET_RDZV_ENDPOINT": None}, "PET_RDZV_ENDPOINT"),
        ({"PET_RDZV_ENDPOINT": "node0"}, "PET_RDZV_ENDPOINT"),
        ({"PET_NPROC_PER_NODE": "3"}, "PET_NPROC_PER_NODE=3"),
    ],
)
def test_contradictions_are_refused(changed: dict[str, str | None], named: str) -> None:
    environment = {name: value for name, value in (TWO | changed).items() if value is not None}
    with pytest.raises(ConfigError) as refusal:
        nodes(8, environment, "run.dir=/shared/run")
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_several_nodes_need_one_run_directory() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir is required"):
        nodes(8, TWO)


def test_variables_of_a_rank_alone_are_no_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Containers with PyTorch may set them for a node."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "PET_NNODES": "none"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "experiment=quickstart"]) == 1
    assert "PET_NNODES='none': write a whole number" in capsys.readouterr().err
