"""Samples of one benchmark, streamed to disk as they finish, so that an evaluation that is killed goes on where it was.

A folder of results has ``settings.json``, what the samples depend on; ``journal.jsonl``, every sample in the order in
which they
finished, while some are missing; and ``output-rs<i>.jsonl``, the i-th sample of every problem in their order, once none
is. These last are NeMo-Skills' files, and the same however often the evaluation was killed, if the server's answers
depend on the requests alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.evaluation.health import measure, to_rows
from dasd_megatron.files import replace_file
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.client import Completion, RolloutClient, sampling_params, sampling_seed
from dasd_megatron.rollout.grading import make_samples
from dasd_megatron.samples import Sample
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.steps import STEP_CHECKERS

SETTINGS, JOURNAL = "settings.json", "journal.jsonl"
# Of safetensors files, which may have hundreds of gigabytes; two models that differ at all differ here and there.
_DIGEST_BYTES = 2**20

Records = list[list[dict[str, Any]]]
"""[problem][sample]: what is written of each sample."""


class EvaluationError(RuntimeError):
    """Results that cannot be used or must not be mixed. The message is one line that says which, why and what to do."""


def sample_record(sample: Sample, seed: int) -> dict[str, Any]:
    """What is written of a sample: NeMo-Skills' fields, and behind them ours. Nothing of it depends on the clock."""
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
        "log_prob": sum(sample.rollout_log_probs),
        "grading_timed_out": sample.timed_out,
    }


def model_digest(path: Path) -> str:
    """SHA-256 over a Hugging Face directory's files: their names, sizes, first and last mebibyte."""
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


def samples_per_request(config: Config) -> int:
    return config.evaluation.samples_per_request or config.rollout.groups_per_request * config.batch.samples_per_group


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep a folder of results to one kind of sample: write ``settings``, or compare them with those that are there.

    Raises:
        EvaluationError: names the settings that differ, or results without any.
    """
    path = folder / SETTINGS
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise EvaluationError(f"{path} is damaged ({error}): remove {folder}, or give another run.dir") from error
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
        EvaluationError: all samples of every problem are the same. RolloutServerError: a server fails; what is on disk stays.
    """
    samples = config.evaluation.samples
    records = finished_samples(folder, problems, samples)
    if records is not None:
        return records
    known = _read_journal(folder / JOURNAL, problems, samples)
    rows = [(problem, sample) for problem in range(len(problems)) for sample in range(samples)]
    size = samples_per_request(config)
    requests = [rows[start : start + size] for start in range(0, len(rows), size)]
    requests = [request for request in requests if any(row not in known for row in request)]
    there, right = len(known), []
    checker = None if config.evaluation.benchmarks else STEP_CHECKERS.get(config.data.heldout.generator)
    if there:
        display.message(f"{folder.name}: {there} of {len(rows)} samples are there already")
    with (
        open(folder / JOURNAL, "ab") as journal,
        ThreadPoolExecutor(1) as writer,
        display.phase(folder.name, len(rows) - there) as phase,
    ):

        def write(request: list[tuple[int, int]], seeds: list[int], completions: list[Completion]) -> list[bool]:
            drawn = make_samples(
                [problems[problem] for problem, _ in request],
                [problem for problem, _ in request],
                [prompts[problem] for problem, _ in request],
                completions,
                grader,
                samples_per_group=1,
                tokenizer=tokenizer,
                places=[sample for _, sample in request],
            )
            health = to_rows(measure(drawn, config.health, checker=checker))
            written = []
            for row, seed, sample, measured in zip(request, seeds, drawn, health, strict=True):
                if row in known:
                    continue
                known[row] = sample_record(sample, seed) | {"health": measured}
                journal.write(json.dumps({"place": row, **known[row]}).encode() + b"\n")
                journal.flush()
                written.append(known[row]["symbolic_correct"])
            os.fsync(journal.fileno())
            right.extend(written)
            return written

        async def answer(request: list[tuple[int, int]]) -> None:
            seeds = [sampling_seed(config.run.seed, "evaluation", *row) for row in request]
            completions = await client.generate(
                [prompts[problem] for problem, _ in request],
                sampling_params(
                    config.rollout, seeds, temperature=config.evaluation.temperature, top_p=config.evaluation.top_p
                ),
                weight_version=weight_version,
                rows_per_request=size,
            )
            # In a thread of its own: an answer that takes seconds to grade must not hold up the others' requests.
            # Shielded: what has come is written even where another request fails.
            written = await asyncio.shield(
                asyncio.get_running_loop().run_in_executor(writer, write, request, seeds, completions)
            )
            phase.advance(len(written), right=f"{sum(right) / max(1, len(right)):.1%}")

        async def answer_all() -> None:
            async with client, asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(answer(request))

        try:
            asyncio.run(answer_all())
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from None
    records = [[known[problem, sample] for sample in range(samples)] for problem in range(len(problems))]
    _check_distinct(folder, records, config.evaluation.temperature)
    for sample in range(samples):
        replace_file(folder / f"output-rs{sample}.jsonl", "".join(json.dumps(row[sample]) + "\n" for row in records))
    (folder / JOURNAL).unlink()
    return records


def duplicate_share(records: Records) -> float:
    """Share of samples whose text another sample of the same problem has before them."""
    repeated = sum(len(row) - len({record["generation"] for record in row}) for row in records)
    return repeated / sum(map(len, records))


def finished_samples(folder: Path, problems: Sequence[Problem], samples: int) -> Records | None:
    """The samples in a folder's final files; None where some are missing yet."""
    files = [folder / f"output-rs{sample}.jsonl" for sample in range(samples)]
    if (folder / JOURNAL).exists() or not all(file.exists() for file in files):
        return None
    columns = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    for file, column in zip(files, columns, strict=True):
        if [record.get("problem_id") for record in column] != [problem.id for problem in problems]:
            raise EvaluationError(
                f"{file} does not have each problem once and in order: remove {folder} to sample anew"
            )
    return [list(row) for row in zip(*columns, strict=True)]


# Of samples that are all alike without the server's fault: e^-30.
_IMPLAUSIBLE_LOG_PROB = -30.0


def _check_distinct(folder: Path, records: Records, temperature: float) -> None:
    if (
        temperature == 0
        or len(records[0]) == 1
        or any(len({record["generation"] for record in row}) > 1 for row in records)
    ):
        return
    # A policy without entropy says the same whatever the seed.
    chance = sum(record["log_prob"] for row in records for record in row[1:])
    if chance < _IMPLAUSIBLE_LOG_PROB:
        raise EvaluationError(
            f"{folder}: at temperature {temperature:g} all {len(records[0])} samples of each problem are the same, so "
            "the server heeds no seed: write rollout.deterministic=true, or look at its settings, and remove the "
            "folder"
        )


def _read_journal(path: Path, problems: Sequence[Problem], samples: int) -> dict[tuple[int, int], dict[str, Any]]:
    """The samples of a journal, which loses the line that a kill has torn."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    os.truncate(path, whole)
    known = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            problem, sample = record.pop("place")
            sound = problems[problem].id == record["problem_id"] and 0 <= sample < samples
        except (ValueError, LookupError, TypeError):
            sound = False
        if not sound:
            raise EvaluationError(
                f"{path} line {number} is no sample of this evaluation: remove {path.parent} to sample anew"
            )
        known[problem, sample] = record
    return known


def _first_error(errors: BaseExceptionGroup) -> BaseException:
    first = errors.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
