"""Examples of supervised fine-tuning from a file (``warm_start.path``): prompts, and the responses to be learnt."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dasd_megatron.data.privileged import Privileged, unknown_token_id
from dasd_megatron.data.prompt_checks import chat_texts, foreign_token, text_without_token
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.render_process import RenderProcess
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.rows import Number, Row, read_rows
from dasd_megatron.data.templates import (
    Arguments,
    Message,
    PromptRenderer,
    message_fault,
    student_arguments,
    teacher_arguments,
)
from dasd_megatron.files import atomic_file
from dasd_megatron.reading import is_unicode, read_written

SETTING = "warm_start.path"
# A loss of float32 keeps its precision with these.
_LEAST_WEIGHT, _LARGEST_WEIGHT = 1e-6, 1e6
_ROWS_AT_ONCE = 256
_FORMS = "a prompt (text or chat messages), or a problem, maybe with a privileged text"
_WRITTEN = {"prompt_ids": [int], "response_ids": [int], "weight": float}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to be learnt, as token ids.

    ``response`` has the end-of-sequence token. ``weight``: of each of its tokens in the mean of the loss.
    """

    prompt: array[int]
    response: array[int]
    weight: float


class _Source(NamedTuple):
    """A row of the file, before anything is rendered."""

    where: str
    prompt: Message | None
    problem: str
    privileged: str | None
    response: str
    weight: float

    @property
    def kind(self) -> str:
        return "student" if self.privileged is None else "teacher"

    @property
    def arguments(self) -> Arguments:
        """The arguments of the template or function that makes the message of ``problem``."""
        problem = Problem(self.where, self.problem, "", "")
        if self.privileged is None:
            return student_arguments(problem)
        return teacher_arguments(problem, Privileged("solution", self.privileged))


def load_examples(path: Path, renderer: PromptRenderer, *, vocab_size: int, max_tokens: int) -> list[Example]:
    """Read the examples of a file, in its order.

    :func:`dasd_megatron.data.rows.read_rows` says which files there are. A row has these fields, and others are left
    alone:

    - ``prompt``: a text, which is one user turn, or chat messages. It goes through the tokenizer's chat template as
      the student's message does, and through no other template.
    - or ``problem``, which goes through the student's template, and with ``privileged`` through the teacher's.
    - ``response``: the text to be learnt. The end-of-sequence token follows it.
    - ``weight``: between 1e-6 and 1e6, and 1 where it is absent.

    Args:
        renderer: makes the prompts. Templates are tried in a process with limits before.
        vocab_size: tokens of the model.
        max_tokens: the model's positions.

    Raises:
        DataError, TemplateError: the file cannot be read or has no row, or a row is no example that the model can
            learn. The message names the file, the line and the field.
    """
    examples: list[Example] = []
    sources = (_parse(row) for row in read_rows(path, SETTING))
    unknown_id = unknown_token_id(renderer.tokenizer)
    with RenderProcess() as process:
        for some in _chunks(sources, _ROWS_AT_ONCE):
            messages = _messages(some, renderer, process)
            texts = chat_texts(messages, [f"{SETTING}: {source.where}" for source in some], renderer, process)
            for source, message, text in zip(some, messages, texts, strict=True):
                example = Example(
                    array("i", renderer.encode(text)), array("i", _response_ids(source, renderer)), source.weight
                )
                _check_tokens(source, message, example, renderer, vocab_size, max_tokens, unknown_id)
                examples.append(example)
    if not examples:
        raise DataError(f"{SETTING}: {path} holds no examples; give rows with {_FORMS}, and a response")
    return examples


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as JSON lines, which :func:`read_examples` reads back. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for example in examples:
            values = (example.prompt.tolist(), example.response.tolist(), example.weight)
            file.write(json.dumps(dict(zip(_WRITTEN, values, strict=True))) + "\n")


def read_examples(path: Path) -> list[Example]:
    """Return the examples that :func:`write_examples` has written, as they were.

    Raises:
        UnreadableError: the file is missing or damaged.
    """

    def make(row: dict[str, Any]) -> Example:
        prompt, response, weight = (row[name] for name in _WRITTEN)
        # An integer that is no token id does not fit into the array.
        return Example(array("i", prompt), array("i", response), weight)

    return read_written(path, _WRITTEN, make)


def _chunks(sources: Iterator[_Source], size: int) -> Iterator[list[_Source]]:
    while chunk := list(itertools.islice(sources, size)):
        yield chunk


def _parse(row: Row) -> _Source:
    if isinstance(row.value, DataError):
        raise DataError(f"{SETTING}: {row.value}") from row.value
    # Parquet has a null where a row lacks a field.
    record = {name: value for name, value in row.value.items() if value is not None}
    where = row.where
    if ("prompt" in record) == ("problem" in record):
        found = "both prompt and problem" if "prompt" in record else "neither prompt nor problem"
        raise DataError(f"{SETTING}: {where}: {found}; write {_FORMS}")
    privileged = record.get("privileged")
    if privileged is not None and "problem" not in record:
        raise DataError(
            f"{SETTING}: {where}: privileged goes with problem, through the teacher's template; write the whole "
            "prompt, or problem and privileged"
        )
    prompt: Message | None = None
    if "prompt" in record:
        prompt = record["prompt"]
        fault = message_fault(prompt)
        if fault is not None:
            raise DataError(
                f"{SETTING}: {where}: prompt is {fault}; write text, or chat messages like [{{'role': 'user', "
                "'content': 'text'}]"
            )
        if not isinstance(prompt, str):
            prompt = [{name: turn[name] for name in ("role", "content")} for turn in prompt]
    return _Source(
        where=where,
        prompt=prompt,
        problem="" if prompt is not None else _text(record, "problem", where),
        privileged=None if privileged is None else _text(record, "privileged", where),
        response=_text(record, "response", where),
        weight=_weight(record.get("weight", 1), where),
    )


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        found = "absent or empty" if value is None or isinstance(value, str) else f"{value!r:.80} and no text"
        raise DataError(f"{SETTING}: {where}: {field} is {found}; write a text")
    if not is_unicode(value):
        raise DataError(f"{SETTING}: {where}: {field} has half of a surrogate pair, which is no text; take it out")
    return value


def _weight(value: Any, where: str) -> float:
    number = value.text if isinstance(value, Number) else value
    try:
        # A boolean is an integer to Python.
        weight = math.nan if isinstance(value, (bool, str)) else float(number)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not _LEAST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise DataError(
            f"{SETTING}: {where}: weight is {number!r:.80}; write a number between {_LEAST_WEIGHT:g} and "
            f"{_LARGEST_WEIGHT:g}, or leave it out for 1"
        )
    return weight


def _messages(sources: Sequence[_Source], renderer: PromptRenderer, process: RenderProcess) -> list[Message]:
    """Return the message of each row. Templates are tried in ``process`` before they are rendered here."""
    for kind in ("student", "teacher"):
        arguments = [source.arguments for source in sources if source.prompt is None and source.kind == kind]
        renderer.makers[kind].try_messages(process, arguments)
    return [
        renderer.makers[source.kind].message(*source.arguments) if source.prompt is None else source.prompt
        for source in sources
    ]


def _response_ids(source: _Source, renderer: PromptRenderer) -> list[int]:
    ids: list[int] = renderer.tokenizer.encode(source.response, add_special_tokens=False)
    return [*ids, renderer.tokenizer.eos_token_id]


def _check_tokens(
    source: _Source,
    message: Message,
    example: Example,
    renderer: PromptRenderer,
    vocab_size: int,
    max_tokens: int,
    unknown_id: int | None,
) -> None:
    """Refuse tokens that the model does not have, text without a token, and examples over the model's positions."""
    where, prompt_field = f"{SETTING}: {source.where}", "problem" if source.prompt is None else "prompt"
    if not example.prompt:
        raise TemplateError(f"{where}: {prompt_field} gives a prompt without tokens; write one")
    for field, ids, texts in (
        (prompt_field, example.prompt, message),
        ("response", example.response, source.response),
    ):
        fault = foreign_token(ids, renderer.tokenizer, vocab_size)
        if fault is not None:
            raise DataError(f"{where}: {field} has {fault}")
        unknown = None if unknown_id is None else text_without_token(texts, renderer.tokenizer, unknown_id)
        if unknown is not None:
            raise DataError(
                f"{where}: {field} has {unknown}, for which the tokenizer has no token; use a model with a larger "
                "vocabulary, or remove the row"
            )
    if len(example.prompt) + len(example.response) > max_tokens:
        raise DataError(
            f"{where}: a prompt of {len(example.prompt)} and a response of {len(example.response)} tokens, its end "
            f"included, are over the model's max_position_embeddings={max_tokens}; shorten them, or remove the row"
        )
