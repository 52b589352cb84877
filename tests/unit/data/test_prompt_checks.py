"""Prompts that cannot be used are refused before anything is started, with one line."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.data.prompt_checks import check_prompts
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import PromptRenderer
from tests.support.chat_templates import DATED, PARTS, THINKING, tokenizer_with
from tests.support.teachers import solution_of, teacher_of

PROBLEMS = [Problem("p0", "What is 0+0?", "0", "0"), Problem("p1", "What is Two?", "2", "Two\n#### 2")]


def refusal(renderer: PromptRenderer, *, vocab_size: int | None = None, teacher: bool = False) -> str:
    with pytest.raises((TemplateError, DataError)) as caught:
        check_prompts(PROBLEMS, renderer, 400, vocab_size=vocab_size, teacher=teacher_of(renderer) if teacher else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}<|user|>{{ m['content'] + 1 }}{% endfor %}", "TypeError: can only concatenate str"),
        ("{% for m in messages %}{{ raise_exception('no user turn') }}{% endfor %}", "no user turn"),
        ("{% if", "line 1: "),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1 s"),
        ("{{ messages | random }}", "draws at random"),
        (
            "{{ messages[0].content }}{{ messages[0].items }}",
            "chat template gives another text each time",
        ),
        ({"tool_use": "x", "rag": "y"}, "there are several (rag, tool_use) and none is named default"),
        ({"default": 5}, "is 5 and no text"),
        (5, "is 5 and no text"),
        ("{{ messages[0].content }}" + " " * 2**20, "has 1,048,601 characters, over 1,048,576"),
    ],
)
def test_errors_of_a_chat_template_name_it(template: Any, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        check_prompts(PROBLEMS, PromptRenderer(tokenizer_with(template)), 400, vocab_size=None)
    message = str(caught.value)
    assert "the tokenizer's" in message and "chat template" in message and said in message and "\n" not in message


def test_the_default_of_several_chat_templates_is_taken() -> None:
    renderer = PromptRenderer(tokenizer_with({"tool_use": "x", "default": THINKING}))
    teacher = teacher_of(renderer)
    assert check_prompts(PROBLEMS, renderer, 400, vocab_size=None, teacher=teacher).keys() == {"student", "teacher"}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|user|><|end|>{% endfor %}<|assistant|>",
        "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content[:10] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
        "{% for m in messages %}{{ m.text }}{% endfor %}",
        "",
    ],
)
def test_a_chat_template_shows_the_problem_as_it_is(template: str) -> None:
    assert "the tokenizer's chat template does not show the problem as it is in the student's prompt" in refusal(
        PromptRenderer(tokenizer_with(template))
    )


def test_a_chat_template_shows_the_solution_and_every_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tokenizer_with("{% for m in messages %}{{ m.content[:19] }}{% endfor %}")
    assert "problem 'p0': " in refusal(PromptRenderer(short), teacher=True)
    (tmp_path / "told.py").write_text(
        "def told(problem, *privileged):\n"
        "    return [{'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': problem.problem}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    users = tokenizer_with("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert "does not show the message of the system" in refusal(PromptRenderer(users, "told:told"))
    sys.modules.pop("told")
    # White space at both ends is no part of it.
    trims = tokenizer_with("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    check_prompts([Problem("p", " 1 + 1 \n", "2", "")], PromptRenderer(trims), 400, vocab_size=None)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}{{ '\\ud800' }}", "{{ messages[0].content }}"])
def test_halves_of_surrogate_pairs_are_no_text(template: str) -> None:
    half = Problem("p", "1 + 1 =" if "ud800" in template else "1 + \udfff", "2", "")
    with pytest.raises(DataError, match="on problem 'p': the prompt has '.ud(800|fff)', half of a surrogate pair"):
        check_prompts([half], PromptRenderer(tokenizer_with(template)), 400, vocab_size=None)


def test_a_chat_template_for_parts_is_given_parts() -> None:
    tokenizer = tokenizer_with(PARTS)
    renderer = PromptRenderer(tokenizer)
    check_prompts(PROBLEMS, renderer, 400, vocab_size=None)
    assert tokenizer.decode(renderer.student(PROBLEMS[0])) == "<|user|>What is 0+0?<|end|><|assistant|>"


@pytest.mark.parametrize("teacher", [False, True])
def test_no_prompt_is_made_behind_one_that_is_too_long(teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = PromptRenderer(tokenizer_with("{{ messages[0].content }}" + " " * 500))
    made: list[str] = []
    encode = renderer.encode
    monkeypatch.setattr(renderer, "encode", lambda text: made.append(text) or encode(text))
    assert "problem 'p0': the student's prompt is 5" in refusal(renderer, teacher=teacher)
    assert len(made) == 1 + teacher


def test_tokens_that_the_model_does_not_have_are_named() -> None:
    tokenizer = tokenizer_with("<|new|>{% for m in messages %}{{ m.content }}{% endfor %}")
    size = len(tokenizer)
    check_prompts(PROBLEMS, PromptRenderer(tokenizer), 400, vocab_size=size)
    tokenizer.add_tokens(["<|new|>", "<|unused|>"], special_tokens=True)
    message = refusal(PromptRenderer(tokenizer), vocab_size=size)
    assert f"problem 'p0': the student's prompt has the token '<|new|>' (id {size}) of the tokenizer" in message
    assert f"the model has {size} tokens" in message
    # A tokenizer may have more tokens than the model, as long as no prompt has one of them.
    check_prompts(PROBLEMS, PromptRenderer(tokenizer), 400, vocab_size=size + 1)
    check_prompts(PROBLEMS, PromptRenderer(tokenizer), 400, vocab_size=None)


def test_a_dated_prompt_is_the_same_in_the_process_and_here() -> None:
    renderer = PromptRenderer(tokenizer_with(DATED), date="2026-11-28")
    digests = check_prompts(PROBLEMS, renderer, 400, vocab_size=None)
    tomorrow = PromptRenderer(tokenizer_with(DATED), date="2026-11-29")
    assert check_prompts(PROBLEMS, tomorrow, 400, vocab_size=None) != digests
    seconds = tokenizer_with(DATED.replace("%d %b %Y", "%s"))
    assert "gives another text each time" in refusal(PromptRenderer(seconds, date="2026-11-28"))


def test_variables_of_a_chat_template_reach_student_and_teacher(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(THINKING)
    renderer = PromptRenderer(tokenizer, chat_template_kwargs={"enable_thinking": False})
    check_prompts(PROBLEMS, renderer, 400, vocab_size=None)
    for ids in (renderer.student(PROBLEMS[0]), renderer.teacher(PROBLEMS[0], solution_of(PROBLEMS[0]))):
        assert tokenizer.decode(ids).endswith("<|assistant|>[]")
    misspelt = PromptRenderer(tokenizer, chat_template_kwargs={"enable_thinkin": False})
    assert "data.chat_template_kwargs.enable_thinkin: " in refusal(misspelt)
    assert "did you mean enable_thinking?" in refusal(misspelt)
    # A preset's variable may be one that another release of the model does not know.
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        other = PromptRenderer(tokenizer_with(PARTS), chat_template_kwargs={"enable_thinking": False})
        check_prompts(PROBLEMS, other, 400, vocab_size=None)
        check_prompts(PROBLEMS, other, 400, vocab_size=None)
        assert caplog.messages == [
            "data.chat_template_kwargs.enable_thinking: the tokenizer's chat template reads no enable_thinking: it "
            "changes nothing"
        ]
        check_prompts(PROBLEMS, PromptRenderer(tokenizer), 400, vocab_size=None)
        assert "write data.chat_template_kwargs={enable_thinking: false}" in caplog.messages[1]


def test_a_message_template_that_never_ends_is_named(tmp_path: Path) -> None:
    path = tmp_path / "slow.jinja"
    loops = "".join(f"{{% for {name} in problem %}}" for name in "abcdefgh") + "{% endfor %}" * 8
    path.write_text("{{ problem }}{% if 'Two' in problem %}" + loops + "{% endif %}")
    message = refusal(PromptRenderer(tokenizer_with(THINKING), path))
    assert message.startswith(f"data.template: {path} on problem 'p1' fails to render: it does not end within 1 s")
    path.write_text("{{ problem }}{{ 'x' * 10**10 }}")
    with pytest.raises(TemplateError, match=r"data\.template: .*slow\.jinja fails to render: .*too much memory"):
        PromptRenderer(tokenizer_with(THINKING), path)
