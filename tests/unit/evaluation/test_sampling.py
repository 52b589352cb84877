"""Samples on disk: resumed where a kill left them, the same bytes as of one run, and never mixed with others."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import random
from pathlib import Path

import pytest

from dasd_megatron.commands.evaluate import hf_directory
from dasd_megatron.config import Config, VerifyConfig, load_config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation.sampling import EvaluationError, Records, check_settings, model_digest, sample_benchmark
from dasd_megatron.evaluation.standalone import evaluate_model
from dasd_megatron.evaluation.summary import MACRO_AVERAGE, OURS, print_table, write_metrics
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.verify.grader import Grader

TOKENIZER = character_tokenizer()
PROBLEMS = [Problem(f"p{i}", f"{i}+1 =", str(i + 1), "") for i in range(7)]
PROMPTS = [TOKENIZER.encode(problem.problem) for problem in PROBLEMS]


class Engine:
    """Answers by the seed alone, in a random order of requests, and fails at the request ``last``."""

    def __init__(self, last: int | None = None, *, same: bool = False, log_prob: float | None = None) -> None:
        self.last, self.same, self.log_prob, self.requests = last, same, log_prob, []

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def generate(self, prompts, params, *, weight_version, rows_per_request) -> list[Completion]:
        assert len(prompts) <= rows_per_request and weight_version == "w"
        await asyncio.sleep(random.random() / 200)
        if self.last is not None and len(self.requests) >= self.last:
            raise RolloutServerError("http://server", "gone", 1, "look at its log")
        self.requests.append([one["sampling_seed"] for one in params])
        return [self.completion(prompt, one["sampling_seed"]) for prompt, one in zip(prompts, params, strict=True)]

    def completion(self, prompt: list[int], seed: int) -> Completion:
        term = int(TOKENIZER.decode(prompt).split("+")[0])
        noise = 0 if self.same else seed % 3
        text = "no mark" if noise == 2 else f"{seed % 1000 if not self.same else ''} #### {term + 1 + noise}"
        ids = [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]
        log_prob = -(seed % 97) / 7 if self.log_prob is None else self.log_prob
        return Completion(ids, [log_prob] * len(ids), "length" if noise == 2 else "stop", [("w", len(ids))], "")


@pytest.fixture
def config() -> Config:
    config = load_config(
        ["experiment=quickstart", "evaluation.samples=3", "evaluation.ks=[1]", "evaluation.samples_per_request=4"]
    )
    return config


def draw(config: Config, folder: Path, engine: Engine) -> Records:
    folder.mkdir(exist_ok=True)
    with Grader(VerifyConfig(workers=0)) as grader, ProgressDisplay(total_steps=0, stream=io.StringIO()) as display:
        return sample_benchmark(
            config,
            folder,
            PROBLEMS,
            PROMPTS,
            client=engine,
            grader=grader,
            tokenizer=TOKENIZER,
            weight_version="w",
            display=display,
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resumed_twice_is_as_never_stopped(config: Config, tmp_path: Path) -> None:
    whole = Engine()
    records = draw(config, tmp_path / "whole", whole)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "output-rs0.jsonl",
        "output-rs1.jsonl",
        "output-rs2.jsonl",
    ]
    assert len({seed for seeds in whole.requests for seed in seeds}) == 21
    assert list(records[0][0])[:5] == [
        "problem",
        "expected_answer",
        "generation",
        "predicted_answer",
        "symbolic_correct",
    ]

    folder = tmp_path / "stopped"
    for last in (2, 3):
        with pytest.raises(RolloutServerError, match="gone"):
            draw(config, folder, Engine(last))
        journal = folder / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        # Killed in the middle of a line: this sample and no other is drawn again.
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: random.randrange(1, len(lines[-1]))])
    rest = Engine()
    assert draw(config, folder, rest) == records
    assert contents(folder) == contents(tmp_path / "whole")
    # Answers that came before the failure are kept, but for the one that was torn each time.
    assert len(rest.requests) == len(whole.requests) - (2 - 1) - (3 - 1)

    again = Engine()
    assert draw(config, folder, again) == records and again.requests == []
    # Killed between the final files and the journal's end.
    (folder / "journal.jsonl").write_bytes(
        b"".join(json.dumps({"place": [p, s], **records[p][s]}).encode() + b"\n" for p in range(7) for s in range(3))
    )
    assert draw(config, folder, again) == records and again.requests == []
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_journal_of_something_else_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RolloutServerError):
        draw(config, tmp_path, Engine(2))
    journal = tmp_path / "journal.jsonl"
    good = journal.read_text()
    for bad in ("[]", "{}", '{"place": [99, 0], "problem_id": "p0"}', '{"place": [1, 0], "problem_id": "p0"}', "\0\0"):
        journal.write_text(good + bad + "\n")
        with pytest.raises(EvaluationError, match=r"journal.jsonl line \d+ is no sample of this evaluation"):
            draw(config, tmp_path, Engine())


def test_final_files_that_are_not_whole_are_refused(config: Config, tmp_path: Path) -> None:
    draw(config, tmp_path, Engine())
    file = tmp_path / "output-rs1.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(EvaluationError, match="output-rs1.jsonl does not have each problem once"):
        draw(config, tmp_path, Engine())


def test_a_policy_that_has_collapsed_is_no_fault_of_the_server(config: Config, tmp_path: Path) -> None:
    records = draw(config, tmp_path, Engine(same=True, log_prob=-0.01))
    assert all(len({record["generation"] for record in row}) == 1 for row in records)


def test_samples_that_are_all_the_same_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        EvaluationError, match="all 3 samples of each problem are the same, so the server heeds no seed"
    ):
        draw(config, tmp_path / "sampled", Engine(same=True))
    assert not list((tmp_path / "sampled").glob("output*"))
    greedy = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, temperature=0.0))
    draw(greedy, tmp_path / "greedy", Engine(same=True))


def test_other_settings_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    check_settings(folder, {"evaluation.temperature": 1.0, "run.seed": 1})
    check_settings(folder, {"run.seed": 1, "evaluation.temperature": 1.0})
    with pytest.raises(
        EvaluationError,
        match=r"other settings \(evaluation.temperature was 1.0 and is 0.6\): remove it, or give another",
    ):
        check_settings(folder, {"evaluation.temperature": 0.6, "run.seed": 1})
    (folder / "settings.json").unlink()
    (folder / "output-rs0.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="no settings.json"):
        check_settings(folder, {})


def test_a_changed_model_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    before = model_digest(tmp_path)
    (tmp_path / "logs.log").write_text("not the model")
    assert model_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert model_digest(tmp_path) != before


def test_metrics_of_several_benchmarks(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = draw(config, tmp_path / "one", Engine())
    right = [[{**record, "symbolic_correct": True, "predicted_answer": "1"} for record in row] for row in records]
    for name in ("gsm8k", "mine"):
        (tmp_path / name).mkdir()
    metrics = write_metrics(config, tmp_path, {"gsm8k": records, "mine": right})
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    ours = metrics["gsm8k"][OURS]
    flat = [record for row in records for record in row]
    assert ours["avg@3"] == pytest.approx(sum(record["symbolic_correct"] for record in flat) / 21)
    assert (
        ours["no_answer_share"]
        == ours["truncated_share"]
        == sum(record["predicted_answer"] is None for record in flat) / 21
    )
    assert metrics["gsm8k"]["pass@1[avg-of-3]"]["symbolic_correct"] == pytest.approx(100 * ours["avg@3"])
    assert set(metrics["gsm8k"]) == {"pass@1", *(f"{kind}@{k}" for kind in ("pass", "majority") for k in (2, 3)), *(f"pass@1[avg-of-{k}]" for k in (2, 3)), OURS}  # fmt: skip # noqa: E501
    # Through the files' JSON, as what was measured on the samples themselves.
    assert ours["health/length_p50"] == sorted(record["num_generated_tokens"] for record in flat)[10]
    assert ours["health/distinct_paths"] == pytest.approx(
        sum(len({record["generation"] for record in row}) for row in records) / 7
    )
    # The steps of sums are checked, and none of these responses has one.
    assert ours["health/step_accuracy"] == 0.0
    table = json.loads((tmp_path / "gsm8k" / "health.json").read_text())["calibration"]
    assert sum(entry["responses"] for entry in table) == 21
    low, high = ours["confidence_intervals"]["avg@3"]
    assert 0 <= low < ours["avg@3"] < high <= 1
    average = metrics[MACRO_AVERAGE][OURS]
    assert average["avg@3"] == pytest.approx((ours["avg@3"] + 1) / 2)
    # Half of one benchmark's uncertainty, and of the other's, which is none.
    width = average["confidence_intervals"]["avg@3"][1] - average["confidence_intervals"]["avg@3"][0]
    assert width == pytest.approx((high - low) / 2)
    print_table(metrics, 0.95)
    table = capsys.readouterr().out
    assert "GSM8K" in table and "mine" in table and "mean" in table and "Avg@3 [95%]" in table and "100.0%" in table


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
