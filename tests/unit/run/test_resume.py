"""A run that goes on does so with its own model and data."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dasd_megatron.config import read_config
from dasd_megatron.reading import UnreadableError
from dasd_megatron.run.prepare import prepare_run
from tests.support.chat_templates import DATED, tokenizer_with
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


def test_resuming_with_other_examples_of_the_warm_start_is_refused(files: list[str], tmp_path: Path) -> None:
    path, root = tmp_path / "sft.jsonl", tmp_path / "run"
    path.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    begun = [*files, "warm_start.steps=3", f"warm_start.path={path}"]
    kept = prepare_run(configure(*begun), root).examples
    before = kept.read_bytes()
    resumed = [*begun, "resume=auto"]
    prepare_run(configure(*resumed), root)
    assert "changed since the run began" in refusal(
        lambda: prepare_run(configure(*resumed, "warm_start.path=null"), root)
    )
    path.write_text(json.dumps({"prompt": "1+1=", "response": "2", "weight": 2}) + "\n")
    message = refusal(lambda: prepare_run(configure(*resumed), root))
    assert message.startswith("warm_start.path: ") and str(kept) in message
    assert kept.read_bytes() == before


def test_checkpoint_of_another_run_fixes_the_same_fields(files: list[str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step_000001"
    prepare_run(configure(*files), tmp_path / "first")
    checkpoint.mkdir(parents=True)
    resumed = [*files, f"resume={checkpoint}"]
    message = refusal(lambda: prepare_run(configure(*resumed, "run.seed=7"), tmp_path / "second"))
    assert "run.seed=7" in message and "run.seed=1" in message
    prepare_run(configure(*resumed, "optimizer.lr=2e-5"), tmp_path / "second")


class Later(datetime.date):
    @classmethod
    def today(cls) -> Later:
        return cls(9000, 1, 2)


def test_a_run_keeps_its_date(
    files: list[str], model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model()
    tokenizer_with(DATED).save_pretrained(path)
    here = [*files, f"model.path={path}"]
    first = prepare_run(configure(*here, "data.date=2026-11-28"), tmp_path / "given")
    assert read_config(first.config).data.date == "2026-11-28"
    paths = prepare_run(configure(*here), tmp_path / "run")
    today = datetime.date.today().isoformat()
    assert read_config(paths.config).data.date == today
    prompts = paths.prompts.read_text()
    monkeypatch.setattr(datetime, "date", Later)
    prepare_run(configure(*here, "resume=auto"), tmp_path / "run")
    assert read_config(paths.config).data.date == today and paths.prompts.read_text() == prompts
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    other = prepare_run(configure(*here, f"resume={checkpoint}"), tmp_path / "other")
    assert read_config(other.config).data.date == today
    new = prepare_run(configure(*here), tmp_path / "new")
    assert read_config(new.config).data.date == "9000-01-02"
    message = refusal(lambda: prepare_run(configure(*here, "resume=auto", "data.date=9000-01-02"), tmp_path / "run"))
    assert message.startswith("data.date=9000-01-02 differs from ")


def test_runs_without_a_dated_template_have_no_date(files: list[str], tmp_path: Path) -> None:
    assert read_config(prepare_run(configure(*files), tmp_path / "run").config).data.date is None


def test_prompts_that_have_changed_are_no_start_to_go_on_from(files: list[str], tmp_path: Path) -> None:
    template, teacher = tmp_path / "mine.jinja", tmp_path / "teacher.jinja"
    template.write_text("{{ problem }}")
    teacher.write_text("{{ problem }} {{ privileged }}")
    here = [*files, f"data.template={template}", f"teacher.template={teacher}"]
    paths = prepare_run(configure(*here), tmp_path / "run")
    teacher.write_text("{{ problem }}\n{{ privileged }}")
    message = refusal(lambda: prepare_run(configure(*here, "resume=auto"), tmp_path / "run"))
    assert message.startswith("the prompts of train.teacher are not those that the run began with")
    # Another template is a setting that is named when a run goes on.
    prepare_run(configure(*here, "resume=auto", "teacher.template=teacher_bare.jinja"), tmp_path / "run")
    template.write_text("{{ problem }}?")
    message = refusal(lambda: prepare_run(configure(*here, "resume=auto"), tmp_path / "run"))
    assert message.startswith("the prompts of train.student are not those") and str(paths.prompts) in message
    paths.prompts.write_text("[1, 2")
    with pytest.raises(UnreadableError, match=r"prompts\.json is damaged"):
        prepare_run(configure(*here, "resume=auto"), tmp_path / "run")


def test_variables_of_the_chat_template_are_compared(files: list[str], tmp_path: Path) -> None:
    thinking = "data.chat_template_kwargs={enable_thinking: false}"
    prepare_run(configure(*files, thinking), tmp_path / "run")
    # An entry that is gone is a difference too.
    message = refusal(lambda: prepare_run(configure(*files, "resume=auto"), tmp_path / "run"))
    assert message.startswith("data.chat_template_kwargs.enable_thinking=None differs from False")
