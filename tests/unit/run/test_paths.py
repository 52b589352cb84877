"""The choice of a run's directory and of the model that it starts from."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dasd_megatron.config import ModelConfig
from dasd_megatron.data.prompts import Problem, write_problems
from dasd_megatron.run.paths import RunPaths, choose_run_dir, run_problems, start_hf_files, start_path
from tests.support.small_configs import configure


def test_the_start_is_the_given_model_or_the_one_made_for_the_run(tmp_path: Path) -> None:
    paths, given = RunPaths(tmp_path / "run"), tmp_path / "given"
    assert start_path(ModelConfig(path=None), paths) == paths.start_model
    given.mkdir()
    model = ModelConfig(path=str(given))
    assert start_path(model, paths) == start_hf_files(model, paths) == given
    # A converted checkpoint has its config and tokenizer in a folder of its own.
    (given / ".metadata").touch()
    assert start_hf_files(model, paths) == given / "hf"


def test_a_run_continues_in_the_newest_directory_that_has_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs/mine")
    fresh = configure("run.name=mine")
    again = dataclasses.replace(fresh, resume="auto")
    new_name = re.compile(r"runs/mine/\d{8}-\d{6}")
    assert new_name.fullmatch(str(choose_run_dir(again)))
    for name in ("20260101-000000", "20260102-000000", "20260103-000000"):
        (runs / name).mkdir(parents=True)
    for name in ("20260101-000000", "20260102-000000"):
        (runs / name / "config.yaml").touch()
    # The third was never prepared.
    assert choose_run_dir(again) == runs / "20260102-000000"
    assert new_name.fullmatch(str(choose_run_dir(fresh))) and not choose_run_dir(fresh).exists()
    elsewhere = dataclasses.replace(again, run=dataclasses.replace(again.run, dir="/elsewhere"))
    assert choose_run_dir(elsewhere) == Path("/elsewhere")


def test_problems_come_back_without_solutions_too(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    problems = [Problem("a", "1 + 1 =", "2", ""), Problem("b", "1 + 2 =", "3", "It is 3.")]
    paths.problems("heldout").parent.mkdir()
    write_problems(paths.problems("heldout"), problems)
    assert run_problems(paths, "heldout") == problems
