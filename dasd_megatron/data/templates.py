"""Prompts: the student's and the teacher's user message from Jinja templates, through the tokenizer's chat template where it has one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dasd_megatron.data.prompts import DataError, Problem

SHIPPED = Path(__file__).with_name("templates")
PRIVILEGED_KINDS = ("solution", "hint", "answer")

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


class TemplateError(ValueError):
    """A template that cannot be read or rendered. The message names the file and the fix."""


class PromptRenderer:
    """Token ids of the student's prompt (the problem) and of the teacher's (the problem and privileged information).

    A message goes through ``tokenizer``'s chat template as one user turn, with the generation prompt behind it; a tokenizer without a chat
    template encodes the message and a newline, with its beginning-of-sequence token if it adds one and without an end-of-sequence token.

    Args:
        tokenizer: a Hugging Face tokenizer.
        student_template: a Jinja file with ``{{ problem }}``, the name of a shipped one (``student_math.jinja``), or None for the problem
            as it is.
        teacher_template: the same with ``{{ problem }}`` and ``{{ privileged }}``; None for the problem, a newline, ``Solution: `` and the
            privileged text.
        privileged: what the teacher sees: ``solution``, ``hint`` (the solution's first part) or ``answer`` (the final answer only).
        hint_fraction: with ``hint``, the share of the solution's characters shown, over 0 and at most 1; at least one character is.

    Raises:
        TemplateError: a template is missing, unreadable or not Jinja, uses other variables, or does not show what it must.
        ValueError: unknown ``privileged`` or ``hint_fraction`` out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        student_template: str | Path | None = None,
        teacher_template: str | Path | None = None,
        privileged: str = "solution",
        hint_fraction: float = 0.5,
    ):
        if privileged not in PRIVILEGED_KINDS:
            raise ValueError(f"teacher.privileged is {privileged!r}; write one of {', '.join(PRIVILEGED_KINDS)}")
        if not 0 < hint_fraction <= 1:
            raise ValueError(f"teacher.hint_fraction is {hint_fraction}; it must be over 0 and at most 1")
        self.tokenizer = tokenizer
        self.privileged = privileged
        self.hint_fraction = hint_fraction
        self._student = _Template(student_template or "student.jinja", ("problem",), "data.template")
        self._teacher = _Template(teacher_template or "teacher.jinja", ("problem", "privileged"), "teacher.template")

    def student(self, problem: Problem) -> list[int]:
        """Token ids of the prompt that the policy answers."""
        return self._encode(self.student_message(problem))

    def teacher(self, problem: Problem) -> list[int]:
        """Token ids of the same prompt with privileged information; :class:`DataError` where the problem lacks it."""
        return self._encode(self.teacher_message(problem))

    def student_message(self, problem: Problem) -> str:
        """The student's user message as text, before the chat template."""
        return self._student.render(problem=problem.problem)

    def teacher_message(self, problem: Problem) -> str:
        """The teacher's user message as text, before the chat template; :class:`DataError` as :meth:`teacher`."""
        return self._teacher.render(problem=problem.problem, privileged=self._privileged_text(problem))

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

    def _encode(self, message: str) -> list[int]:
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            ids = tokenizer(message + "\n")["input_ids"]
            # A prompt is open-ended, but some tokenizers are set to close every text.
            return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
        turns = [{"role": "user", "content": message}]
        try:
            return tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the tokenizer's own chat template fails on a single user turn: {error}") from error


def check_lengths(problems: Sequence[Problem], renderer: PromptRenderer, max_prompt_tokens: int, *, teacher: bool = True) -> None:
    """Refuse problems whose prompt is longer than ``max_prompt_tokens`` or has characters that the tokenizer does not know.

    Args:
        problems: checked in order; the first that fails is named.
        renderer: makes the prompts.
        max_prompt_tokens: the limit, ``rollout.max_prompt_tokens``.
        teacher: check the teacher's prompt as well as the student's; false for problems that are only evaluated on.

    Raises:
        DataError: names the problem, its length, the limit and the field; or the text that has no token.
    """
    unknown_id = _unknown_token_id(renderer.tokenizer)
    for problem in problems:
        messages = {"student": renderer.student_message(problem)}
        if teacher:
            messages["teacher"] = renderer.teacher_message(problem)
        for kind, message in messages.items():
            length = len(renderer._encode(message))
            if length > max_prompt_tokens:
                raise DataError(
                    f"problem {problem.id!r}: the {kind}'s prompt is {length} tokens long, "
                    f"over rollout.max_prompt_tokens={max_prompt_tokens}; raise it, or remove the problem"
                )
            if unknown_id is not None:
                encoded = renderer.tokenizer(message, add_special_tokens=False, return_offsets_mapping=renderer.tokenizer.is_fast)
                if unknown_id in encoded["input_ids"]:
                    position = encoded["input_ids"].index(unknown_id)
                    span = repr(message[slice(*encoded["offset_mapping"][position])]) if renderer.tokenizer.is_fast else f"token {position}"
                    raise DataError(
                        f"problem {problem.id!r}: the {kind}'s prompt has {span}, for which the tokenizer has no token; "
                        "use a model with a larger vocabulary, or remove the problem"
                    )


class _Template:
    """One template file, checked when it is read."""

    def __init__(self, path: str | Path, variables: tuple[str, ...], setting: str):
        self.path = self._find(Path(path), setting)
        try:
            source = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{setting}: {self.path} cannot be read ({error}); give a readable UTF-8 file") from error
        try:
            used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{setting}: {self.path} line {error.lineno}: {error.message}; fix the template") from error
        unknown = sorted(used - set(variables))
        if unknown:
            allowed = " and ".join(f"{{{{ {variable} }}}}" for variable in variables)
            raise TemplateError(f"{setting}: {self.path} uses the unknown variable {{{{ {unknown[0]} }}}}; only {allowed} can be used here")
        for variable in variables:
            # Short and long text: a template may depend on the length.
            probes = [(dict.fromkeys(variables, "1" * length), "2" * length) for length in (1, 1000)]
            if all(self.render(**probe) == self.render(**{**probe, variable: other}) for probe, other in probes):
                raise TemplateError(f"{setting}: {self.path} does not show {{{{ {variable} }}}}; add it to the template")

    def render(self, **values: str) -> str:
        try:
            return self._template.render(**values)
        # A template runs its author's expressions, so anything can be raised here: undefined attributes, type errors, refusals of the
        # sandbox.
        except Exception as error:
            raise TemplateError(f"{self.path} fails to render: {type(error).__name__}: {error}; fix the template") from error

    @staticmethod
    def _find(path: Path, setting: str) -> Path:
        if path.exists():
            return path
        if path.parent == Path() and (SHIPPED / path).exists():
            return SHIPPED / path
        shipped = ", ".join(sorted(file.name for file in SHIPPED.glob("*.jinja")))
        raise TemplateError(f"{setting}: {path} does not exist; give the path of a Jinja file, or the name of a shipped one ({shipped})")


def _unknown_token_id(tokenizer: Any) -> int | None:
    """The id that stands for text without a token; some fast tokenizers have one that ``unk_token_id`` does not show."""
    if tokenizer.unk_token_id is not None:
        return tokenizer.unk_token_id
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None) if tokenizer.is_fast else None
    return None if unknown is None else tokenizer.convert_tokens_to_ids(unknown)
