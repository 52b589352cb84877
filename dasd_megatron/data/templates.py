"""Prompts: the student's and the teacher's message, and their token ids.

A message comes from a Jinja template or from a function of the user's. Where the tokenizer has a chat template, the
message goes through it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dasd_megatron.config import FUNCTION_PATH, PRIVILEGED_SOURCES, DataConfig, TeacherConfig
from dasd_megatron.data.privileged import Privileged
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.render_process import RenderProcess, text_digest
from dasd_megatron.data.rendering import (
    LONGEST_SOURCE,
    ChatTemplate,
    MessageTemplate,
    RenderError,
    TemplateError,
)
from dasd_megatron.plugins import call_own, load_function
from dasd_megatron.reading import UnreadableError, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = Path(__file__).with_name("templates")

Message = str | list[dict[str, str]]
"""One user turn as text, or all turns as chat messages, each with a role and a content."""
OptionalVariables = Mapping[str, Sequence[str]]
"""Variables that a message may show or not, with the values that they can have."""
Arguments = tuple[Problem, *tuple[str, ...]]
"""A problem; for the teacher also the privileged text and the name of its source."""


class MessageMaker(Protocol):
    """Source of messages: a template file or a function."""

    def describe(self, problem: Problem) -> str:
        """Return the setting, the file or function, and the problem, for the head of an error."""

    def message(self, problem: Problem, *privileged: str) -> Message:
        """Return the message for a problem; the teacher's gets the privileged text and its source too."""

    def try_messages(self, process: RenderProcess, arguments: Sequence[Arguments]) -> list[str]:
        """Return the :func:`message_digest` of what :meth:`message` gives for each of ``arguments``. A template is
        rendered in ``process``, before it is anywhere else."""


class PromptRenderer:
    """Token ids of the student's prompt (the problem) and of the teacher's (the problem and privileged information).

    A text goes through ``tokenizer``'s chat template as one user turn, followed by the generation prompt. A tokenizer
    without a chat template encodes the text and a newline, with its beginning-of-sequence token if it adds one and
    without an end-of-sequence token. A function may give chat messages instead, for a tokenizer with a chat template.

    Templates that others have written are bounded by :func:`~dasd_megatron.data.prompt_checks.check_prompts`, which
    comes before any other use of a renderer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        student_template: a Jinja file with ``{{ problem }}``, the name of a shipped one (``student_math.jinja``), a
            function's path (``module:function``), or None for the problem as it is. The function gets the problem with
            its answer and solution empty.
        teacher_template: the same with ``{{ problem }}``, ``{{ privileged }}`` and, if wanted, ``{{ source }}``, the
            name of the text's source; the function gets the problem and the privileged text, and the source as
            ``source=`` if it has such a parameter. None for ``teacher.jinja``.
        date: the day that a chat template shows as today's, YYYY-MM-DD; None for templates that show none.
        chat_template_kwargs: further variables of the chat template.

    Raises:
        TemplateError: a template is missing, unreadable or not Jinja, uses other variables, or does not show what it
            must.
        ConfigError: a function that cannot be found.
    """

    def __init__(
        self,
        tokenizer: Any,
        student_template: str | Path | None = None,
        teacher_template: str | Path | None = None,
        *,
        date: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.warnings: list[str] = []
        """What the user has been told of the chat template."""
        self.chat = chat_template(tokenizer, self.chat_template_kwargs, date)
        """None for a tokenizer without a chat template."""
        self.makers: dict[str, MessageMaker] = {
            "student": _make_template(student_template or "student.jinja", ("problem",), {}, "data.template"),
            "teacher": _make_template(
                teacher_template or "teacher.jinja",
                ("problem", "privileged"),
                {"source": PRIVILEGED_SOURCES},
                "teacher.template",
            ),
        }

    def student(self, problem: Problem) -> list[int]:
        """Return the token ids of the prompt that the policy answers."""
        return self._prompt("student", student_arguments(problem))

    def teacher(self, problem: Problem, shown: Privileged) -> list[int]:
        """Return the token ids of the same prompt with a privileged text."""
        return self._prompt("teacher", teacher_arguments(problem, shown))

    def _prompt(self, kind: str, arguments: Arguments) -> list[int]:
        message, where = self.makers[kind].message(*arguments), self.makers[kind].describe(arguments[0])
        try:
            return self.encode(self.text(message, where))
        except RenderError as error:
            raise self.refusal(message, where, error) from error

    def text(self, message: Message, where: str) -> str:
        """Return the prompt's text. ``where`` is the head of an error.

        Raises:
            RenderError: the chat template fails; :meth:`refusal` has the words for it.
            TemplateError: chat messages for a tokenizer without a chat template.
        """
        if self.chat is not None:
            return self.chat.render(turns_of(message))
        if not isinstance(message, str):
            raise TemplateError(
                f"{where} gave chat messages, and the tokenizer has no chat template; return text instead"
            )
        return message + "\n"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt's text."""
        if self.chat is not None:
            encoded: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return encoded
        ids: list[int] = self.tokenizer(text)["input_ids"]
        # A prompt is open-ended, but some tokenizers are set to close every text.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def refusal(self, message: Message, where: str, error: RenderError) -> TemplateError:
        """Return the error that says that the chat template fails on a message."""
        if isinstance(message, str):
            return TemplateError(
                f"the tokenizer's own chat template fails on a single user turn: {error}; mend chat_template in the "
                "tokenizer's files"
            )
        roles = ", ".join(turn["role"] for turn in message)
        return TemplateError(
            f"{where}: the tokenizer's own chat template fails on its messages ({roles}): {error}; return messages "
            "that it takes"
        )


def student_arguments(problem: Problem) -> Arguments:
    """Return what the maker of the student's message is called with. An answer that is taken out cannot leak into the
    prompt by mistake."""
    return (dataclasses.replace(problem, expected_answer="", reference_solution=""),)


def teacher_arguments(problem: Problem, shown: Privileged) -> Arguments:
    """Return what the maker of the teacher's message is called with."""
    return problem, shown.text, shown.source


def turns_of(message: Message) -> list[dict[str, str]]:
    """Return the chat messages that a message stands for."""
    return [{"role": "user", "content": message}] if isinstance(message, str) else message


def message_digest(message: Message) -> str:
    """Return a digest that two messages share only if they are the same."""
    return text_digest(message if isinstance(message, str) else json.dumps(message))


def chat_template(tokenizer: Any, kwargs: Mapping[str, Any], date: str | None) -> ChatTemplate | None:
    """Return the chat template of a tokenizer, by default; None where it has none.

    Raises:
        TemplateError: it has several and no default, or one that is no text.
    """
    source = tokenizer.chat_template
    if source is None:
        return None
    if isinstance(source, dict):
        if "default" not in source:
            raise TemplateError(
                f"the tokenizer's chat template: there are several ({', '.join(sorted(source))}) and none is named "
                "default; call one of them default in the tokenizer's files"
            )
        source = source["default"]
    if not isinstance(source, str):
        raise TemplateError(f"the tokenizer's chat template is {source!r:.80} and no text; mend the tokenizer's files")
    if len(source) > LONGEST_SOURCE:
        raise TemplateError(
            f"the tokenizer's chat template has {len(source):,} characters, over {LONGEST_SOURCE:,}; mend the "
            "tokenizer's files"
        )
    # Some tokenizers have objects of the tokenizers library among their special tokens, which stand for their text.
    special = json.loads(json.dumps(dict(tokenizer.special_tokens_map), default=str))
    return ChatTemplate(source, {**special, **kwargs}, date)


def make_renderer(data: DataConfig, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """Return the renderer that the configuration asks for. Raises as :class:`PromptRenderer`."""
    return PromptRenderer(
        tokenizer,
        data.template,
        teacher.template,
        date=data.date,
        chat_template_kwargs=data.chat_template_kwargs,
    )


def is_function(template: str | Path | None) -> bool:
    """Return True where a setting of a template names a function, and not a file."""
    return template is not None and FUNCTION_PATH.fullmatch(str(template)) is not None


def _make_template(
    path: str | Path, variables: tuple[str, ...], optional: OptionalVariables, setting: str
) -> MessageMaker:
    if is_function(path):
        return _Function(str(path), variables, optional, setting)
    return _Template(path, variables, optional, setting)


class _Template:
    """A template file, checked when it is read."""

    def __init__(self, path: str | Path, variables: tuple[str, ...], optional: OptionalVariables, setting: str) -> None:
        self.setting, self.variables = setting, (*variables, *optional)
        self.path = self._find(Path(path), setting)
        try:
            source = read_text(self.path, advice="give a readable UTF-8 file", limit=LONGEST_SOURCE)
        except UnreadableError as error:
            raise TemplateError(f"{setting}: {error}") from error
        self._template = MessageTemplate(source, variables, optional)
        self._inspect()

    def _inspect(self) -> None:
        try:
            if self.path.parent == SHIPPED:
                found = self._template.inspect()
            else:
                with RenderProcess() as process:
                    found = process.inspect(self._template)
        except RenderError as error:
            raise TemplateError(f"{self.setting}: {self.path} fails to render: {error}; fix the template") from error
        if found["unknown"]:
            allowed = " and ".join(f"{{{{ {variable} }}}}" for variable in self.variables)
            raise TemplateError(
                f"{self.setting}: {self.path} uses the unknown variable {{{{ {found['unknown'][0]} }}}}; only "
                f"{allowed} can be used here"
            )
        if found["hidden"]:
            raise TemplateError(
                f"{self.setting}: {self.path} does not show {{{{ {found['hidden'][0]} }}}}; add it to the template"
            )

    def describe(self, problem: Problem) -> str:
        return f"{self.setting}: {self.path} on problem {problem.id!r}"

    def message(self, problem: Problem, *privileged: str) -> str:
        try:
            return self._template.render(self._values(problem, *privileged))
        except RenderError as error:
            raise self._failure(problem, error) from error

    def try_messages(self, process: RenderProcess, arguments: Sequence[Arguments]) -> list[str]:
        try:
            return process.digests(self._template, [self._values(*given) for given in arguments])
        except RenderError as error:
            raise self._failure(arguments[error.index][0], error) from error

    def _values(self, problem: Problem, *privileged: str) -> dict[str, str]:
        return dict(zip(self.variables, (problem.problem, *privileged), strict=True))

    def _failure(self, problem: Problem, error: RenderError) -> TemplateError:
        return TemplateError(f"{self.describe(problem)} fails to render: {error}; fix the template")

    @staticmethod
    def _find(path: Path, setting: str) -> Path:
        if path.exists():
            return path
        if path.parent == Path() and (SHIPPED / path).exists():
            return SHIPPED / path
        shipped = ", ".join(sorted(file.name for file in SHIPPED.glob("*.jinja")))
        raise TemplateError(
            f"{setting}: {path} does not exist; give the path of a Jinja file, the name of a shipped one ({shipped}), "
            "or module:function"
        )


class _Function:
    """A function of the user's in place of a template file.

    Its results are checked, and not the function itself: it may not take a problem that is made up for the check.
    """

    def __init__(self, path: str, variables: tuple[str, ...], optional: OptionalVariables, setting: str) -> None:
        self.path, self.variables, self.setting = path, variables, setting
        self.function = load_function(path, setting)
        taken = _parameters(self.function)
        self.optional = [(place, name) for place, name in enumerate(optional, len(variables)) if name in taken]

    def describe(self, problem: Problem) -> str:
        return f"{self.setting}={self.path} on problem {problem.id!r}"

    def message(self, problem: Problem, *privileged: str) -> Message:
        values = (problem, *privileged)
        named = {name: values[place] for place, name in self.optional}
        message = call_own(
            lambda: self.function(*values[: len(self.variables)], **named),
            lambda text: TemplateError(
                f"{self.describe(problem)}: {text}; mend the function, which is called with "
                f"({', '.join(self.variables)})"
            ),
        )
        fault = message_fault(message)
        if fault is not None:
            raise TemplateError(
                f"{self.describe(problem)} gave {fault}; return text, or chat messages like [{{'role': 'user', "
                "'content': 'text'}]"
            )
        # The messages are copied, since the function may go on to change its list.
        return message if isinstance(message, str) else [dict(turn) for turn in message]

    def try_messages(self, _process: RenderProcess, arguments: Sequence[Arguments]) -> list[str]:
        return [message_digest(self.message(*given)) for given in arguments]


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters; none where it does not tell them."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def message_fault(message: object) -> str | None:
    """Return what is wrong with a message that is not of this project's making, for an error; None if nothing is."""
    if isinstance(message, str):
        return None if message.strip() else "an empty text"
    if not isinstance(message, list) or not message:
        return f"{message!r:.80}"
    for turn in message:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            return f"{turn!r:.80} among its messages"
    if message[-1]["role"] == "assistant":
        return "messages whose last is the assistant's, where the policy has the next turn"
    return None
