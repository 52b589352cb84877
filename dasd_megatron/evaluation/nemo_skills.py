"""NeMo-Skills as a second grader, and its ``ns eval`` against our servers: subprocesses in an environment of its own.

NeMo-Skills ends with status 0 even where its jobs have crashed. So every file, line and field that it was to write is
checked afterwards. This is written for NeMo-Skills 0.7.0; docs/evaluation.md says how its environment is made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from dasd_megatron.access import api_key
from dasd_megatron.config import EvaluationConfig, RolloutConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation.pass_at_k import nemo_skills_metrics
from dasd_megatron.evaluation.sampling import EvaluationError, Records
from dasd_megatron.files import replace_file
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.reading import UnreadableError, iterate_json_lines, read_json

FOLDER = "nemo_skills"
_GRADED: dict[str, type | tuple[type, ...]] = {
    "problem": str,
    "expected_answer": (str, int, float),
    "generation": str,
    "predicted_answer": (str, type(None)),
    "symbolic_correct": bool,
}
# A folder of problems tells NeMo-Skills how to use it. These are the settings of its own folders of mathematics.
_DATASET_SETTINGS = {
    "DATASET_GROUP": "math",
    "METRICS_TYPE": "math",
    "EVAL_ARGS": "++eval_type=math",
    "GENERATION_ARGS": "++prompt_config=generic/math",
}
_TAIL_LINES = 3


def read_graded(folder: Path) -> Records:
    """Return [problem][sample] of a benchmark's files ``output-rs*.jsonl``, whoever graded them. Samples are in the
    order of the files' names, as NeMo-Skills counts them.

    Raises:
        EvaluationError: there are none, they differ in their numbers of lines or in their problems, or a line is no
            graded response.
    """
    files = sorted(folder.glob("output-rs*.jsonl"), key=lambda file: file.name)
    if not files:
        raise EvaluationError(f"{folder} has no output-rs*.jsonl: give a folder of graded responses")
    columns = [_read_file(file) for file in files]
    for file, column in zip(files, columns, strict=True):
        if [record["problem"] for record in column] != [record["problem"] for record in columns[0]]:
            raise EvaluationError(
                f"{file} has {len(column)} problems and other ones than {files[0].name}: it is not whole"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def _read_file(file: Path) -> list[dict[str, Any]]:
    records = []
    for line in iterate_json_lines(file, advice="let NeMo-Skills write it again"):
        where = f"{file} line {line.number}"
        if line.problem is not None:
            raise EvaluationError(f"{where} is no graded response ({line.problem})")
        missing = [name for name in _GRADED if name not in line.row]
        if missing:
            raise EvaluationError(f"{where} is no graded response ({missing[0]} is missing)")
        wrong = [name for name, kind in _GRADED.items() if not isinstance(line.row[name], kind)]
        if wrong:
            raise EvaluationError(f"{where}: {wrong[0]} is {line.row[wrong[0]]!r:.40}")
        records.append(line.row)
    if not records:
        raise EvaluationError(f"{file} is empty")
    return records


def check_graded(folder: Path, problems: Sequence[str], samples: int) -> Records:
    """Return :func:`read_graded`'s samples; :class:`EvaluationError` unless there are ``samples`` of each of
    ``problems`` and of no other."""
    records = read_graded(folder)
    if len(records[0]) != samples:
        raise EvaluationError(
            f"{folder} has {len(records[0])} files of responses and not {samples}: NeMo-Skills has not done all its "
            "work"
        )
    if sorted(row[0]["problem"] for row in records) != sorted(problems):
        raise EvaluationError(f"{folder} has {len(records)} problems and not just the {len(problems)} that were asked")
    return records


class Verdicts(NamedTuple):
    """Each [problem][sample]."""

    answers: list[list[str | None]]
    outcomes: list[list[bool]]
    tokens: list[list[int]]


def verdicts(records: Records) -> Verdicts:
    """Return answers, outcomes and lengths in tokens, each [problem][sample], as the metrics take them."""
    return Verdicts(
        [[record["predicted_answer"] for record in row] for row in records],
        [[record["symbolic_correct"] for record in row] for row in records],
        [[record.get("num_generated_tokens", 0) for record in row] for row in records],
    )


def compare_grading(
    settings: EvaluationConfig, root: Path, results: Mapping[str, Records], display: ProgressDisplay
) -> None:
    """Let NeMo-Skills grade copies of the responses, check its metrics against ours on its verdicts, and list where the
    verdicts differ.

    Raises:
        EvaluationError: it fails, leaves something out, or counts otherwise.
    """
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name, records in results.items():
        (folder / name).mkdir(parents=True)
        for sample in range(len(records[0])):
            # Our verdicts are left out: a grader that crashed would otherwise seem to agree with us.
            rows = [
                {
                    key: value
                    for key, value in row[sample].items()
                    if key not in ("predicted_answer", "symbolic_correct")
                }
                for row in records
            ]
            replace_file(folder / name / f"output-rs{sample}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    theirs = {}
    with display.phase("NeMo-Skills grades"):
        for name, records in results.items():
            _run(
                settings,
                root,
                "nemo_skills.evaluation.evaluate_results",
                f"++input_files={name}/output-rs*.jsonl",
                "++eval_type=math",
            )
            theirs[name] = check_graded(folder / name, [row[0]["problem"] for row in records], len(records[0]))
        _run(settings, root, "nemo_skills.pipeline.cli", "summarize_results", ".", "--metric_type=math")
    check_metrics(folder / "metrics.json", theirs)
    compare_folders(root, folder)


def check_metrics(path: Path, graded: Mapping[str, Records]) -> None:
    """Refuse (EvaluationError) a ``metrics.json`` that does not say of its verdicts what our formulas say."""
    try:
        found = read_json(path, {str: {str: {str: object}}}, advice="NeMo-Skills has left no metrics, look at its log")
    except UnreadableError as error:
        raise EvaluationError(str(error)) from error
    for name, records in graded.items():
        expected = nemo_skills_metrics(*verdicts(records))
        for mode, entry in expected.items():
            for key, value in entry.items():
                other = found.get(name, {}).get(mode, {}).get(key)
                if not _close(other, value):
                    raise EvaluationError(
                        f"{path}: {name} {mode} {key} is {other}, and by our formulas {value}: not the pinned version?"
                    )


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(_close(found.get(key), value) for key, value in expected.items())
    return isinstance(found, int | float) and abs(found - expected) <= 1e-9 * max(1.0, abs(expected))


def compare_folders(first: Path, second: Path) -> None:
    """Print on how many responses of each common benchmark two gradings agree, and write the others to
    ``differences.jsonl`` in the second folder.

    Raises:
        EvaluationError: no benchmark in common, or other responses than the first's.
    """
    first, second = (
        folder / "eval-results" if (folder / "eval-results").is_dir() else folder for folder in (first, second)
    )
    names = sorted(
        path.parent.name for path in first.glob("*/output-rs0.jsonl") if (second / path.parent.name).is_dir()
    )
    if not names:
        raise EvaluationError(
            f"{first} and {second} have no benchmark in common: give folders of <benchmark>/output-rs*.jsonl"
        )
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("benchmark")
    for heading in ("responses", "same verdict", "right in the first alone", "right in the second alone"):
        table.add_column(heading, justify="right")
    differences = []
    for name in names:
        both = [read_graded(first / name), read_graded(second / name)]
        pairs = [pair for rows in zip(*both, strict=False) for pair in zip(*rows, strict=False)]
        shapes = [[len(row) for row in records] for records in both]
        if shapes[0] != shapes[1] or any(ours["problem"] != theirs["problem"] for ours, theirs in pairs):
            raise EvaluationError(
                f"{first / name} and {second / name} hold other problems or numbers of samples: nothing to compare"
            )
        unequal = [pair for pair in pairs if pair[0]["symbolic_correct"] != pair[1]["symbolic_correct"]]
        alone = sum(ours["symbolic_correct"] for ours, _ in unequal)
        table.add_row(name, str(len(pairs)), str(len(pairs) - len(unequal)), str(alone), str(len(unequal) - alone))
        for ours, theirs in unequal:
            fields = {"benchmark": name, "problem": ours["problem"], "expected_answer": ours["expected_answer"]}
            fields |= {"first": _verdict(ours), "second": _verdict(theirs)}
            differences.append(json.dumps(fields) + "\n")
    replace_file(second / "differences.jsonl", "".join(differences))
    Console(highlight=False, width=120).print(table)
    print(f"{len(differences)} different verdicts in {second / 'differences.jsonl'}")


def _verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"predicted_answer": record["predicted_answer"], "symbolic_correct": record["symbolic_correct"]}


def run_eval(
    settings: EvaluationConfig,
    rollout: RolloutConfig,
    root: Path,
    problems: Mapping[str, Sequence[Problem]],
    urls: Sequence[str],
    model: Path,
    display: ProgressDisplay,
) -> None:
    """Run ``ns eval`` with its own prompts against the first server, into ``<root>/nemo_skills/eval-results``.

    Raises:
        ConfigError: the server lacks OpenAI's API.
        EvaluationError: ``ns eval`` fails, leaves something out, or counts otherwise.
    """
    if rollout.engine == "embedded":
        raise ConfigError(
            "evaluation.nemo_skills=eval asks over OpenAI's API, which the embedded server lacks: write "
            "rollout=sglang_cpu or external"
        )
    folder = (root / FOLDER).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    for name, of_benchmark in problems.items():
        (folder / "data" / name).mkdir(parents=True)
        lines = "".join(f"{key} = {value!r}\n" for key, value in _DATASET_SETTINGS.items())
        (folder / "data" / name / "__init__.py").write_text(lines)
        rows = [
            {"id": problem.id, "problem": problem.problem, "expected_answer": problem.expected_answer}
            for problem in of_benchmark
        ]
        replace_file(folder / "data" / name / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with display.phase("ns eval"):
        _run(
            settings,
            root,
            "nemo_skills.pipeline.cli",
            "eval",
            f"--benchmarks={','.join(f'{name}:{settings.samples}' for name in problems)}",
            f"--output_dir={folder}",
            f"--data_dir={folder / 'data'}",
            "--server_type=sglang",
            f"--server_address={urls[0]}/v1",
            f"--model={model.absolute()}",
            f"++inference.temperature={settings.temperature}",
            f"++inference.top_p={settings.top_p}",
            f"++inference.tokens_to_generate={rollout.max_new_tokens}",
            f"++max_concurrent_requests={rollout.max_in_flight}",
        )
    results = folder / "eval-results"
    graded = {
        name: check_graded(results / name, [problem.problem for problem in problems[name]], settings.samples)
        for name in problems
    }
    for name, records in graded.items():
        check_metrics(results / name / "metrics.json", {name: records})
        average = nemo_skills_metrics(*verdicts(records))[
            f"pass@1[avg-of-{settings.samples}]" if settings.samples > 1 else "pass@1"
        ]
        print(
            f"ns eval: {name} {average['symbolic_correct']:.1f}% of {len(records)} problems x {settings.samples}, in "
            f"{results}"
        )


def _run(settings: EvaluationConfig, root: Path, module: str, *arguments: str) -> None:
    """Run a module in NeMo-Skills' environment, with ``<root>/nemo_skills`` as working directory and its output in
    ``<root>/logs``."""
    log = root / "logs" / f"{module}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # The checks of the configuration refuse evaluation.nemo_skills without it.
    assert settings.nemo_skills_python is not None
    python = Path(settings.nemo_skills_python).absolute()
    # Its own interpreter comes first, since NeMo-Skills starts `python` by that name. Variables of this environment
    # would lead that interpreter to this environment's packages.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),
        "OPENAI_API_KEY": api_key() or "none",
    }
    with open(log, "ab") as file:
        try:
            done = subprocess.run(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=root / FOLDER,
                env=environment,
                timeout=settings.nemo_skills_timeout_seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(
                f"{module} did not end within evaluation.nemo_skills_timeout_seconds; its log is {log}"
            ) from error
        except OSError as error:
            raise ConfigError(f"evaluation.nemo_skills_python={python} cannot be started ({error.strerror})") from error
    if done.returncode:
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        raise EvaluationError(f"{module} ended with status {done.returncode}: {tail} (log: {log})")
