"""An evaluation without a run: its problems, the model that answers, its samples and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dasd_megatron.config import Config, DataSourceConfig, EvaluationConfig, RolloutConfig
from dasd_megatron.data.benchmarks import benchmark_problems
from dasd_megatron.data.generators import generate_problems
from dasd_megatron.data.prompt_checks import check_prompts
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.reader import load_problems
from dasd_megatron.data.templates import make_renderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation import nemo_skills
from dasd_megatron.evaluation.sampling import (
    EvaluationError,
    Records,
    check_settings,
    finished_samples,
    kept_date,
    model_digest,
    sample_benchmark,
    samples_per_request,
)
from dasd_megatron.evaluation.summary import print_table, write_metrics
from dasd_megatron.files import replace_file
from dasd_megatron.models.hf_config import hf_folder, load_tokenizer, stored_vocab_size
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.answers import show
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.discovery import find_servers
from dasd_megatron.rollout.local_server import LocalServer
from dasd_megatron.run.checks import check_end_tokens, check_key
from dasd_megatron.run.dates import choose_date, with_date
from dasd_megatron.run.paths import choose_run_dir
from dasd_megatron.verify.grader import Grader

_VERSION = "evaluated"


def evaluate_model(config: Config, find_directory: Callable[[str, Path], Path]) -> None:
    """Evaluate ``model.path`` on ``evaluation.benchmarks``, or on ``data.heldout`` where none are named, and print the
    table.

    The run directory gets ``<benchmark>/output-rs<i>.jsonl``, ``<benchmark>/health.json``, ``metrics.json`` and
    ``timing.json``. Started again with the same settings and ``run.dir``, it goes on where it was. With
    ``rollout.engine=external`` the external servers answer and ``model.path`` only gives the tokenizer.

    Args:
        find_directory: returns a Hugging Face directory of ``model.path``, which it may make in the run directory.

    Raises:
        ConfigError: the configuration cannot run. EvaluationError: see :func:`check_settings`,
            :func:`read_served_model` and :func:`sample_benchmark`.
    """
    if config.model.path is None:
        raise ConfigError("model.path is required to evaluate: give a Hugging Face directory or a Megatron checkpoint")
    check_key(config)
    problems = load_benchmarks(config.evaluation, config.data.heldout, config.verify.max_answer_chars)
    model_path = config.model.path
    tokenizer = load_tokenizer(hf_folder(model_path))
    root = choose_run_dir(config)
    config = choose_date(with_date(config, config.data.date or kept_date(root, list(problems))), tokenizer)
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    limit, vocab_size = config.rollout.max_prompt_tokens, stored_vocab_size(hf_folder(model_path))
    check_end_tokens(hf_folder(model_path), tokenizer, vocab_size)
    for of_benchmark in problems.values():
        check_prompts(of_benchmark, renderer, limit, vocab_size=vocab_size)
    prompts = {name: [renderer.student(problem) for problem in of_benchmark] for name, of_benchmark in problems.items()}
    root.mkdir(parents=True, exist_ok=True)
    external = config.rollout.engine == "external"
    model = Path(model_path) if external else find_directory(model_path, root)
    urls = find_servers(config.rollout) if external else []
    served = read_served_model(config.rollout, urls) if external else {"model": model_digest(model)}
    samples = config.evaluation.samples
    for name in problems:
        check_settings(root / name, sample_settings(config, served, problems[name], prompts[name]))
    finished = {name: finished_samples(root / name, problems[name], samples) for name in problems}
    results: dict[str, Records] = {}
    timing: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(total_steps=0))
        grader = stack.enter_context(Grader(config.verify))
        if not external and (None in finished.values() or config.evaluation.nemo_skills == "eval"):
            log = root / "logs" / "rollout_server.log"
            urls = [stack.enter_context(LocalServer(model, _VERSION, config.rollout, log)).url]
        for name, records in finished.items():
            started = time.perf_counter()
            if records is None:
                records = sample_benchmark(
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
            results[name] = records
            timing[name] = time.perf_counter() - started
        metrics = write_metrics(config.evaluation, config.health, root, results, seed=config.run.seed)
        replace_file(root / "timing.json", json.dumps({"seconds": timing}, indent=2) + "\n")
        print_table(metrics, config.evaluation.confidence)
        print(f"samples and metrics.json in {root.absolute()}")
        if config.evaluation.nemo_skills == "grade":
            nemo_skills.compare_grading(config.evaluation, root, results, display)
        elif config.evaluation.nemo_skills == "eval":
            nemo_skills.run_eval(config.evaluation, config.rollout, root, problems, urls, model, display)


def load_benchmarks(
    evaluation: EvaluationConfig, heldout: DataSourceConfig, max_answer_chars: int
) -> dict[str, list[Problem]]:
    """Return the problems of each of ``evaluation.benchmarks``, or those of ``data.heldout`` where none are named.

    Args:
        max_answer_chars: longest answer that can be graded.
    """
    if evaluation.benchmarks:
        return benchmark_problems(
            evaluation.benchmarks,
            Path(evaluation.data_dir),
            evaluation.size,
            max_answer_chars=max_answer_chars,
            say=print,
        )
    if heldout.generator is not None:
        return {"heldout": generate_problems(heldout, "heldout")}
    read = load_problems(heldout, "heldout", needs_solution=False, max_answer_chars=max_answer_chars, say=print)
    return {"heldout": read}


def read_served_model(rollout: RolloutConfig, urls: Sequence[str]) -> dict[str, str | None]:
    """Return the model and the weight version that external servers name.

    Raises:
        EvaluationError: the servers do not agree.
    """
    return asyncio.run(_ask_servers(make_client(rollout, urls)))


async def _ask_servers(client: RolloutClient) -> dict[str, str | None]:
    async with client:
        found = await client.model_info()
    models = [{"model": info.get("model_path"), "weight_version": info.get("weight_version")} for info in found]
    for url, model in zip(client.urls, models, strict=True):
        if model != models[0]:
            raise EvaluationError(
                f"{client.urls[0]} serves {show(models[0])} and {url} serves {show(model)}: give servers of one model"
            )
    return models[0]


def sample_settings(
    config: Config, served: Mapping[str, str | None], problems: Sequence[Problem], prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return all that the samples of a benchmark depend on, by the names of fields where there are some."""
    rollout, evaluation, verify = config.rollout, config.evaluation, config.verify
    return {
        **served,
        "problems": _digest([[problem.id, problem.problem, problem.expected_answer] for problem in problems]),
        "prompts": _digest([list(prompt) for prompt in prompts]),
        "data.date": config.data.date,
        "data.chat_template_kwargs": config.data.chat_template_kwargs or None,
        "run.seed": config.run.seed,
        "evaluation.samples": evaluation.samples,
        "evaluation.temperature": evaluation.temperature,
        "evaluation.top_p": evaluation.top_p,
        "rollout.top_k": rollout.top_k,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.engine": rollout.engine,
        "rollout.dtype": rollout.dtype,
        "rollout.deterministic": rollout.deterministic,
        "evaluation.samples_per_request": samples_per_request(evaluation, rollout, config.batch),
        "verify.reward": verify.reward,
        "verify.truncated_is_wrong": verify.truncated_is_wrong,
        "verify.max_answer_chars": verify.max_answer_chars,
        "verify.workers": "some" if verify.workers else 0,
        **{f"health.{name}": value for name, value in dataclasses.asdict(config.health).items() if name != "every"},
        "math-verify": importlib.metadata.version("math-verify"),
    }


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
