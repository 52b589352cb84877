"""Jinja templates of prompts: the user's files, and the chat templates of tokenizers.

Both are text that others may have written. An expression of theirs may fail, never end, or fill the memory, and already
reading a template computes its constants. So :mod:`dasd_megatron.data.render_process` tries a template in a process of
its own before it is used here. This module imports neither torch nor transformers, so that such a process starts fast.

A render depends on the template and its values alone: the date is one of them, and there is no randomness.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dasd_megatron.errors import first_line

MOST_CHARACTERS = 2**22
"""Characters of a rendered text at the most: prompts have no more tokens than a model has positions."""

LONGEST_SOURCE = 2**20
"""Characters of a template at the most; published chat templates have up to some ten thousand."""

_PROBE = "What is 1 + 1?"


class TemplateError(ValueError):
    """A template that cannot be read or rendered. The message names the file or function and the fix."""


class RenderError(Exception):
    """A failure inside a template. The message is one line: what failed, and in which line of the template.

    ``index``: of several values that were tried, the place of those that it failed on.
    """

    index = 0


@dataclass(frozen=True)
class MessageTemplate:
    """A Jinja file of the user's, with the names of the variables that it gets and must show, and those that it gets
    and may leave out, with the values that they can have."""

    source: str
    variables: Sequence[str]
    optional: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def inspect(self) -> dict[str, list[str]]:
        """Return the variables that the template reads and does not get (``unknown``), and those that it gets and does
        not show (``hidden``). Raises RenderError."""
        with _naming_failures():
            used = jinja2.meta.find_undeclared_variables(_MESSAGES.parse(self.source))
        unknown = sorted(used - {*self.variables, *self.optional})
        return {"unknown": unknown, "hidden": [] if unknown else [*filter(self._hides, self.variables)]}

    def _hides(self, variable: str) -> bool:
        # Both short and long text is tried, because a template may depend on the length, and so it may on the others.
        choices = itertools.product(*([(name, value) for value in values] for name, values in self.optional.items()))
        probes = [
            ({**dict.fromkeys(self.variables, "1" * length), **dict(choice)}, "2" * length)
            for choice in choices
            for length in (1, 1000)
        ]
        return all(self.render(probe) == self.render({**probe, variable: other}) for probe, other in probes)

    def render(self, values: dict[str, str]) -> str:
        """Return the text for these values of the variables. Raises RenderError."""
        with _naming_failures():
            return _bounded(self._compiled, values)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return _MESSAGES.from_string(self.source)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered as transformers does.

    values: special tokens and ``data.chat_template_kwargs``, by their names in the template. date: the day that
    ``strftime_now`` shows, as YYYY-MM-DD; None: the template fails where it asks for it.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    date: str | None = None

    @property
    def shows_date(self) -> bool:
        """True for a template that may show today's date."""
        return "strftime_now" in self.source

    def inspect(self) -> dict[str, list[str]]:
        """Return the names that the template reads (``reads``). Raises RenderError."""
        with _naming_failures():
            return {"reads": sorted(jinja2.meta.find_undeclared_variables(_CHATS.parse(self.source)))}

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the text of chat messages, each with a role and a content, and the beginning of the answer. Raises
        RenderError."""
        with _naming_failures():
            return self._render(messages, in_parts=self._wants_parts)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return _CHATS.from_string(self.source)

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """True for a template that shows text only in a list of parts, as those of vision-language models do."""
        return not self._shows_probe(in_parts=False) and self._shows_probe(in_parts=True)

    def _shows_probe(self, *, in_parts: bool) -> bool:
        try:
            text = self._render([{"role": "user", "content": _PROBE}], in_parts=in_parts)
            # A list that is printed as it stands shows its text too.
            return _PROBE in text and re.search("[\"']type[\"']", text) is None
        # A template runs its author's expressions. One that fails here fails on a message too, where it is named.
        except Exception:
            return False

    def _render(self, messages: Sequence[dict[str, str]], *, in_parts: bool) -> str:
        turns: Sequence[dict[str, Any]] = messages
        if in_parts:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        given = {
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": self._format_date,
        }
        return _bounded(self._compiled, {**self.values, **given})

    def _format_date(self, pattern: str) -> str:
        if self.date is None:
            raise jinja2.TemplateError("it shows today's date (strftime_now), and no date is given; write data.date")
        return datetime.datetime.fromisoformat(self.date).strftime(pattern)


def _bounded(template: jinja2.Template, values: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in template.generate(values):
        length += len(part)
        if length > MOST_CHARACTERS:
            raise jinja2.TemplateError(f"it gives more than {MOST_CHARACTERS:,} characters")
        parts.append(part)
    return "".join(parts)


@contextlib.contextmanager
def _naming_failures() -> Iterator[None]:
    """Turn whatever a template raises into a RenderError."""
    try:
        yield
    # A template runs its author's expressions, so anything can be raised: undefined names, errors of types, refusals of
    # the sandbox, or a lack of memory.
    except Exception as error:
        raise RenderError(_describe(error)) from error


def _describe(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {first_line(jinja2.TemplateError(error.message))}"
    if type(error) is jinja2.TemplateError:
        # By raise_exception, a template's author says for people what is wrong.
        return first_line(error)
    text = "it needs too much memory" if isinstance(error, MemoryError) else first_line(error)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f"{type(error).__name__}: {text}" + (f" (line {lines[-1]})" if lines else "")


class _GenerationTag(jinja2.ext.Extension):
    """The tag that marks the assistant's words for training, ``{% generation %}``. A prompt shows them as they are."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse_chance(*_values: object, **_options: object) -> NoReturn:
    raise jinja2.TemplateError("it draws at random, and a prompt has to be the same each time")


def _without_chance(environment: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    environment.filters["random"] = environment.globals["lipsum"] = _refuse_chance
    return environment


def _chat_environment() -> ImmutableSandboxedEnvironment:
    """Make the environment in which transformers renders chat templates; the tests compare the two."""
    environment = _without_chance(
        ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


_MESSAGES = _without_chance(ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False))
_CHATS = _chat_environment()
