"""``dasd evaluate``: Avg@k, Pass@k and Maj@k of a model on benchmarks, in NeMo-Skills' layout of files."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dasd_megatron.commands.convert import convert
from dasd_megatron.config import Config
from dasd_megatron.data.benchmarks import BENCHMARKS, benchmark_problems
from dasd_megatron.data.generators import generate_problems
from dasd_megatron.data.prompts import Problem, load_problems
from dasd_megatron.data.templates import check_lengths, make_renderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation import nemo_skills
from dasd_megatron.evaluation.health import from_rows, health_metrics, health_tables
from dasd_megatron.evaluation.pass_at_k import bootstrap, interval, mean, nemo_skills_metrics, problem_scores
from dasd_megatron.evaluation.sampling import (
    EvaluationError,
    Records,
    check_settings,
    duplicate_share,
    finished_samples,
    model_digest,
    sample_benchmark,
    samples_per_request,
)
from dasd_megatron.files import replace_file
from dasd_megatron.models.hf_config import hf_folder, is_megatron_checkpoint, load_tokenizer
from dasd_megatron.models.hf_weights import fingerprint
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.discovery import find_servers
from dasd_megatron.rollout.local_server import LocalServer
from dasd_megatron.run.checks import check_key
from dasd_megatron.run.paths import choose_run_dir
from dasd_megatron.verify.grader import Grader

OURS = "dasd"
"""In ``metrics.json``, the entry of each benchmark that has what NeMo-Skills does not count; the others are
NeMo-Skills'."""
MACRO_AVERAGE = "macro_average"
_VERSION = "evaluated"


def evaluate_model(config: Config) -> None:
    """Evaluate ``model.path`` on ``evaluation.benchmarks``, or on ``data.heldout`` where none are named, and print the
    table.

    The run directory gets ``<benchmark>/output-rs<i>.jsonl``, ``<benchmark>/health.json``, ``metrics.json`` and
    ``timing.json``. Started again with the same settings and ``run.dir``, it goes on where it was. With
    ``rollout.engine=external`` the external servers answer and ``model.path`` only gives the tokenizer.
    """
    if config.model.path is None:
        raise ConfigError("model.path is required to evaluate: give a Hugging Face directory or a Megatron checkpoint")
    check_key(config)
    problems = _load_problems(config)
    tokenizer = load_tokenizer(hf_folder(config.model.path))
    renderer = make_renderer(config, tokenizer)
    for of_benchmark in problems.values():
        check_lengths(of_benchmark, renderer, config.rollout.max_prompt_tokens, teacher=False)
    prompts = {name: [renderer.student(problem) for problem in of_benchmark] for name, of_benchmark in problems.items()}
    root = choose_run_dir(config)
    root.mkdir(parents=True, exist_ok=True)
    external = config.rollout.engine == "external"
    model = Path(config.model.path) if external else _hf_directory(config, root)
    urls = find_servers(config.rollout) if external else []
    served = (
        asyncio.run(_served_model(make_client(config.rollout, urls))) if external else {"model": model_digest(model)}
    )
    samples = config.evaluation.samples
    for name in problems:
        check_settings(root / name, _settings(config, served, problems[name], prompts[name]))
    results = {name: finished_samples(root / name, problems[name], samples) for name in problems}
    timing: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(total_steps=0))
        grader = stack.enter_context(Grader(config.verify))
        if not external and (None in results.values() or config.evaluation.nemo_skills == "eval"):
            server = stack.enter_context(
                LocalServer(model, _VERSION, config.rollout, root / "logs" / "rollout_server.log")
            )
            urls = [server.url]
        for name, finished in results.items():
            started = time.perf_counter()
            if finished is None:
                results[name] = sample_benchmark(
                    config,
                    root / name,
                    problems[name],
                    prompts[name],
                    client=make_client(config.rollout, urls),
                    grader=grader,
                    tokenizer=tokenizer,
                    weight_version=served.get("weight_version", _VERSION),
                    display=display,
                )
            timing[name] = time.perf_counter() - started
        metrics = write_metrics(config, root, results)
        replace_file(root / "timing.json", json.dumps({"seconds": timing}, indent=2) + "\n")
        print_table(metrics, config.evaluation.confidence)
        print(f"samples and metrics.json in {root.absolute()}")
        if config.evaluation.nemo_skills == "grade":
            nemo_skills.compare_grading(config.evaluation, root, results, display)
        elif config.evaluation.nemo_skills == "eval":
            nemo_skills.run_eval(config, root, problems, urls, model, display)


def evaluate_command(arguments: Sequence[str]) -> None:
    """``dasd evaluate --compare FOLDER FOLDER``: where two gradings of the same responses differ."""
    parser = argparse.ArgumentParser(prog="dasd evaluate --compare")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="FOLDER", required=True, help="folders of <benchmark>/output-rs*.jsonl"
    )
    first, second = parser.parse_args(arguments).compare
    nemo_skills.compare_folders(first, second)


def _load_problems(config: Config) -> dict[str, list[Problem]]:
    settings, source = config.evaluation, config.data.heldout
    if settings.benchmarks:
        return benchmark_problems(settings.benchmarks, Path(settings.data_dir), settings.size)
    if source.generator is not None:
        return {"heldout": generate_problems(source, "heldout")}
    return {"heldout": load_problems(source, "heldout", needs_solution=False)}


def _hf_directory(config: Config, root: Path) -> Path:
    """``model.path``, or what was made of it in the run directory where it is a Megatron checkpoint."""
    path, output, record = Path(config.model.path), root / "converted", root / "converted.json"
    if not is_megatron_checkpoint(path):
        return path
    source = {"checkpoint": str(path.resolve()), "files": fingerprint(path)}
    if not (output.is_dir() and record.is_file() and json.loads(record.read_text()) == source):
        convert(["megatron-to-hf", "--checkpoint", str(path), "--output", str(output), "--overwrite"])
        replace_file(record, json.dumps(source) + "\n")
    return output


async def _served_model(client: RolloutClient) -> dict[str, str]:
    """What external servers say that they serve; :class:`EvaluationError` where they do not agree."""
    async with client:
        found = await client.model_info()
    models = [{"model": info.get("model_path"), "weight_version": info.get("weight_version")} for info in found]
    for url, model in zip(client.urls, models, strict=True):
        if model != models[0]:
            raise EvaluationError(
                f"{client.urls[0]} serves {models[0]} and {url} serves {model}: give servers of one model"
            )
    return models[0]


def _settings(
    config: Config, served: Mapping[str, str], problems: Sequence[Problem], prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """All that the samples of a benchmark depend on, by the names of the fields where they have some."""
    rollout, evaluation, verify = config.rollout, config.evaluation, config.verify

    def digest(parts: Any) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    return {
        **served,
        "problems": digest([[problem.id, problem.problem, problem.expected_answer] for problem in problems]),
        "prompts": digest([list(prompt) for prompt in prompts]),
        "run.seed": config.run.seed,
        "evaluation.samples": evaluation.samples,
        "evaluation.temperature": evaluation.temperature,
        "evaluation.top_p": evaluation.top_p,
        "rollout.top_k": rollout.top_k,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.engine": rollout.engine,
        "rollout.dtype": rollout.dtype,
        "rollout.deterministic": rollout.deterministic,
        "evaluation.samples_per_request": samples_per_request(config),
        "verify.reward": verify.reward,
        "verify.truncated_is_wrong": verify.truncated_is_wrong,
        "verify.max_answer_chars": verify.max_answer_chars,
        "verify.workers": "some" if verify.workers else 0,
        **{f"health.{name}": value for name, value in dataclasses.asdict(config.health).items() if name != "every"},
        "math-verify": importlib.metadata.version("math-verify"),
    }


def write_metrics(config: Config, root: Path, results: Mapping[str, Records]) -> dict[str, Any]:
    """``metrics.json``: NeMo-Skills' entries of each benchmark, ours beside them, and the mean over benchmarks."""
    evaluation = config.evaluation
    metrics: dict[str, Any] = {}
    drawn: dict[str, np.ndarray] = {}
    for name, records in results.items():
        # NeMo-Skills counts files in the order of their names: rs10 comes before rs2.
        order = sorted(range(evaluation.samples), key=str)
        answers, outcomes, tokens = nemo_skills.verdicts([[row[sample] for sample in order] for row in records])
        scores = problem_scores(answers, outcomes, range(1, evaluation.samples + 1))
        # A generator each, so that benchmarks of equal size are drawn independently.
        seed = [config.run.seed, zlib.crc32(name.encode())]
        drawn[name] = bootstrap(list(zip(*scores.values(), strict=True)), evaluation.bootstrap_resamples, seed)
        flat = [record for row in records for record in row]
        total_tokens = sum(record["num_generated_tokens"] for record in flat)
        ours = {
            "num_problems": len(records),
            "num_samples": evaluation.samples,
            **{metric: mean(values) for metric, values in scores.items()},
            "no_answer_share": sum(record["predicted_answer"] is None for record in flat) / len(flat),
            "truncated_share": sum(record["finish_reason"] == "length" for record in flat) / len(flat),
            "duplicate_share": duplicate_share(records),
            "response/length_mean": total_tokens / len(flat),
            "nll_mean": -sum(record["log_prob"] for record in flat) / total_tokens,
            "timeouts": sum(record["grading_timed_out"] for record in flat),
        }
        metrics[name] = {**nemo_skills_metrics(answers, outcomes, tokens), OURS: ours}
        health = from_rows([record["health"] for record in flat])
        ours |= health_metrics(health, config.health)
        replace_file(root / name / "health.json", json.dumps(health_tables(health), indent=2) + "\n")
        ours["confidence_intervals"] = _intervals(scores, drawn[name], config)
    averaged = list(scores)
    metrics[MACRO_AVERAGE] = {
        OURS: {
            "num_benchmarks": len(results),
            **{metric: sum(metrics[name][OURS][metric] for name in results) / len(results) for metric in averaged},
            "confidence_intervals": _intervals(averaged, sum(drawn.values()) / len(drawn), config),
            "confidence": evaluation.confidence,
            "bootstrap_resamples": evaluation.bootstrap_resamples,
        }
    }
    replace_file(root / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _intervals(names: Sequence[str] | Mapping[str, Any], means: np.ndarray, config: Config) -> dict[str, list[float]]:
    low, high = interval(means, config.evaluation.confidence)
    return {name: [float(low[index]), float(high[index])] for index, name in enumerate(names)}


def print_table(metrics: Mapping[str, Any], confidence: float) -> None:
    """Of each benchmark, and of their mean: Avg@n with its confidence interval, Pass@n, Maj@n, and what became of the
    responses."""
    names = [name for name in metrics if name != MACRO_AVERAGE]
    n = metrics[names[0]][OURS]["num_samples"]
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("benchmark")
    for heading in (
        "problems",
        f"Avg@{n} [{confidence:.0%}]",
        f"Pass@{n}",
        f"Maj@{n}",
        "no answer",
        "cut off",
        "repeated",
        "tokens",
    ):
        table.add_column(heading, justify="right")

    def scores(entry: Mapping[str, Any]) -> list[str]:
        low, high = entry["confidence_intervals"][f"avg@{n}"]
        return [
            f"{entry[f'avg@{n}']:.1%} [{low:.1%}, {high:.1%}]",
            f"{entry[f'pass@{n}']:.1%}",
            f"{entry[f'maj@{n}']:.1%}",
        ]

    for name in names:
        ours = metrics[name][OURS]
        shares = [f"{ours[share]:.1%}" for share in ("no_answer_share", "truncated_share", "duplicate_share")]
        title = BENCHMARKS[name].title if name in BENCHMARKS else name
        table.add_row(title, str(ours["num_problems"]), *scores(ours), *shares, f"{ours['response/length_mean']:.1f}")
    if len(names) > 1:
        table.add_row("mean", "", *scores(metrics[MACRO_AVERAGE][OURS]), "", "", "", "")
    Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
