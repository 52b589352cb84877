"""Samples of a benchmark, streamed to disk as they finish, so that an evaluation that is killed goes on where it was.

A folder of results has these files:

- ``settings.json``: what the samples depend on.
- ``journal.jsonl``: every sample in the order in which they finished, while some are missing.
- ``output-rs<i>.jsonl``: the i-th sample of every problem in their order, once no sample is missing. These are
  NeMo-Skills' files. They are the same however often the evaluation was killed, if the server's answers depend on the
  requests alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import BatchConfig, Config, EvaluationConfig, RolloutConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.evaluation.health import measure, to_rows
from dasd_megatron.files import cannot_write, naming_path, replace_file, write_whole
from dasd_megatron.observability.progress import Phase, ProgressDisplay
from dasd_megatron.reading import (
    JsonLine,
    MalformedError,
    UnreadableError,
    check_shape,
    iterate_json_lines,
    read_json,
)
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.client import RolloutClient, sampling_params
from dasd_megatron.rollout.grading import make_samples
from dasd_megatron.samples import Sample, sampling_seed
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.steps import STEP_CHECKERS, StepChecker

SETTINGS, JOURNAL = "settings.json", "journal.jsonl"
# Safetensors files may have hundreds of gigabytes. Models that differ at all differ in their first or last mebibyte.
_DIGEST_BYTES = 2**20
# Samples that are all alike with less than this log-probability, e^-30, are the server's fault.
_IMPLAUSIBLE_LOG_PROB = -30.0

_RECORD_SHAPE = {
    **dict.fromkeys(("problem", "expected_answer", "generation", "problem_id", "finish_reason"), str),
    **dict.fromkeys(("symbolic_correct", "grading_timed_out"), bool),
    "predicted_answer": (None, str),
    "num_generated_tokens": int,
    "log_prob": float,
    "health?": {str: (bool, [float], float)},
}

Record = dict[str, Any]
"""A sample as a line of the files."""
Records = list[list[Record]]
"""[problem][sample]."""


class Place(NamedTuple):
    """A sample of a problem, both counted from 0."""

    problem: int
    sample: int


class EvaluationError(RuntimeError):
    """Results that cannot be used or must not be mixed. The message is one line that says which, why and what to do."""


def sample_record(sample: Sample, seed: int) -> Record:
    """Return the fields that are written of a sample: NeMo-Skills' fields, and behind them ours. None depends on the
    clock."""
    return {
        "problem": sample.problem,
        "expected_answer": sample.expected_answer,
        "generation": sample.text,
        "predicted_answer": sample.predicted_answer,
        "symbolic_correct": sample.reward > 0,
        "num_generated_tokens": len(sample.sampled),
        "problem_id": sample.problem_id,
        "sample": sample.sample,
        "sampling_seed": seed,
        "finish_reason": sample.finish_reason,
        "log_prob": float(sample.rollout_log_probs.sum(dtype=np.float64)),
        "grading_timed_out": sample.timed_out,
    }


def model_digest(path: Path) -> str:
    """Return the SHA-256 over a Hugging Face directory's files: their names, sizes, first and last mebibyte."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_DIGEST_BYTES))
            stream.seek(max(0, file.stat().st_size - _DIGEST_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def samples_per_request(evaluation: EvaluationConfig, rollout: RolloutConfig, batch: BatchConfig) -> int:
    """Return how many samples a request asks for: by default as many as in training."""
    return evaluation.samples_per_request or rollout.groups_per_request * batch.samples_per_group


def kept_date(root: Path, benchmarks: Sequence[str]) -> str | None:
    """Return the day that the prompts of samples in ``root`` show as today's; None where no samples have one."""
    for name in benchmarks:
        path = root / name / SETTINGS
        if path.exists():
            date = _read_settings(path).get("data.date")
            if isinstance(date, str):
                return date
    return None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = read_json(
            path, {str: object}, advice=f"remove {path.parent}, or give another run.dir"
        )
    except UnreadableError as error:
        raise EvaluationError(str(error)) from error
    return settings


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep a folder of results to one kind of sample: write ``settings``, or compare them with those that are there.

    Raises:
        EvaluationError: names the settings that differ, or results without any.
    """
    path = folder / SETTINGS
    if path.exists():
        found = _read_settings(path)
        names = [name for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(
                f"{name} was {_short(found.get(name))} and is {_short(settings.get(name))}" for name in names
            )
            raise EvaluationError(
                f"{folder} has samples of other settings ({differences}): remove it, or give another run.dir"
            )
        return
    if folder.exists() and any(folder.glob("output*.jsonl")):
        raise EvaluationError(
            f"{folder} has samples and no {SETTINGS} that says of what: remove it, or give another run.dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(settings, indent=2) + "\n")


class _Journal:
    """The samples that are on disk while others are missing, in the order in which they finished."""

    def __init__(self, file: FileIO, known: dict[Place, Record]) -> None:
        self._file, self.known = file, known

    def append(self, place: Place, record: Record) -> None:
        self.known[place] = record
        data = json.dumps({"place": place, **record}).encode() + b"\n"
        with naming_path(Path(self._file.name)):
            write_whole(self._file.fileno(), data)

    def sync(self) -> None:
        with naming_path(Path(self._file.name)):
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class _Benchmark:
    """The things that the samples of a benchmark are made of. ``problems`` and ``prompts`` run together."""

    config: Config
    problems: Sequence[Problem]
    prompts: Sequence[Sequence[int]]
    grader: Grader
    tokenizer: PreTrainedTokenizerBase
    checker: StepChecker | None


def sample_benchmark(
    config: Config,
    folder: Path,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    *,
    client: RolloutClient,
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    weight_version: str | None,
    display: ProgressDisplay,
) -> Records:
    """Draw what is missing of ``evaluation.samples`` samples of each problem, and write the final files.

    A request has the same rows in every run, whatever of them is on disk: an engine that decodes the rows of a request
    together may round otherwise in other company. Seeds depend on ``run.seed``, the problem's place and the sample
    alone.

    Args:
        folder: of this benchmark, after :func:`check_settings`.
        display: shows how many are drawn, the share of right ones among them and the time left.

    Raises:
        EvaluationError: all samples of every problem are the same.
        RolloutServerError: a server fails; what is on disk stays.
    """
    samples = config.evaluation.samples
    records = finished_samples(folder, problems, samples)
    if records is not None:
        return records
    known = _read_journal(folder / JOURNAL, problems, samples)
    places = [Place(problem, sample) for problem in range(len(problems)) for sample in range(samples)]
    if known:
        display.message(f"{folder.name}: {len(known)} of {len(places)} samples are there already")
    generator = None if config.evaluation.benchmarks else config.data.heldout.generator
    checker = None if generator is None else STEP_CHECKERS.get(generator)
    benchmark = _Benchmark(config, problems, prompts, grader, tokenizer, checker)
    with (
        _open_journal(folder / JOURNAL) as file,
        ThreadPoolExecutor(1) as writer,
        display.phase(folder.name, len(places) - len(known)) as phase,
    ):
        _draw_missing(benchmark, places, _Journal(file, known), client, weight_version, writer, phase)
    records = [[known[Place(problem, sample)] for sample in range(samples)] for problem in range(len(problems))]
    _check_distinct(folder, records, config.evaluation.temperature)
    for sample in range(samples):
        replace_file(folder / f"output-rs{sample}.jsonl", "".join(json.dumps(row[sample]) + "\n" for row in records))
    (folder / JOURNAL).unlink()
    return records


def _open_journal(path: Path) -> FileIO:
    # A buffer that a full disk does not take would be written again when the file is closed.
    with naming_path(path):
        return open(path, "ab", buffering=0)


def _draw_missing(
    benchmark: _Benchmark,
    places: Sequence[Place],
    journal: _Journal,
    client: RolloutClient,
    weight_version: str | None,
    writer: Executor,
    phase: Phase,
) -> None:
    """Ask for all requests that have a missing sample at once, and append the samples to the journal as they come."""
    config = benchmark.config
    size = samples_per_request(config.evaluation, config.rollout, config.batch)
    requests = [places[start : start + size] for start in range(0, len(places), size)]
    requests = [request for request in requests if any(place not in journal.known for place in request)]
    outcomes: list[bool] = []

    async def answer(request: Sequence[Place]) -> None:
        seeds = [sampling_seed(config.run.seed, "evaluation", *place) for place in request]
        completions = await client.generate(
            [benchmark.prompts[place.problem] for place in request],
            sampling_params(
                config.rollout, seeds, temperature=config.evaluation.temperature, top_p=config.evaluation.top_p
            ),
            weight_version=weight_version,
            rows_per_request=size,
        )
        # Grading runs in a thread of its own: an answer that takes seconds to grade must not hold up the others'
        # requests. The shield lets what has come be written even where another request fails.
        written = await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(
                writer, _grade_and_write, benchmark, journal, request, seeds, completions
            )
        )
        outcomes.extend(written)
        phase.advance(len(written), right=f"{sum(outcomes) / max(1, len(outcomes)):.1%}")

    async def answer_all() -> None:
        async with client, asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(answer(request))

    try:
        asyncio.run(answer_all())
    except BaseExceptionGroup as errors:
        raise _first_error(errors) from None


def _grade_and_write(
    benchmark: _Benchmark,
    journal: _Journal,
    request: Sequence[Place],
    seeds: Sequence[int],
    completions: Sequence[Completion],
) -> list[bool]:
    """Append the samples of a request that the journal lacks; return which of them are right."""
    drawn = make_samples(
        [benchmark.problems[place.problem] for place in request],
        [place.problem for place in request],
        [benchmark.prompts[place.problem] for place in request],
        completions,
        benchmark.grader,
        samples_per_group=1,
        tokenizer=benchmark.tokenizer,
        places=[place.sample for place in request],
    )
    health = to_rows(measure(drawn, benchmark.config.health, checker=benchmark.checker))
    outcomes: list[bool] = []
    for place, seed, sample, measured in zip(request, seeds, drawn, health, strict=True):
        if place in journal.known:
            continue
        record = sample_record(sample, seed) | {"health": measured}
        journal.append(place, record)
        outcomes.append(record["symbolic_correct"])
    journal.sync()
    return outcomes


def duplicate_share(records: Records) -> float:
    """Return the share of samples whose text an earlier sample of the same problem has."""
    repeated = sum(len(row) - len({record["generation"] for record in row}) for row in records)
    return repeated / sum(map(len, records))


def finished_samples(folder: Path, problems: Sequence[Problem], samples: int) -> Records | None:
    """Return the samples in a folder's final files; None where some are missing yet."""
    files = [folder / f"output-rs{sample}.jsonl" for sample in range(samples)]
    if (folder / JOURNAL).exists() or not all(file.exists() for file in files):
        return None
    columns = [_read_records(file) for file in files]
    for file, column in zip(files, columns, strict=True):
        if [record.get("problem_id") for record in column] != [problem.id for problem in problems]:
            raise EvaluationError(
                f"{file} does not have each problem once and in order: remove {folder} to sample anew"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def _read_records(file: Path) -> list[Record]:
    """Return the samples of a file, which have the fields of :func:`sample_record` and equal columns of health."""
    advice = f"remove {file.parent} to sample anew"
    records: list[Record] = []
    try:
        for line in iterate_json_lines(file, advice=advice):
            fault = line.problem or _record_fault(line.row, records[0] if records else line.row)
            if fault is not None:
                raise UnreadableError(file, f"line {line.number} is no sample ({fault})", advice)
            records.append(line.row)
    except UnreadableError as error:
        raise EvaluationError(str(error)) from error
    return records


def _record_fault(record: Record, first: Record) -> str | None:
    """Return what keeps a line from being a sample like ``first``; None if nothing does."""
    try:
        check_shape(record, _RECORD_SHAPE)
    except MalformedError as error:
        return str(error)
    if not all(map(math.isfinite, (record["log_prob"], record["num_generated_tokens"]))):
        return "log_prob is not finite"
    return None if _columns(record) == _columns(first) else "health has other columns than the first sample"


def _columns(record: Record) -> dict[str, int]:
    """Return the columns of a sample's health with their widths, 0 for a single value."""
    return {name: len(value) if isinstance(value, list) else 0 for name, value in record.get("health", {}).items()}


def _check_distinct(folder: Path, records: Records, temperature: float) -> None:
    """Refuse samples of which each is the same as the others of its problem, unless the policy is nearly certain."""
    if (
        temperature == 0
        or len(records[0]) == 1
        or any(len({record["generation"] for record in row}) > 1 for row in records)
    ):
        return
    # A policy without entropy says the same whatever the seed: this is the log-probability that it does.
    chance = sum(record["log_prob"] for row in records for record in row[1:])
    if chance < _IMPLAUSIBLE_LOG_PROB:
        raise EvaluationError(
            f"{folder}: at temperature {temperature:g} all {len(records[0])} samples of each problem are the same, so "
            "the server heeds no seed: write rollout.deterministic=true, or look at its settings, and remove the "
            "folder"
        )


def _read_journal(path: Path, problems: Sequence[Problem], samples: int) -> dict[Place, Record]:
    """Return the samples of a journal. The line that a kill has torn is cut off the file."""
    if not path.exists():
        return {}
    advice = f"remove {path.parent} to sample anew"
    known: dict[Place, Record] = {}
    torn = False
    try:
        for line in iterate_json_lines(path, advice=advice):
            torn = not line.is_whole
            if torn:
                break
            place = _place_of(line, problems, samples)
            if place is None:
                raise UnreadableError(path, f"line {line.number} is no sample of this evaluation", advice)
            del line.row["place"]
            known[place] = line.row
        if torn:
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    except UnreadableError as error:
        raise EvaluationError(str(error)) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    return known


def _place_of(line: JsonLine, problems: Sequence[Problem], samples: int) -> Place | None:
    """Return the place that a line of the journal is of, None where it is no sample of this evaluation."""
    if line.problem is not None or _record_fault(line.row, line.row) is not None:
        return None
    problem, sample = line.row["place"] if _is_pair(line.row.get("place")) else (-1, -1)
    if not 0 <= problem < len(problems) or not 0 <= sample < samples:
        return None
    return Place(problem, sample) if problems[problem].id == line.row["problem_id"] else None


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
