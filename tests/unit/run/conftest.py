from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.small_configs import GOOD


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides that read small problem files instead of generating problems."""
    for name, first in (("train", 1), ("heldout", 5)):
        lines = [json.dumps({**GOOD, "problem": f"{number} + 1 ="}) + "\n" for number in range(first, first + 3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [f"data.{name}.path={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    return [
        "data=jsonl",
        *sources,
        *(f"data.{name}.{field}=null" for name in ("train", "heldout") for field in ("generator", "size")),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = TinyModelConfig(hidden_size=32, num_layers=4, head_dim=8, intermediate_size=48)
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", sizes, 1)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model with changed fields in config.json."""

    def make(**fields: Any) -> Path:
        path = tmp_path / "hf"
        shutil.copytree(tiny, path)
        values = json.loads((path / "config.json").read_text())
        # One entry a layer, which transformers derives again where it is absent.
        values.pop("layer_types")
        (path / "config.json").write_text(json.dumps({**values, **fields}))
        return path

    return make
