"""Prompts: the student's and the teacher's message, and their token ids.

A message comes from a Jinja template or from a function of the user's. Where the tokenizer has a chat template, the
message goes through it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dasd_megatron.config import FUNCTION_PATH, PRIVILEGED_KINDS, DataConfig, TeacherConfig
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.errors import first_line
from dasd_megatron.plugins import load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = Path(__file__).with_name("templates")

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)

Message = str | list[dict[str, str]]
"""One user turn as text, or all turns as chat messages, each with a role and a content."""


class TemplateError(ValueError):
    """A template that cannot be read or rendered. The message names the file or function and the fix."""


class _MessageMaker(Protocol):
    """Source of messages: a template file or a function."""

    def describe(self, problem: Problem) -> str:
        """Return the setting, the file or function, and the problem, for the head of an error."""

    def message(self, problem: Problem, *privileged: str) -> Message:
        """Return the message for a problem; the teacher's gets the privileged text too."""


class PromptRenderer:
    """Token ids of the student's prompt (the problem) and of the teacher's (the problem and privileged information).

    A text goes through ``tokenizer``'s chat template as one user turn, followed by the generation prompt. A tokenizer
    without a chat template encodes the text and a newline, with its beginning-of-sequence token if it adds one and
    without an end-of-sequence token. A function may give chat messages instead, for a tokenizer with a chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        student_template: a Jinja file with ``{{ problem }}``, the name of a shipped one (``student_math.jinja``), a
            function's path (``module:function``), or None for the problem as it is. The function gets the problem with
            its answer and solution empty.
        teacher_template: the same with ``{{ problem }}`` and ``{{ privileged }}``; the function gets the problem and
            the privileged text. None for the problem, a newline, ``Solution: `` and the privileged text.
        privileged: what the teacher sees: ``solution``, ``hint`` (the solution's first part) or ``answer`` (the final
            answer only).
        hint_fraction: with ``hint``, the share of the solution's characters that is shown, over 0 and at most 1; at
            least one character is.

    Raises:
        TemplateError: a template is missing, unreadable or not Jinja, uses other variables, or does not show what it
            must.
        ConfigError: a function that cannot be found.
        ValueError: unknown ``privileged`` or ``hint_fraction`` out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        student_template: str | Path | None = None,
        teacher_template: str | Path | None = None,
        privileged: str = "solution",
        hint_fraction: float = 0.5,
    ) -> None:
        if privileged not in PRIVILEGED_KINDS:
            raise ValueError(f"teacher.privileged is {privileged!r}; write one of {', '.join(PRIVILEGED_KINDS)}")
        if not 0 < hint_fraction <= 1:
            raise ValueError(f"teacher.hint_fraction is {hint_fraction}; it must be over 0 and at most 1")
        self.tokenizer = tokenizer
        self.privileged = privileged
        self.hint_fraction = hint_fraction
        self._student = _make_template(student_template or "student.jinja", ("problem",), "data.template")
        self._teacher = _make_template(
            teacher_template or "teacher.jinja", ("problem", "privileged"), "teacher.template"
        )

    def student(self, problem: Problem) -> list[int]:
        """Return the token ids of the prompt that the policy answers."""
        return self._encode(self.student_message(problem), self._student.describe(problem))

    def teacher(self, problem: Problem) -> list[int]:
        """Return the token ids of the same prompt with privileged information.

        Raises:
            DataError: the problem has no such information.
        """
        return self._encode(self.teacher_message(problem), self._teacher.describe(problem))

    def student_message(self, problem: Problem) -> Message:
        """Return the student's message, before the chat template."""
        # An answer that is taken out cannot leak into the prompt by mistake.
        return self._student.message(dataclasses.replace(problem, expected_answer="", reference_solution=""))

    def teacher_message(self, problem: Problem) -> Message:
        """Return the teacher's message, before the chat template. Raises as :meth:`teacher`."""
        return self._teacher.message(problem, self._privileged_text(problem))

    def _privileged_text(self, problem: Problem) -> str:
        if self.privileged == "answer":
            return problem.expected_answer
        solution = problem.reference_solution
        if not solution:
            raise DataError(
                f"problem {problem.id!r} has no reference solution, which teacher.privileged={self.privileged} shows; "
                "add one, or set teacher.privileged=answer"
            )
        return solution if self.privileged == "solution" else solution[: math.ceil(len(solution) * self.hint_fraction)]

    def _encode(self, message: Message, where: str) -> list[int]:
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            if not isinstance(message, str):
                raise TemplateError(
                    f"{where} gave chat messages, and the tokenizer has no chat template; return text instead"
                )
            ids: list[int] = tokenizer(message + "\n")["input_ids"]
            # A prompt is open-ended, but some tokenizers are set to close every text.
            return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
        turns = [{"role": "user", "content": message}] if isinstance(message, str) else message
        try:
            ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as error:
            if isinstance(message, str):
                raise TemplateError(
                    f"the tokenizer's own chat template fails on a single user turn: {error}"
                ) from error
            roles = ", ".join(turn["role"] for turn in message)
            raise TemplateError(
                f"{where}: the tokenizer's own chat template fails on its messages ({roles}): {error}; return "
                "messages that it takes"
            ) from error
        return ids


def make_renderer(data: DataConfig, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """Return the renderer that the configuration asks for. Raises as :class:`PromptRenderer`."""
    return PromptRenderer(tokenizer, data.template, teacher.template, teacher.privileged, teacher.hint_fraction)


def check_lengths(
    problems: Sequence[Problem], renderer: PromptRenderer, max_prompt_tokens: int, *, teacher: bool = True
) -> None:
    """Refuse problems and templates that do not give usable prompts.

    A prompt may not be longer than ``max_prompt_tokens``, nor have characters that the tokenizer does not know. A
    template has to give the same prompt each time, and the teacher another one than the student.

    Args:
        problems: checked in order; the first that fails is named.
        renderer: makes the prompts.
        max_prompt_tokens: the limit, ``rollout.max_prompt_tokens``.
        teacher: check the teacher's prompt as well as the student's; False for problems that are only evaluated on.

    Raises:
        DataError: names the problem, its length, the limit and the field; or the text that has no token.
        TemplateError: a function or template fails on a problem.
    """
    unknown_id = _unknown_token_id(renderer.tokenizer)
    sides: dict[str, tuple[Callable[[Problem], Message], _MessageMaker]] = {
        "student": (renderer.student_message, renderer._student)
    }
    if teacher:
        sides["teacher"] = (renderer.teacher_message, renderer._teacher)
    for problem in problems:
        prompts = {}
        for kind, (message_of, template) in sides.items():
            message = message_of(problem)
            # Every rank renders for itself, in every step.
            if message_of(problem) != message:
                raise TemplateError(
                    f"{template.describe(problem)} gives another message each time; make it depend on the problem alone"
                )
            prompts[kind] = renderer._encode(message, template.describe(problem))
            length = len(prompts[kind])
            if length > max_prompt_tokens:
                raise DataError(
                    f"problem {problem.id!r}: the {kind}'s prompt is {length} tokens long, "
                    f"over rollout.max_prompt_tokens={max_prompt_tokens}; raise it, or remove the problem"
                )
            unknown = None if unknown_id is None else _text_without_token(message, renderer.tokenizer, unknown_id)
            if unknown is not None:
                raise DataError(
                    f"problem {problem.id!r}: the {kind}'s prompt has {unknown}, for which the tokenizer has no "
                    "token; use a model with a larger vocabulary, or remove the problem"
                )
        if teacher and prompts["teacher"] == prompts["student"]:
            raise TemplateError(
                f"{renderer._teacher.describe(problem)} gives the student's prompt; show the privileged text in the "
                "teacher's"
            )


def _text_without_token(message: Message, tokenizer: Any, unknown_id: int) -> str | None:
    """Return the first part of a message that the tokenizer has no token for, as an error shows it."""
    for text in [message] if isinstance(message, str) else [turn["content"] for turn in message]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        if unknown_id in encoded["input_ids"]:
            position = encoded["input_ids"].index(unknown_id)
            if not tokenizer.is_fast:
                return f"token {position}"
            return repr(text[slice(*encoded["offset_mapping"][position])])
    return None


def _make_template(path: str | Path, variables: tuple[str, ...], setting: str) -> _MessageMaker:
    if FUNCTION_PATH.fullmatch(str(path)):
        return _Function(str(path), variables, setting)
    return _Template(path, variables, setting)


class _Template:
    """A template file, checked when it is read."""

    def __init__(self, path: str | Path, variables: tuple[str, ...], setting: str) -> None:
        self.setting, self.variables = setting, variables
        self.path = self._find(Path(path), setting)
        try:
            source = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(
                f"{setting}: {self.path} cannot be read ({error}); give a readable UTF-8 file"
            ) from error
        try:
            used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{setting}: {self.path} line {error.lineno}: {error.message}; fix the template"
            ) from error
        unknown = sorted(used - set(variables))
        if unknown:
            allowed = " and ".join(f"{{{{ {variable} }}}}" for variable in variables)
            raise TemplateError(
                f"{setting}: {self.path} uses the unknown variable {{{{ {unknown[0]} }}}}; only {allowed} can be used "
                "here"
            )
        for variable in variables:
            # Both short and long text is tried, because a template may depend on the length.
            probes = [(dict.fromkeys(variables, "1" * length), "2" * length) for length in (1, 1000)]
            if all(self.render(**probe) == self.render(**{**probe, variable: other}) for probe, other in probes):
                raise TemplateError(
                    f"{setting}: {self.path} does not show {{{{ {variable} }}}}; add it to the template"
                )

    def describe(self, problem: Problem) -> str:
        return f"{self.setting}: {self.path} on problem {problem.id!r}"

    def message(self, problem: Problem, *privileged: str) -> str:
        return self.render(**dict(zip(self.variables, (problem.problem, *privileged), strict=True)))

    def render(self, **values: str) -> str:
        try:
            return self._template.render(**values)
        # A template runs its author's expressions, so anything can be raised here: undefined attributes, type errors,
        # refusals of the sandbox.
        except Exception as error:
            raise TemplateError(
                f"{self.path} fails to render: {type(error).__name__}: {error}; fix the template"
            ) from error

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

    def __init__(self, path: str, variables: tuple[str, ...], setting: str) -> None:
        self.path, self.variables, self.setting = path, variables, setting
        self.function = load_function(path, setting)

    def describe(self, problem: Problem) -> str:
        return f"{self.setting}={self.path} on problem {problem.id!r}"

    def message(self, problem: Problem, *privileged: str) -> Message:
        try:
            message = self.function(problem, *privileged)
        # The user's code may raise anything.
        except Exception as error:
            raise TemplateError(
                f"{self.describe(problem)}: {type(error).__name__}: {first_line(error)}; mend the function, which is "
                f"called with ({', '.join(self.variables)})"
            ) from error
        fault = _message_fault(message)
        if fault is not None:
            raise TemplateError(
                f"{self.describe(problem)} gave {fault}; return text, or chat messages like [{{'role': 'user', "
                "'content': 'text'}]"
            )
        # The messages are copied, since the function may go on to change its list.
        return message if isinstance(message, str) else [dict(turn) for turn in message]


def _message_fault(message: object) -> str | None:
    """Return what is wrong with a function's result, for an error; None if nothing is."""
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


def _unknown_token_id(tokenizer: Any) -> int | None:
    """Return the id that stands for text without a token.

    Some fast tokenizers have such an id although ``unk_token_id`` is None.
    """
    unknown_id: int | None = tokenizer.unk_token_id
    if unknown_id is None and tokenizer.is_fast:
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        unknown_id = None if unknown is None else tokenizer.convert_tokens_to_ids(unknown)
    return unknown_id
