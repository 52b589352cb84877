"""An evaluation without a run: its problems, what its samples depend on, and the model that servers name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dasd_megatron.commands.evaluate import hf_directory
from dasd_megatron.config import Config, DataSourceConfig, RolloutConfig, load_config
from dasd_megatron.data.prompts import DataError, write_problems
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation import standalone
from dasd_megatron.evaluation.sampling import EvaluationError
from dasd_megatron.evaluation.standalone import evaluate_model, load_benchmarks, read_served_model, sample_settings
from tests.support.chat_templates import DATED, save_model_files
from tests.support.evaluation_samples import PROBLEMS, PROMPTS


def test_a_model_is_needed(config: Config) -> None:
    with pytest.raises(ConfigError, match="model.path is required to evaluate"):
        evaluate_model(config, hf_directory)


def test_the_settings_that_are_taken_where_none_are_named(tmp_path: Path) -> None:
    config = load_config(
        ["experiment=evaluate", f"model.path={tmp_path}", "evaluation.benchmarks=[gsm8k]", "evaluation.samples=4"]
    )
    assert (config.rollout.engine, config.evaluation.temperature, config.data.template) == (
        "embedded",
        0.6,
        "student_math.jinja",
    )
    with pytest.raises(ConfigError, match="evaluation.nemo_skills=grade runs in an environment of its own"):
        load_config(
            [
                "experiment=evaluate",
                f"model.path={tmp_path}",
                "evaluation.benchmarks=[a]",
                "evaluation.nemo_skills=grade",
            ]
        )
    with pytest.raises(ConfigError, match="data.train: give either .*needs neither with evaluation.benchmarks"):
        load_config(["experiment=evaluate", f"model.path={tmp_path}"])


class ServerStarted(Exception):
    """The point at which a server would be started, and all checks are done."""


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An evaluation of the model ``tmp_path / "m"`` up to the start of a server."""

    def start(*_args: object) -> NoReturn:
        raise ServerStarted

    monkeypatch.setattr(standalone, "LocalServer", start)
    write_problems(tmp_path / "b.jsonl", PROBLEMS)

    def run(*overrides: str) -> None:
        benchmark = f"evaluation.benchmarks=[{tmp_path}/b.jsonl]"
        files = [f"model.path={tmp_path}/m", benchmark, f"run.dir={tmp_path}/r", "data.template=null"]
        evaluate_model(load_config(["experiment=evaluate", *files, *overrides]), lambda path, _root: Path(path))

    return run


def test_an_evaluation_keeps_its_date(
    evaluate: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_model_files(tmp_path / "m", DATED)
    with pytest.raises(ServerStarted):
        evaluate("data.date=2026-11-28")
    settings = json.loads((tmp_path / "r" / "b" / "settings.json").read_text())
    assert settings["data.date"] == "2026-11-28" and settings["data.chat_template_kwargs"] is None
    # It goes on on another day, and is refused only with another date.
    with pytest.raises(ServerStarted):
        evaluate()
    assert "data.date=2026-11-28: the tokenizer's chat template shows it" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="data.date was .2026-11-28. and is .2026-11-29."):
        evaluate("data.date=2026-11-29")
    with pytest.raises(EvaluationError, match="data.chat_template_kwargs was null"):
        evaluate("data.chat_template_kwargs={date_string: now}")


@pytest.mark.parametrize(
    ("template", "fields", "said"),
    [
        ("{% for m in messages %}<|user|><|end|>{% endfor %}", {}, "chat template does not show the problem"),
        ("<|user|>{% for m in messages %}{{ m.content }}{% endfor %}", {"vocab_size": 2}, r"'<\|user\|>' \(id 2\)"),
        ("{{ messages[0].content }}", {"vocab_size": 1}, r"no response could end, .*'<\|end\|>' \(id 1\)"),
    ],
)
def test_prompts_are_checked_before_a_server_is_started(
    evaluate: Callable[..., None], tmp_path: Path, template: str, fields: dict[str, int], said: str
) -> None:
    save_model_files(tmp_path / "m", template, **fields)
    with pytest.raises((TemplateError, DataError, ConfigError), match=said):
        evaluate()
    assert not (tmp_path / "r").exists()


def test_held_out_problems_are_taken_where_no_benchmark_is_named(config: Config, tmp_path: Path) -> None:
    generated = load_benchmarks(config.evaluation, config.data.heldout, 512)
    assert list(generated) == ["heldout"] and len(generated["heldout"]) == config.data.heldout.size
    write_problems(tmp_path / "mine.jsonl", PROBLEMS)
    read = load_benchmarks(config.evaluation, DataSourceConfig(path=str(tmp_path / "mine.jsonl")), 512)
    assert read == {"heldout": PROBLEMS}


def test_samples_are_known_by_what_they_depend_on(config: Config) -> None:
    served = {"model": "m", "weight_version": None}

    def settings(changed: Config = config, **others: Any) -> dict[str, Any]:
        arguments = {"served": served, "problems": PROBLEMS, "prompts": PROMPTS} | others
        return sample_settings(changed, **arguments)

    def different(found: dict[str, Any]) -> set[str]:
        whole = settings()
        return {name for name in whole | found if whole.get(name) != found.get(name)}

    assert different(settings(served={**served, "model": "other"})) == {"model"}
    assert different(settings(prompts=[*PROMPTS[:-1], [1]])) == {"prompts"}
    answer = dataclasses.replace(PROBLEMS[0], expected_answer="0")
    assert different(settings(problems=[answer, *PROBLEMS[1:]])) == {"problems"}
    # Solutions are not shown to the model that is evaluated.
    solution = dataclasses.replace(PROBLEMS[0], reference_solution="new")
    assert different(settings(problems=[solution, *PROBLEMS[1:]])) == set()
    changed = copy.deepcopy(config)
    changed.run.seed, changed.evaluation.top_p, changed.run.name = 99, 0.5, "another"
    changed.verify.workers += 1
    assert different(settings(changed)) <= {"run.seed", "evaluation.top_p", "verify.workers"}
    assert {"run.seed", "evaluation.top_p"} <= different(settings(changed))


class Servers:
    """Answers of servers to the question which model they serve."""

    def __init__(self, *models: dict[str, str]) -> None:
        self.models = list(models)
        self.urls = [f"http://server{index}" for index in range(len(models))]

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def model_info(self) -> list[dict[str, str]]:
        return self.models


def test_servers_have_to_agree_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"model_path": "m", "weight_version": "1", "port": "1"}
    servers = Servers(first, {**first, "port": "2"})
    monkeypatch.setattr(standalone, "make_client", lambda rollout, urls: servers)
    assert read_served_model(RolloutConfig(), servers.urls) == {"model": "m", "weight_version": "1"}
    servers.models[1]["weight_version"] = "2"
    with pytest.raises(EvaluationError, match="http://server0 serves .* and http://server1 serves"):
        read_served_model(RolloutConfig(), servers.urls)
