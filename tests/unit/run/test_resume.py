"""A run that goes on does so with its own model and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.run.prepare import prepare_run
from tests.support.small_configs import GOOD, configure, refusal


def test_resuming_keeps_the_problems(files: list[str], tmp_path: Path) -> None:
    root = tmp_path / "run"
    paths = prepare_run(configure(*files), root)
    saved = {name: paths.problems(name).stat().st_ino for name in ("train", "heldout")}
    prepare_run(configure(*files, "resume=auto"), root)
    assert {name: paths.problems(name).stat().st_ino for name in saved} == saved


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_resuming_with_changed_problems_is_refused(files: list[str], tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    paths = prepare_run(configure(*files), root)
    before = paths.problems(name).read_bytes()
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**GOOD, "problem": "8 + 8 ="}) + "\n")
    message = refusal(lambda: prepare_run(configure(*files, "resume=auto"), root))
    assert message.startswith(f"data.{name}: ") and "changed since the run began" in message
    assert paths.problems(name).read_bytes() == before


def test_checkpoint_of_another_run_fixes_the_same_fields(files: list[str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step_000001"
    prepare_run(configure(*files), tmp_path / "first")
    checkpoint.mkdir(parents=True)
    resumed = [*files, f"resume={checkpoint}"]
    message = refusal(lambda: prepare_run(configure(*resumed, "run.seed=7"), tmp_path / "second"))
    assert "run.seed=7" in message and "run.seed=1" in message
    prepare_run(configure(*resumed, "optimizer.lr=2e-5"), tmp_path / "second")
