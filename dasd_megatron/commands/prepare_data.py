"""Problem sets in our format from Hugging Face datasets, JSONL or Parquet: cleaned, de-duplicated, and checked against
evaluation sets."""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prompts import DataError, Problem, normalize_text, parse_line, parse_record, write_problems
from dasd_megatron.errors import first_line

MANIFEST_FORMAT = 1
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[-+*/^=<>%\u00d7\u00f7\u2212\u22c5]")


def read_rows(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(where, record) of every row of the source; a row that is no record comes as the error that says why."""
    if options.dataset is not None:
        for index, record in enumerate(_load_dataset(options)):
            yield f"{options.dataset} row {index}", dict(record)
    elif options.input.suffix == ".parquet":
        _require_datasets("a Parquet file")
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(options.input)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{options.input} cannot be read as Parquet ({first_line(error)}); give another --input"
            ) from error
        index = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                yield f"{options.input} row {index}", record
                index += 1
    else:
        if not options.input.is_file():
            raise DataError(f"{options.input} is not a file; give the path of a JSONL or Parquet file")
        with open(options.input, "rb") as file:
            for index, line in enumerate(file):
                where = f"{options.input} line {index + 1}"
                try:
                    record = parse_line(line, where, index)
                except DataError as error:
                    yield where, error
                    continue
                if record is not None:
                    yield where, record


def _require_datasets(what: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{what} needs the datasets package: pip install 'dasd-megatron[data]', or give a JSONL file")


def _load_dataset(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    _require_datasets("--dataset")
    import datasets

    try:
        if Path(options.dataset).is_dir() and (Path(options.dataset) / "state.json").exists():
            return datasets.load_from_disk(options.dataset)
        return datasets.load_dataset(options.dataset, options.config, split=options.split)
    # datasets raises many classes for a name, a configuration or a split that does not exist, and for a hub that cannot
    # be reached.
    except Exception as error:
        raise DataError(f"--dataset {options.dataset} cannot be loaded ({first_line(error)})") from error


def words_of(text: str) -> list[str]:
    """Words, numbers, mathematical signs, and single characters of scripts without spaces; punctuation and case do not
    count."""
    return _WORD.findall(normalize_text(text))


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


class Contamination:
    """Evaluation problems, and whether a training problem repeats one: the same text, or ``n`` words in a row in
    common.

    Short evaluation problems, of fewer than ``n`` words, are found by their whole text alone.
    """

    def __init__(self, paths: list[Path], field: str, n: int) -> None:
        self.n = n
        self._texts: set[str] = set()
        self._ngrams: set[tuple[str, ...]] = set()
        self.problems = 0
        for path in paths:
            for where, record in read_rows(argparse.Namespace(dataset=None, input=path)):
                if isinstance(record, DataError):
                    raise record
                text = next(
                    (record[name] for name in (field, "problem", "question") if isinstance(record.get(name), str)), None
                )
                if text is None:
                    raise DataError(
                        f"{where}: none of {field}, problem and question is there as text; set --problem-field"
                    )
                self.problems += 1
                self._texts.add(" ".join(words_of(text)))
                self._ngrams |= ngrams(text, n)

    def __contains__(self, text: str) -> bool:
        return " ".join(words_of(text)) in self._texts or not self._ngrams.isdisjoint(ngrams(text, self.n))


def token_counter(path: Path | None) -> Callable[[str], int] | None:
    """Counts tokens with the tokenizer of a Hugging Face directory."""
    if path is None:
        return None
    from dasd_megatron.models.hf_config import load_tokenizer

    tokenizer = load_tokenizer(path)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write ``options.output``, ``.rejected.jsonl`` and ``.manifest.json`` beside it; returns the manifest.

    Raises:
        DataError: the source cannot be read, or nothing of it is kept.
    """
    source = DataSourceConfig(
        problem_field=options.problem_field, answer_field=options.answer_field, solution_field=options.solution_field
    )
    count_tokens = token_counter(options.tokenizer)
    contamination = Contamination(options.contamination, options.problem_field, options.ngram)
    kept: list[Problem] = []
    rejected: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    ids: set[str] = set()
    stem = options.output.stem

    def reason_to_drop(problem: Problem) -> tuple[str, str] | None:
        key = normalize_text(problem.problem)
        if key in seen:
            return "duplicate", f"the same problem as {seen[key]}"
        if problem.problem in contamination:
            return "contamination", "stands in an evaluation set, or shares a run of words with it"
        for name, limit in (
            ("problem", options.max_problem_tokens),
            ("reference_solution", options.max_solution_tokens),
        ):
            if limit is not None and count_tokens is not None:
                tokens = count_tokens(getattr(problem, name))
                if tokens > limit:
                    return f"{name} too long", f"{tokens} tokens, over {limit}"
        return None

    for index, (where, record) in enumerate(track(read_rows(options), description="reading")):
        try:
            if isinstance(record, DataError):
                raise record
            problem = parse_record(
                record, where, f"{stem}-row-{index}", source, "--", needs_solution=not options.allow_missing_solution
            )
        except DataError as error:
            rejected.append({"where": where, "reason": "unusable", "detail": str(error)})
            continue
        drop = reason_to_drop(problem)
        if drop is None and problem.id in ids:
            drop = ("duplicate id", f"id {problem.id!r} was given before")
        if drop is not None:
            rejected.append({"where": where, "reason": drop[0], "detail": drop[1]})
            continue
        seen[normalize_text(problem.problem)] = where
        ids.add(problem.id)
        kept.append(problem)
    if not kept:
        first = f": {rejected[0]['detail']}" if rejected else "; it is empty"
        raise DataError(f"nothing of {options.dataset or options.input} was kept ({len(rejected)} rows dropped){first}")
    write_problems(options.output, kept)
    rejects = options.output.with_suffix(".rejected.jsonl")
    rejects.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected), encoding="utf-8")
    manifest = {
        "format": MANIFEST_FORMAT,
        "source": str(options.dataset or options.input),
        "source_sha256": None if options.dataset is not None else _file_sha256(options.input),
        "output_sha256": _file_sha256(options.output),
        "kept": len(kept),
        "dropped": dict(sorted(collections.Counter(entry["reason"] for entry in rejected).items())),
        "with_reference_solution": sum(bool(problem.reference_solution) for problem in kept),
        "contamination_problems": contamination.problems,
        "options": {
            name: [str(part) for part in value]
            if isinstance(value, list)
            else str(value)
            if isinstance(value, Path)
            else value
            for name, value in vars(options).items()
        },
    }
    options.output.with_suffix(".manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> None:
    """Run ``tools/prepare_data.py``.

    Raises:
        DataError, ConfigError: with one line on what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="JSONL or Parquet file")
    source.add_argument("--dataset", help="name of a Hugging Face dataset, or a directory that save_to_disk wrote")
    parser.add_argument("--config", help="configuration of --dataset, like 'main' of gsm8k")
    parser.add_argument("--split", default="train", help="split of --dataset (default: train)")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--problem-field", default="problem", help="column of the problem's text")
    parser.add_argument(
        "--answer-field", default="expected_answer", help="column of the final answer; GSM8K's 'answer' works too"
    )
    parser.add_argument("--solution-field", default="reference_solution", help="column of the worked solution")
    parser.add_argument("--allow-missing-solution", action="store_true", help="keep problems without a worked solution")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory whose tokenizer counts the lengths")
    parser.add_argument("--max-problem-tokens", type=int, help="drop longer problems")
    parser.add_argument("--max-solution-tokens", type=int, help="drop problems with a longer solution")
    parser.add_argument(
        "--contamination",
        type=Path,
        nargs="*",
        default=[],
        help="evaluation sets; problems that repeat one are dropped",
    )
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that count as a repetition (default: 13)")
    options = parser.parse_args(arguments)
    if (options.max_problem_tokens or options.max_solution_tokens) and options.tokenizer is None:
        raise DataError("--max-problem-tokens and --max-solution-tokens count tokens: give --tokenizer DIRECTORY")
    if options.ngram < 1:
        raise DataError(f"--ngram {options.ngram}: give 1 or more")
    if options.output.exists():
        raise DataError(f"{options.output} exists; remove it, or give another --output")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(options.output.parent, os.W_OK):
        raise DataError(f"{options.output.parent} cannot be written to; give another --output")
    manifest = prepare(options)
    print(f"kept {manifest['kept']} in {options.output}")
    for reason, count in manifest["dropped"].items():
        print(f"dropped {count}: {reason}")
    if manifest["dropped"]:
        print(f"each with its row in {options.output.with_suffix('.rejected.jsonl')}")
