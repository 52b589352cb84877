"""Whatever a template says, its trial ends within the limits with a text or with one line, and harms nothing here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.data.render_process import RenderLimits, RenderProcess, text_digest
from dasd_megatron.data.rendering import ChatTemplate, MessageTemplate, RenderError
from tests.support.chat_templates import DATED, THINKING

TURNS = [{"role": "user", "content": "1 + 1"}]
SHORT = RenderLimits(seconds=0.3, memory_bytes=2**27)


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    with RenderProcess(SHORT) as process:
        yield process


def rendered(process: RenderProcess, source: str) -> list[str]:
    return process.digests(ChatTemplate(source), [TURNS])


def test_the_texts_are_those_that_are_rendered_here(process: RenderProcess) -> None:
    template = ChatTemplate(DATED, {"bos_token": "<s>"}, "2026-11-28")
    many = [[{"role": "user", "content": f"\ud800 é\u2028 {number}"}] for number in range(600)]
    assert process.digests(template, many) == [text_digest(template.render(turns)) for turns in many]
    # Texts that fill several requests, of which one cannot be rendered.
    large = [[{"role": "user", "content": letter * 2**19}] for letter in "abcdef"]
    assert process.digests(template, large) == [text_digest(template.render(turns)) for turns in large]
    picky = ChatTemplate("{% if 'e' in messages[0].content %}{{ raise_exception('no e') }}{% endif %}")
    with pytest.raises(RenderError, match="no e") as caught:
        process.digests(picky, large)
    assert caught.value.index == 4
    message = MessageTemplate("{{ problem|upper }}", ("problem",))
    assert process.digests(message, [{"problem": "a"}]) == [text_digest("A")]
    assert process.inspect(ChatTemplate(THINKING)) == ChatTemplate(THINKING).inspect()


def test_the_process_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DASD_API_KEY", "HF_TOKEN", "HARMLESS"):
        monkeypatch.setenv(name, "beside-templates")
    others = set(psutil.Process().children())
    with RenderProcess(SHORT) as process:
        rendered(process, "x")
        [child] = set(psutil.Process().children()) - others
        found = {name for name, value in child.environ().items() if value == "beside-templates"}
    assert found == {"HARMLESS"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 0.3 s"),
        # Constants are computed when a template is read, and no signal handler of Python would get a turn.
        ("{{ 10 ** (10 ** 10) }}", "does not end within 0.3 s|too much memory"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ [messages] * 10**9 }}", "too much memory"),
        ("{{ '%9999999999d' % 1 }}", "too much memory"),
        ("{{ 'x'|center(10**10) }}", "too much memory"),
        (
            "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
            "characters",
        ),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "RecursionError"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError|SyntaxError|ends the process"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "too much memory|does not end",
        ),
    ],
)
def test_what_never_ends_or_fills_the_memory_ends_its_process_alone(
    process: RenderProcess, source: str, said: str
) -> None:
    started = time.process_time()
    with pytest.raises(RenderError, match=said) as caught:
        rendered(process, source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1100
    assert time.process_time() - started < 1
    # The next template is tried all the same.
    assert rendered(process, "{{ messages[0].content }}") == [text_digest("1 + 1")]


def test_slow_renders_are_bounded_in_their_sum() -> None:
    slow = ChatTemplate("{% for i in range(99999) %}{% for j in range(4) %}{% endfor %}{% endfor %}")
    limits = RenderLimits(seconds=2.0, seconds_at_first=0.5, seconds_each=0.001)
    with RenderProcess(limits) as process, pytest.raises(RenderError, match="does not end"):
        process.digests(slow, [TURNS] * 200)


def test_a_text_that_depends_on_the_process_is_another_here(process: RenderProcess) -> None:
    # The time zone of the process is another, and so are its addresses.
    assert rendered(process, "{{ messages[0].items }}") != [
        text_digest(ChatTemplate("{{ messages[0].items }}").render(TURNS))
    ]
    seconds = ChatTemplate("{{ strftime_now('%s') }}", date="2026-11-28")
    assert process.digests(seconds, [TURNS]) != [text_digest(seconds.render(TURNS))]


WORDS = st.sampled_from(
    [
        *(
            "{{",
            "}}",
            "{%",
            "%}",
            "{#",
            "#}",
            "{%-",
            "-%}",
            "\n",
            " ",
            "messages",
            "m",
            "m.content",
            "loop",
            "range(9)",
        ),
        *(
            "for m in messages",
            "endfor",
            "if m",
            "else",
            "endif",
            "set x = 3",
            "x",
            "'text'",
            "1",
            "* 10 ** 9",
            "|upper",
        ),
        *("|tojson", "|random", "strftime_now('%d')", "raise_exception('no')", "macro f(x)", "endmacro", "f(1)", "."),
        *(
            "__class__",
            "break",
            "generation",
            "endgeneration",
            "namespace(a=1)",
            "~",
            "[0]",
            "(",
            ")",
            "\u2028",
            "\x00",
        ),
    ]
)
TEMPLATES = st.one_of(
    st.lists(WORDS, max_size=25).map(" ".join),
    st.text(max_size=40),
    # Expressions and loops that can be read more often than words in any order.
    st.lists(st.builds("{{{{ {} {} }}}}".format, WORDS, WORDS), max_size=4).map("".join),
    st.builds("{{% for m in messages %}}{}{{{{ m.content {} }}}}{{% endfor %}}".format, WORDS, WORDS),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=TEMPLATES)
def test_any_text_is_rendered_or_refused_in_one_line(process: RenderProcess, source: str) -> None:
    template = ChatTemplate(source, date="2026-11-28")
    try:
        process.inspect(template)
        [digest] = process.digests(template, [TURNS])
    except RenderError as error:
        assert len(str(error).splitlines()) == 1
    else:
        # What the process has rendered can be rendered here; addresses are the only difference.
        text = template.render(TURNS)
        assert text_digest(text) == digest or " at 0x" in text
