from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dasd_megatron.data.prompt_checks import check_prompts
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import SHIPPED, PromptRenderer, student_arguments, teacher_arguments
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.tiny import character_tokenizer
from tests.support.teachers import solution_of, teacher_of

PROBLEM = Problem("p1", "4 - 1 =", "3", "4-1=3\n#### 3")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Splits at spaces and newlines; adds <s> before and </s> behind every text, as Llama-style tokenizers can be set
    to."""
    vocabulary = {
        token: i
        for i, token in enumerate(["<s>", "</s>", "<unk>", "4", "-", "1", "=", "3", "Solution:", "user:", "bot:"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def message_of(renderer: PromptRenderer, problem: Problem) -> Any:
    """Return the teacher's message before the chat template."""
    return renderer.makers["teacher"].message(*teacher_arguments(problem, solution_of(problem)))


def test_chat_template_and_generation_prompt(tokenizer):
    renderer = PromptRenderer(tokenizer)
    assert tokenizer.decode(renderer.student(PROBLEM)) == "<|user|>4 - 1 =<|end|><|assistant|>"
    assert (
        tokenizer.decode(renderer.teacher(PROBLEM, solution_of(PROBLEM)))
        == "<|user|>4 - 1 =\nSolution: 4-1=3\n#### 3<|end|><|assistant|>"
    )
    assert all(type(token) is int for token in renderer.student(PROBLEM))


def test_without_a_chat_template_the_prompt_is_text_that_stays_open():
    tokenizer = word_tokenizer()
    assert tokenizer("4")["input_ids"] == [0, 3, 1]
    assert tokenizer.convert_ids_to_tokens(PromptRenderer(tokenizer).student(PROBLEM)) == ["<s>", "4", "-", "1", "="]


def test_the_newline_of_a_plain_prompt_is_encoded():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(PromptRenderer(tokenizer).student(PROBLEM)) == "4 - 1 =\n"


def test_a_chat_template_that_writes_the_first_token_gets_no_second():
    template = (
        "{{ bos_token }} {% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt "
        "%} bot:{% endif %}"
    )
    tokenizer = word_tokenizer(template)
    tokens = tokenizer.convert_ids_to_tokens(PromptRenderer(tokenizer).student(PROBLEM))
    assert tokens == ["<s>", "user:", "4", "-", "1", "=", "bot:"]


def test_a_failing_chat_template_is_named(tokenizer):
    broken = word_tokenizer("{{ raise_exception('needs a system turn') }}")
    with pytest.raises(TemplateError, match=r"tokenizer's own chat template.*needs a system turn"):
        PromptRenderer(broken).student(PROBLEM)


def test_shipped_templates(tokenizer):
    assert {file.name for file in SHIPPED.iterdir()} == {
        "student.jinja", "student_math.jinja",
        "teacher.jinja", "teacher_bare.jinja", "teacher_math.jinja",
    }  # fmt: skip
    renderer = PromptRenderer(tokenizer)
    assert renderer.makers["student"].message(*student_arguments(PROBLEM)) == PROBLEM.problem
    assert len(message_of(renderer, PROBLEM)) - len(PROBLEM.problem) - len(PROBLEM.reference_solution) < 30
    bare = PromptRenderer(tokenizer, None, "teacher_bare.jinja")
    assert message_of(bare, PROBLEM) == f"{PROBLEM.problem}\n{PROBLEM.reference_solution}"
    math = PromptRenderer(tokenizer, "student_math.jinja", "teacher_math.jinja")
    for message in (
        math.makers["student"].message(*student_arguments(PROBLEM)),
        message_of(math, PROBLEM),
    ):
        assert message.startswith("4 - 1 =\n") and message.endswith("put your final answer within \\boxed{}.")
    assert PROBLEM.reference_solution in math.makers["teacher"].message(
        *teacher_arguments(PROBLEM, solution_of(PROBLEM))
    )
    assert PROBLEM.reference_solution not in math.makers["student"].message(*student_arguments(PROBLEM))


def test_a_template_file_of_the_users(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% if privileged|length > 3 %}Look: {{ privileged }}\n{% endif %}<b> {{ problem|upper }} & é")
    renderer = PromptRenderer(tokenizer, None, path)
    assert message_of(renderer, PROBLEM) == "Look: 4-1=3\n#### 3\n<b> 4 - 1 = & é"


def test_template_syntax_in_a_problem_is_text(tokenizer):
    problem = Problem("p", "{{ 1 }} {% if %}", "1", "{{ problem }}")
    assert message_of(PromptRenderer(tokenizer), problem) == "{{ 1 }} {% if %}\nSolution: {{ problem }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ problem }}", r"does not show \{\{ privileged \}\}"),
        ("{{ privileged }}", r"does not show \{\{ problem \}\}"),
        ("{{ problem }}{% if false %}{{ privileged }}{% endif %}", r"does not show \{\{ privileged \}\}"),
        ("{{ problem }}{# {{ privileged }} #}", r"does not show \{\{ privileged \}\}"),
        ("{{ problem }}\n{{ privileged", r"line 2: .*fix the template"),
        (
            "{{ problem }}{{ privileged }}{{ solution }}",
            r"uses the unknown variable \{\{ solution \}\}; only .*problem.* and .*privileged",
        ),
        ("{{ problem }}{{ privileged.text }}", "fails to render: UndefinedError"),
        ("{{ problem }}{{ privileged }}{{ 1 // 0 }}", "fails to render: ZeroDivisionError"),
        ("{{ problem }}{{ privileged }}{{ ''.__class__.__mro__ }}", "fails to render: SecurityError"),
        ("{{ problem }}{{ privileged }}{% include 'x' %}", "fails to render"),
    ],
)
def test_bad_teacher_templates_are_refused(tokenizer, tmp_path, source, message):
    path = tmp_path / "bad.jinja"
    path.write_text(source)
    with pytest.raises(TemplateError, match=f"bad.jinja.*{message}" if "line" not in message else message) as caught:
        PromptRenderer(tokenizer, None, path)
    assert str(path) in str(caught.value)


def test_a_student_template_may_not_show_privileged_information(tokenizer, tmp_path):
    path = tmp_path / "leak.jinja"
    path.write_text("{{ problem }} {{ privileged }}")
    with pytest.raises(
        TemplateError, match=r"data\.template: .*unknown variable \{\{ privileged \}\}; only \{\{ problem \}\}"
    ):
        PromptRenderer(tokenizer, path)


def test_unreadable_templates_are_refused(tokenizer, tmp_path):
    with pytest.raises(TemplateError, match=r"teacher\.template: .*absent.jinja does not exist.*teacher_math.jinja"):
        PromptRenderer(tokenizer, None, tmp_path / "absent.jinja")
    with pytest.raises(TemplateError, match=r"data\.template: .* cannot be read"):
        PromptRenderer(tokenizer, tmp_path)
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff{{ problem }}")
    with pytest.raises(TemplateError, match=r"data\.template: .*binary\.jinja is damaged \(not UTF-8 at byte 0\)"):
        PromptRenderer(tokenizer, binary)


def test_prompts_have_a_greatest_length(tokenizer):
    renderer = PromptRenderer(tokenizer)
    student, teacher = len(renderer.student(PROBLEM)), len(renderer.teacher(PROBLEM, solution_of(PROBLEM)))
    assert student < teacher
    short = Problem("p0", "1 =", "1", "1")
    check_prompts([short, PROBLEM], renderer, teacher, vocab_size=None, teacher=teacher_of(renderer))
    with pytest.raises(
        DataError,
        match=rf"'p1': the teacher's prompt is {teacher} tokens long, over rollout\.max_prompt_tokens={teacher - 1}",
    ):
        check_prompts([short, PROBLEM], renderer, teacher - 1, vocab_size=None, teacher=teacher_of(renderer))
    with pytest.raises(DataError, match=f"'p1': the student's prompt is {student} tokens long"):
        check_prompts([short, PROBLEM], renderer, student - 1, vocab_size=None)
    check_prompts([Problem("p3", "1 =", "1", "")], renderer, student, vocab_size=None)


@pytest.mark.parametrize("make", [character_tokenizer, word_tokenizer])
def test_text_without_a_token_is_refused(make):
    with pytest.raises(
        DataError, match="'p4': the student's prompt has '\u2019', for which the tokenizer has no token"
    ):
        check_prompts([Problem("p4", "4 - \u2019 =", "3", "3")], PromptRenderer(make()), 100, vocab_size=None)


EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_template"
FUNCTIONS = """
import itertools
constant = 3
count = itertools.count()
turns = []
def shows_all(problem, *privileged): return repr((problem, *privileged))
def chat(problem, *privileged): return [
    {"role": "system", "content": "Add."}, {"role": "user", "content": " ".join([problem.problem, *privileged])}]
def strange(problem, *privileged): return "\u2019" + problem.problem
def strange_chat(problem, *privileged):
    return [{"role": "system", "content": "4"}, {"role": "user", "content": "\u2019"}]
def same(problem, *privileged): return problem.problem
def counted(problem, *privileged): return problem.problem + str(next(count))
def grows(problem, *privileged):
    turns.append({"role": "user", "content": "4"})
    return turns
def fails(problem, *privileged): return problem.problem[99]
def needs_more(problem, privileged, hint): return privileged
def nothing(problem, *privileged): return None
def empty(problem, *privileged): return " "
def no_turns(problem, *privileged): return []
def no_role(problem, *privileged): return [{"content": "4"}]
def no_text(problem, *privileged): return [{"role": "user", "content": None}]
def assistant_last(problem, *privileged):
    return [{"role": "user", "content": "4"}, {"role": "assistant", "content": "4"}]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine", None)


def test_the_example_functions(tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    problem = Problem("p1", "4-1=", "3", "3\n#### 3")
    renderer = PromptRenderer(tokenizer, "templates:student", "templates:teacher")
    assert tokenizer.decode(renderer.student(problem)) == "<|user|>4 - 1 =<|end|><|assistant|>"
    asked = "<|user|>4 - 1 =<|end|>"
    assert (
        tokenizer.decode(renderer.teacher(problem, solution_of(problem)))
        == f"{asked}<|assistant|>3\n#### 3<|end|>{asked}<|assistant|>"
    )
    check_prompts([problem], renderer, 64, vocab_size=None, teacher=teacher_of(renderer))
    # One may be a function and the other a file.
    mixed = PromptRenderer(tokenizer, "templates:student", "teacher_bare.jinja")
    assert (
        tokenizer.decode(mixed.teacher(problem, solution_of(problem))) == "<|user|>4-1=\n3\n#### 3<|end|><|assistant|>"
    )


def test_what_the_functions_get(tokenizer, mine):
    renderer = PromptRenderer(tokenizer, "mine:shows_all", "mine:shows_all")
    # Neither answer nor solution, which would leak.
    assert renderer.makers["student"].message(*student_arguments(PROBLEM)) == repr((Problem("p1", "4 - 1 =", "", ""),))
    assert message_of(renderer, PROBLEM) == repr((PROBLEM, PROBLEM.reference_solution))


def test_chat_messages_go_through_the_chat_template(tokenizer, mine):
    renderer = PromptRenderer(tokenizer, "mine:chat", "mine:chat")
    assert tokenizer.decode(renderer.student(PROBLEM)) == "<|system|>Add.<|end|><|user|>4 - 1 =<|end|><|assistant|>"


def test_a_function_of_text_needs_no_chat_template(mine):
    tokenizer = word_tokenizer()
    renderer = PromptRenderer(tokenizer, "mine:same", "mine:same")
    assert renderer.student(PROBLEM) == PromptRenderer(tokenizer).student(PROBLEM)
    with pytest.raises(TemplateError, match="data.template=mine:chat on problem 'p1'.*no chat template; return text"):
        PromptRenderer(tokenizer, "mine:chat").student(PROBLEM)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "fails",
            r"IndexError: string index out of range; mend the function, which is called with \(problem, privileged\)",
        ),
        ("needs_more", r"TypeError: .*'hint'; mend the function, which is called with \(problem, privileged\)"),
        ("nothing", "gave None; return text, or chat messages"),
        ("empty", "gave an empty text; return text"),
        ("no_turns", r"gave \[\]; return"),
        ("no_role", r"gave \{'content': '4'\} among its messages; return"),
        ("no_text", r"gave \{.*None\} among its messages; return"),
        ("assistant_last", "whose last is the assistant's"),
        ("counted", "gives another message each time; make it depend on the problem alone"),
        ("grows", "gives another message each time"),
        ("same", "gives the student's prompt; show the privileged text"),
    ],
)
def test_functions_that_fail_are_named_before_the_run(tokenizer, mine, name, said):
    renderer = PromptRenderer(tokenizer, None, f"mine:{name}")
    with pytest.raises(TemplateError, match=rf"teacher\.template=mine:{name} on problem 'p1'.*{said}") as caught:
        check_prompts([PROBLEM], renderer, 100, vocab_size=None, teacher=teacher_of(renderer))
    assert "\n" not in str(caught.value)


def test_messages_that_the_chat_template_refuses(mine):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{{ "
        "m.content }}{% endfor %}"
    )
    with pytest.raises(
        TemplateError,
        match=r"data\.template=mine:chat on problem 'p1'.*\(system, user\): no system turn; return messages",
    ):
        PromptRenderer(word_tokenizer(template), "mine:chat").student(PROBLEM)


@pytest.mark.parametrize("name", ["strange", "strange_chat"])
def test_text_of_functions_without_a_token_is_refused(tokenizer, mine, name):
    with pytest.raises(DataError, match="'p1': the student's prompt has '\u2019'"):
        check_prompts([PROBLEM], PromptRenderer(tokenizer, f"mine:{name}"), 100, vocab_size=None)


def test_functions_that_cannot_be_found_are_refused(tokenizer, mine):
    with pytest.raises(ConfigError, match="teacher.template=mine:absent: AttributeError"):
        PromptRenderer(tokenizer, None, "mine:absent")
    with pytest.raises(TemplateError, match=r"data\.template: mine\.same does not exist.*or module:function"):
        PromptRenderer(tokenizer, "mine.same")
