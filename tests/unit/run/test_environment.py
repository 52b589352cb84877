"""The record of what a run was made with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dasd_megatron
from dasd_megatron.run import environment
from dasd_megatron.run.prepare import prepare_run
from tests.support.small_configs import configure


def _checkout(top: Path, package: Path) -> None:
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", top, *arguments], check=True, timeout=20)


def test_revision_is_recorded_of_this_project_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own" / "dasd_megatron"
    _checkout(tmp_path / "own", own)
    monkeypatch.setattr(dasd_megatron, "__file__", str(own / "__init__.py"))
    head = subprocess.run(
        ["git", "-C", own, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    assert environment._git_revision() == head
    installed = tmp_path / "other" / "site-packages" / "dasd_megatron"
    _checkout(tmp_path / "other", installed)
    monkeypatch.setattr(dasd_megatron, "__file__", str(installed / "__init__.py"))
    assert environment._git_revision() is None


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)], ids=["missing", "hangs"]
)
def test_git_that_does_not_work_is_no_reason_to_stop(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    config = configure(*files)
    monkeypatch.setattr(subprocess, "run", fail)
    prepare_run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git_revision"] is None
