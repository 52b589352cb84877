"""Problem sets in this project's format from Hugging Face datasets and problem files: cleaned, de-duplicated, and
checked against evaluation sets."""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.progress import track

from dasd_megatron.config import VerifyConfig
from dasd_megatron.data.columns import (
    Columns,
    Remedies,
    Taken,
    find_problem,
    fold,
    parse_record,
    summaries,
    value_at,
)
from dasd_megatron.data.prompts import DataError, NoAnswerError, Problem, normalize_text, write_problems
from dasd_megatron.data.rows import Row, files_of, read_rows
from dasd_megatron.errors import first_line
from dasd_megatron.files import atomic_file, file_sha256
from dasd_megatron.verify.answers import normalize_answer

MANIFEST_FORMAT = 1
_REMEDIES = Remedies(
    "give --problem-field", "give --answer-field", "give --solution-field, or --allow-missing-solution"
)
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[-+*/^=<>%\u00d7\u00f7\u2212\u22c5]")


@dataclass(frozen=True)
class PrepareOptions:
    """The arguments of ``tools/prepare_data.py``, which the manifest repeats by these names. Either ``input`` or
    ``dataset`` is given."""

    input: Path | None
    dataset: str | None
    config: str | None
    split: str
    output: Path
    problem_field: str | None
    answer_field: str | None
    solution_field: str | None
    no_answer: list[str]
    allow_missing_solution: bool
    tokenizer: Path | None
    max_problem_tokens: int | None
    max_solution_tokens: int | None
    contamination: list[Path]
    ngram: int

    @property
    def source(self) -> str:
        """The file, or the name of the dataset."""
        return str(self.dataset or self.input)


def _source_rows(options: PrepareOptions) -> Iterator[Row]:
    if options.dataset is not None:
        return _dataset_rows(options.dataset, options.config, options.split)
    assert options.input is not None, "the arguments name a file or a dataset"
    return read_rows(options.input, "--input")


def _dataset_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    for index, record in enumerate(_load_dataset(name, config, split)):
        yield Row(f"{name} row {index}", index, dict(record))


def _load_dataset(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("--dataset needs the datasets package: pip install 'dasd-megatron[data]', or give an --input")
    import datasets

    try:
        if Path(name).is_dir() and (Path(name) / "state.json").exists():
            rows: Iterable[dict[str, Any]] = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split)
        return rows
    # datasets raises many classes for a name, a configuration or a split that does not exist, and for a hub that cannot
    # be reached.
    except Exception as error:
        raise DataError(f"--dataset {name} cannot be loaded ({first_line(error)})") from error


def words_of(text: str) -> list[str]:
    """Return words, numbers, mathematical signs, and single characters of scripts without spaces. Punctuation and case
    do not count."""
    return _WORD.findall(normalize_text(text))


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return every run of ``n`` words."""
    words = words_of(text)
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


class Contamination:
    """Evaluation problems. A training problem is in it if it repeats one: with the same text, or with ``n`` words in a
    row in common.

    Evaluation problems of fewer than ``n`` words are found by their whole text alone.
    """

    def __init__(self, paths: Sequence[Path], field: str | None, n: int) -> None:
        self.n = n
        self._texts: set[str] = set()
        self._ngrams: set[tuple[str, ...]] = set()
        self.problems = 0
        for path in paths:
            for row in read_rows(path, "--contamination"):
                if isinstance(row.value, DataError):
                    raise row.value
                # The field is one of the source, whose name an evaluation set need not share.
                chosen = None if field is None or value_at(row.value, field) is None else field
                self._add(find_problem(row.value, row.where, Columns(_REMEDIES, problem=chosen))[0])

    def _add(self, text: str) -> None:
        self.problems += 1
        self._texts.add(" ".join(words_of(text)))
        self._ngrams |= ngrams(text, self.n)

    def __contains__(self, text: str) -> bool:
        return " ".join(words_of(text)) in self._texts or not self._ngrams.isdisjoint(ngrams(text, self.n))


def _token_counter(path: Path) -> Callable[[str], int]:
    """Return a function that counts tokens with the tokenizer of a Hugging Face directory."""
    from dasd_megatron.models.hf_config import load_tokenizer

    tokenizer = load_tokenizer(path)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


class _Selection:
    """Selection, row by row, of what is kept.

    The rest may be nearly all of the rows, and goes to a file with the reasons.
    """

    def __init__(self, options: PrepareOptions, rejects: TextIO) -> None:
        self.kept: list[Problem] = []
        self.found: collections.Counter[Taken] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.first_fault = ""
        self._rejects = rejects
        self._count_tokens = _token_counter(options.tokenizer) if options.tokenizer is not None else None
        self.contamination = Contamination(options.contamination, options.problem_field, options.ngram)
        self._limits = {
            "problem": options.max_problem_tokens,
            "reference_solution": options.max_solution_tokens,
        }
        self._seen: dict[str, tuple[str, str]] = {}
        self._ids: set[str] = set()

    def add(self, where: str, problem: Problem, found: Taken) -> None:
        """Keep a problem, or reject it with the reason."""
        reason = self._reason_to_drop(problem)
        if reason is not None:
            self.reject(where, *reason)
            return
        self._seen[normalize_text(problem.problem)] = (where, problem.expected_answer)
        self._ids.add(problem.id)
        self.kept.append(problem)
        self.found[found] += 1

    def reject(self, where: str, reason: str, detail: str) -> None:
        """Write a row that is not kept, with the reason, and count it."""
        self.first_fault = self.first_fault or detail
        self.dropped[reason] += 1
        self._rejects.write(json.dumps({"where": where, "reason": reason, "detail": detail}) + "\n")

    def _reason_to_drop(self, problem: Problem) -> tuple[str, str] | None:
        key = normalize_text(problem.problem)
        if key in self._seen:
            where, answer = self._seen[key]
            same = normalize_answer(answer) == normalize_answer(problem.expected_answer)
            other = "" if same else f", which has the answer {answer!r} where this has {problem.expected_answer!r}"
            return "duplicate", f"the same problem as {where}{other}"
        if problem.problem in self.contamination:
            return "contamination", "stands in an evaluation set, or shares a run of words with it"
        for name, limit in self._limits.items():
            if limit is None or self._count_tokens is None:
                continue
            tokens = self._count_tokens(getattr(problem, name))
            if tokens > limit:
                return f"{name} too long", f"{tokens} tokens, over {limit}"
        if problem.id in self._ids:
            return "duplicate id", f"id {problem.id!r} was given before"
        return None


def prepare_problems(options: PrepareOptions) -> dict[str, Any]:
    """Write ``options.output``, and ``.rejected.jsonl`` and ``.manifest.json`` beside it, and return the manifest.

    Raises:
        DataError: the source cannot be read, nothing of it is kept, or the files cannot be written.
    """
    # A pattern may fit the files that are written.
    files = [] if options.input is None else files_of(options.input, "--input")
    try:
        with atomic_file(options.output.with_suffix(".rejected.jsonl")) as partial:
            with partial.open("w", encoding="utf-8") as rejects:
                selection = _select(options, rejects)
            if not selection.kept:
                count = selection.dropped.total()
                fault = f": {selection.first_fault}" if count else "; it is empty"
                raise DataError(f"nothing of {options.source} was kept ({count} rows dropped){fault}")
        write_problems(options.output, selection.kept)
        manifest = _make_manifest(options, selection, files)
        options.output.with_suffix(".manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise DataError(
            f"{options.output} cannot be written ({error.strerror or error}); give another --output"
        ) from error
    return manifest


def _select(options: PrepareOptions, rejects: TextIO) -> _Selection:
    """Read the source and return what is kept of it."""
    columns = Columns(
        _REMEDIES,
        options.problem_field,
        options.answer_field,
        options.solution_field,
        fold(options.no_answer),
        needs_solution=not options.allow_missing_solution,
        max_answer_chars=VerifyConfig().max_answer_chars,
    )
    selection = _Selection(options, rejects)
    for index, row in enumerate(track(_source_rows(options), description="reading")):
        name = f"{options.output.stem}-row-{index}"
        try:
            if isinstance(row.value, DataError):
                raise row.value
            problem, found = parse_record(row.value, row.where, name, columns)
        except DataError as error:
            reason = "no answer" if isinstance(error, NoAnswerError) else "unusable"
            selection.reject(row.where, reason, str(error))
            continue
        selection.add(row.where, problem, found)
    return selection


def _make_manifest(options: PrepareOptions, selection: _Selection, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "source": options.source,
        "source_sha256": _source_sha256(files) if files else None,
        "output_sha256": file_sha256(options.output),
        "kept": len(selection.kept),
        "dropped": dict(sorted(selection.dropped.items())),
        "found": list(summaries(selection.found)),
        "with_reference_solution": sum(bool(problem.reference_solution) for problem in selection.kept),
        "contamination_problems": selection.contamination.problems,
        "options": {name: _plain(value) for name, value in vars(options).items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [str(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _source_sha256(files: Sequence[Path]) -> str:
    """Return the hash of a file; of several the hash of their names and hashes."""
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()
