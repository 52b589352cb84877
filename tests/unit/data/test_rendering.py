"""Chat templates give what transformers makes of them, on one date, and their failures are one line."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dasd_megatron.data.rendering import ChatTemplate, MessageTemplate, RenderError
from tests.support.chat_templates import DATED, PARTS, THINKING, tokenizer_with

TURNS = [{"role": "system", "content": 'Say "é" & add. '}, {"role": "user", "content": "1 + 1 <b>"}]
LIKE_PUBLISHED = [
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
    "{%- for m in messages %}\n  {% if loop.first %}\n    {{- bos_token }}{{ eos_token }}\n  {% endif %}\n"
    "{{ m['content'] }}\n{%- endfor %}\n{% if add_generation_prompt %}\nbot:{% endif %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson(indent=2) }}{% endfor %}",
    "{% set ns = namespace(last=0) %}{% for m in messages[::-1] %}{% set ns.last = loop.index0 %}{% break %}"
    "{% endfor %}{{ ns.last }}{{ messages[ns.last].content.split(' ')[0] }}{{ tools is none }}{{ absent }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ messages[0] | tojson }}",
    "{% macro show(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    THINKING,
]


@pytest.mark.parametrize("source", LIKE_PUBLISHED)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_the_text_is_that_of_transformers(source: str, kwargs: dict[str, bool]) -> None:
    tokenizer = tokenizer_with(source)
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, **kwargs)
    assert ChatTemplate(source, {**tokenizer.special_tokens_map, **kwargs}).render(TURNS) == expected


@pytest.fixture(params=["UTC", "XXX12", "XXX-13"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("zone")
def test_the_date_is_the_given_one_in_every_time_zone() -> None:
    turns = [{"role": "user", "content": "What is 2+3?"}]
    expected = "<|user|>Today: 28 Nov 2026\nWhat is 2+3?<|end|><|assistant|>"
    assert ChatTemplate(DATED, date="2026-11-28").render(turns) == expected
    # A model's own variable goes before the clock, as in Llama 3.2's.
    kwargs = {"date_string": "26 Jul 2024"}
    assert ChatTemplate(DATED, kwargs).render(turns) == expected.replace("28 Nov 2026", "26 Jul 2024")


def test_a_date_that_is_not_given_is_not_made_up() -> None:
    assert ChatTemplate(DATED).shows_date and not ChatTemplate(THINKING).shows_date
    with pytest.raises(RenderError, match=r"strftime_now.*no date is given; write data\.date"):
        ChatTemplate(DATED).render(TURNS)


def test_a_template_of_parts_gets_parts() -> None:
    assert ChatTemplate(PARTS).render(TURNS[1:]) == "<|user|>1 + 1 <b><|end|><|assistant|>"
    # One that fails on a text is asked in parts too, and one that shows a text is not.
    indexing = "{% for m in messages %}{{ m.content[0]['text'] + '' }}{% endfor %}"
    assert ChatTemplate(indexing).render(TURNS[1:]) == "1 + 1 <b>"
    either = "{{ messages[0].content if messages[0].content is string else 'parts' }}"
    assert ChatTemplate(either).render(TURNS[1:]) == "1 + 1 <b>"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}<|user|>\n{{ m['content'] + 1 }}{% endfor %}", r"TypeError: .*\"int\".* \(line 2\)$"),
        ("{{ raise_exception('System role\n not supported') }}", "^System role$"),
        ("{{ raise_exception('\x1b[2J') }}", r"^\[2J$"),
        ("{{ raise_exception('x' * 10000) }}", "^x{1000}$"),
        ("a\n{% if %}", "^line 2: Expected an expression"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages | random }}", "draws at random"),
        ("{{ lipsum() }}", "draws at random"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ '%s' % strftime_now(5) }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ 'x' * 2**22 }}.", "more than 4,194,304 characters"),
    ],
)
def test_failures_are_one_line(source: str, said: str) -> None:
    with pytest.raises(RenderError, match=said) as caught:
        ChatTemplate(source, date="2026-11-28").render(TURNS)
    assert "\n" not in str(caught.value)


def test_message_templates_know_their_variables() -> None:
    names = ("problem", "privileged")
    assert MessageTemplate("{{ problem }} {{ privileged }}", names).inspect() == {"unknown": [], "hidden": []}
    assert MessageTemplate("{{ problem }} {{ x }}", names).inspect() == {"unknown": ["x"], "hidden": []}
    assert MessageTemplate("{{ problem }}", names).inspect() == {"unknown": [], "hidden": ["privileged"]}
    # The clock is no variable of theirs.
    assert MessageTemplate("{{ strftime_now('%d') }}", names).inspect()["unknown"] == ["strftime_now"]
    assert ChatTemplate(THINKING).inspect() == {"reads": ["add_generation_prompt", "enable_thinking", "messages"]}
