"""The schema is complete: each field has its documentation, its limits and a reader."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys

import dasd_megatron
from dasd_megatron.algorithms import METHODS
from dasd_megatron.config import Config, field_limits, known_fields
from dasd_megatron.losses import DIVERGENCES


def test_every_field_is_documented_and_read() -> None:
    """A field that is only declared and checked would be a knob that does nothing."""
    fields = known_fields()
    assert all(text for text in fields.values())
    package = pathlib.Path(dasd_megatron.__file__).parent
    # Of config/, passes.py alone decides something by its fields.
    modules = [path for path in package.rglob("*.py") if path.parent.name != "config" or path.name == "passes.py"]
    source = "\n".join(path.read_text() for path in modules)
    words = set(re.findall(r"\w+", source))
    unread = [name for name in fields if name.rsplit(".", 1)[-1] not in words]
    assert not unread
    assert {name.split(".")[0] for name in fields} == {field.name for field in dataclasses.fields(Config)}


def test_choices_of_the_arithmetic_are_its_own() -> None:
    limits = field_limits()
    assert limits["algorithm.name"] == ", ".join(METHODS)
    assert limits["algorithm.divergence"] == ", ".join(DIVERGENCES)


def test_limits_for_people() -> None:
    limits = field_limits()
    assert limits["run.readable_by"] == "owner, group, all"
    assert limits["run.seed"] == "0 to 2147483647"
    assert limits["run.steps"] == "at least 0"
    assert limits["rollout.temperature"] == "at least 0.001"
    assert limits["watch.saturated_share"] == "at most 1"
    assert "run.name" not in limits and "loss.dual_clip" not in limits


def test_the_schema_comes_without_heavy_imports() -> None:
    """`dasd --help` and half of the commands read no configuration."""
    heavy = {"torch", "numpy", "transformers", "hydra", "omegaconf"}
    code = f"import sys, dasd_megatron.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
