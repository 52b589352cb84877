"""Checks of the prompts of all problems, before anything that takes long is started."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dasd_megatron.data.privileged import unknown_token_id
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.render_process import RenderProcess, text_digest
from dasd_megatron.data.rendering import RenderError, TemplateError
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import (
    Arguments,
    Message,
    PromptRenderer,
    message_digest,
    student_arguments,
    teacher_arguments,
    turns_of,
)
from dasd_megatron.reading import is_unicode

_PROBLEMS_AT_ONCE = 256
_THINKING = "enable_thinking"

logger = logging.getLogger(__name__)


class _Prompt(NamedTuple):
    message: Message
    text: str
    ids: list[int]


def check_prompts(
    problems: Sequence[Problem],
    renderer: PromptRenderer,
    max_prompt_tokens: int,
    *,
    vocab_size: int | None,
    teacher: TeacherPrompts | None = None,
) -> dict[str, str]:
    """Refuse problems, templates and tokenizers that do not give usable prompts.

    Templates are tried in a process with limits. A prompt shows its message as it is, is the same each time, is not
    longer than ``max_prompt_tokens``, and has neither characters that the tokenizer does not know nor tokens that the
    model does not have. The teacher's is not the student's; it is tried with every text that is known now, and with
    stand-ins for those that arise in the run.

    Args:
        problems: checked in order; one that fails is named.
        renderer: makes the prompts.
        max_prompt_tokens: the limit, ``rollout.max_prompt_tokens``.
        vocab_size: tokens of the model; None where it is not known.
        teacher: maker of the teacher's prompts, to check them as well; None for problems that are only evaluated on.

    Returns:
        The SHA-256 over the token ids of all prompts, of the student and of the teacher.

    Raises:
        DataError: names the problem, its length, the limit and the field; or the text that has no token, or the token
            that the model does not have.
        TemplateError: a function or template fails on a problem, or gives what is no prompt of it.
    """
    unknown_id = unknown_token_id(renderer.tokenizer)
    digests = {kind: hashlib.sha256() for kind in (("student",) if teacher is None else ("student", "teacher"))}
    with RenderProcess() as process:
        _check_chat_template(renderer, process)
        for start in range(0, len(problems), _PROBLEMS_AT_ONCE):
            some = problems[start : start + _PROBLEMS_AT_ONCE]
            calls = {"student": [student_arguments(problem) for problem in some]}
            if teacher is not None:
                calls["teacher"] = [
                    teacher_arguments(problem, shown) for problem in some for shown in teacher.texts_to_try(problem)
                ]
            prompts = {
                kind: _make_prompts(arguments, kind, renderer, process, max_prompt_tokens)
                for kind, arguments in calls.items()
            }
            # Of each kind, one that is too long is the last, and refused here.
            checked = [(kind, *pair) for kind in prompts for pair in zip(calls[kind], prompts[kind], strict=False)]
            for kind, (problem, *_), prompt in checked:
                _check_shown(problem, kind, prompt, renderer)
                _check_tokens(problem, kind, prompt, renderer, max_prompt_tokens, vocab_size, unknown_id)
                digests[kind].update(json.dumps(prompt.ids).encode())
            _check_differ(calls, prompts, renderer)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _check_differ(
    calls: Mapping[str, Sequence[Arguments]], prompts: Mapping[str, Sequence[_Prompt]], renderer: PromptRenderer
) -> None:
    """Refuse a teacher's prompt that is the student's."""
    students = {
        problem.id: prompt.ids for (problem, *_), prompt in zip(calls["student"], prompts["student"], strict=True)
    }
    for (problem, *_), prompt in zip(calls.get("teacher", ()), prompts.get("teacher", ()), strict=True):
        if prompt.ids == students[problem.id]:
            raise TemplateError(
                f"{renderer.makers['teacher'].describe(problem)} gives the student's prompt; show the privileged text "
                "in the teacher's"
            )


def _check_chat_template(renderer: PromptRenderer, process: RenderProcess) -> None:
    """Refuse a chat template that cannot be read, and names in data.chat_template_kwargs that are most likely
    misspelt; warn of others that it does not read."""
    given = renderer.chat_template_kwargs
    if renderer.chat is None:
        if given:
            _warn_once(renderer, "data.chat_template_kwargs: the tokenizer has no chat template: they change nothing")
        return
    try:
        reads = process.inspect(renderer.chat)["reads"]
    except RenderError as error:
        raise TemplateError(
            f"the tokenizer's own chat template cannot be used: {error}; mend chat_template in the tokenizer's files"
        ) from error
    for name in sorted(given.keys() - set(reads)):
        close = difflib.get_close_matches(name, reads, n=1, cutoff=0.75)
        if close:
            raise TemplateError(
                f"data.chat_template_kwargs.{name}: the tokenizer's chat template reads no {name}; did you mean "
                f"{close[0]}?"
            )
        _warn_once(
            renderer,
            f"data.chat_template_kwargs.{name}: the tokenizer's chat template reads no {name}: it changes nothing",
        )
    if _THINKING in set(reads) - given.keys():
        _warn_once(
            renderer,
            f"the tokenizer's chat template reads {_THINKING}, and it is not given: write "
            f"data.chat_template_kwargs={{{_THINKING}: false}} for answers without a thought, or true",
        )


def _warn_once(renderer: PromptRenderer, text: str) -> None:
    if text not in renderer.warnings:
        renderer.warnings.append(text)
        logger.warning(text)


def _make_prompts(
    arguments: Sequence[Arguments], kind: str, renderer: PromptRenderer, process: RenderProcess, max_prompt_tokens: int
) -> list[_Prompt]:
    """Return the prompts of ``kind``, after ``process`` has rendered the same. One that is too long is the last."""
    maker = renderer.makers[kind]
    places = [maker.describe(problem) for problem, *_ in arguments]
    expected = maker.try_messages(process, arguments)
    messages = [maker.message(*given) for given in arguments]
    for message, digest, where in zip(messages, expected, places, strict=True):
        # Every rank renders for itself, in every step.
        if message_digest(message) != digest:
            raise TemplateError(f"{where} gives another message each time; make it depend on the problem alone")
    prompts = []
    for message, text in zip(messages, chat_texts(messages, places, renderer, process), strict=False):
        prompts.append(_Prompt(message, text, renderer.encode(text)))
        # It is refused. The others would be as long, and hundreds of them would fill the memory.
        if len(prompts[-1].ids) > max_prompt_tokens:
            break
    return prompts


def chat_texts(
    messages: Sequence[Message], places: Sequence[str], renderer: PromptRenderer, process: RenderProcess
) -> Iterator[str]:
    """Yield the prompt's text of each message, after ``process`` has rendered the same.

    Args:
        places: the heads of errors, one for each message.

    Raises:
        TemplateError: the chat template fails on a message, or gives another text each time.
        DataError: a text has half of a surrogate pair.
    """
    tried: list[str] = []
    if renderer.chat is not None:
        try:
            tried = process.digests(renderer.chat, [turns_of(message) for message in messages])
        except RenderError as error:
            raise renderer.refusal(messages[error.index], places[error.index], error) from error
    for place, (message, where) in enumerate(zip(messages, places, strict=True)):
        try:
            text = renderer.text(message, where)
        except RenderError as error:
            raise renderer.refusal(message, where, error) from error
        if tried and text_digest(text) != tried[place]:
            raise TemplateError(
                f"{where}: the tokenizer's chat template gives another text each time; mend it, so that a prompt "
                "depends on the messages alone"
            )
        if not is_unicode(text):
            half = next(character for character in text if not is_unicode(character))
            raise DataError(
                f"{where}: the prompt has {half!r}, half of a surrogate pair, which is no text; take it out"
            )
        yield text


def _check_shown(problem: Problem, kind: str, prompt: _Prompt, renderer: PromptRenderer) -> None:
    """Refuse a prompt without the text of each of its messages. White space at both ends may be taken off."""
    if renderer.chat is None:
        return
    for turn in turns_of(prompt.message):
        if turn["content"].strip() in prompt.text:
            continue
        part = "the problem" if isinstance(prompt.message, str) else f"the message of the {turn['role']}"
        raise TemplateError(
            f"problem {problem.id!r}: the tokenizer's chat template does not show {part} as it is in the {kind}'s "
            "prompt; give a model whose template shows text, or mend chat_template in the tokenizer's files"
        )


def _check_tokens(
    problem: Problem,
    kind: str,
    prompt: _Prompt,
    renderer: PromptRenderer,
    max_prompt_tokens: int,
    vocab_size: int | None,
    unknown_id: int | None,
) -> None:
    if len(prompt.ids) > max_prompt_tokens:
        raise DataError(
            f"problem {problem.id!r}: the {kind}'s prompt is {len(prompt.ids)} tokens long, "
            f"over rollout.max_prompt_tokens={max_prompt_tokens}; raise it, or remove the problem"
        )
    fault = foreign_token(prompt.ids, renderer.tokenizer, vocab_size)
    if fault is not None:
        raise DataError(f"problem {problem.id!r}: the {kind}'s prompt has {fault}")
    unknown = None if unknown_id is None else text_without_token(prompt.message, renderer.tokenizer, unknown_id)
    if unknown is not None:
        raise DataError(
            f"problem {problem.id!r}: the {kind}'s prompt has {unknown}, for which the tokenizer has no "
            "token; use a model with a larger vocabulary, or remove the problem"
        )


def foreign_token(ids: Sequence[int], tokenizer: Any, vocab_size: int | None) -> str | None:
    """Return the first token that the model does not have, and what to do, as an error ends; None where it has all.

    vocab_size: tokens of the model; None where it is not known.
    """
    if vocab_size is None or max(ids, default=0) < vocab_size:
        return None
    beyond = next(token for token in ids if token >= vocab_size)
    return (
        f"the token {tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}) of the tokenizer of model.path, and the "
        f"model has {vocab_size} tokens (vocab_size in config.json); give the tokenizer that belongs to the model, or "
        "resize the model's embedding"
    )


def text_without_token(message: Message, tokenizer: Any, unknown_id: int) -> str | None:
    """Return the first part of a message that the tokenizer has no token for, as an error shows it."""
    for text in [message] if isinstance(message, str) else [turn["content"] for turn in message]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        if unknown_id in encoded["input_ids"]:
            position = encoded["input_ids"].index(unknown_id)
            if not tokenizer.is_fast:
                return f"token {position}"
            return repr(text[slice(*encoded["offset_mapping"][position])])
    return None
