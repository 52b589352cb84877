r"""One spelling: what is the same notation becomes the same text, and arbitrary text costs little."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dasd_megatron.config import VerifyConfig
from dasd_megatron.verify import Grader
from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.comparison import compare_answers
from dasd_megatron.verify.normalize import normalize

PIECES = (
    r"\frac", r"\dfrac", r"\sqrt", r"\text", r"\textbf", r"\mathrm", r"\boldsymbol", r"\textcolor{red}", r"\color",
    r"\rm",
    r"\left", r"\right", r"\overline", r"\circ", r"\degree", r"\pi", r"\pm", r"\infty", r"\cup", r"\in", r"\boxed",
    r"\\",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\{", r"\}", r"\,", r"\!", r"\lor", r"\approx", r"\sin", r"\le", "{",
    "}", "(", ")", "[", "]",
    ",", ";", ":", ".", "$", "~", "^", "_", "=", "+", "-", "*", "/", "!", "%", "|", "&", "'", " ", "\n", "0", "1",
    "7", "12", "e", "i",
    "x", "C", "th", "sqrt", "or", "and", "cm", "answer is", "√", "½", "²", "₂", "°", "π", "−", "４", "ﬀ", "\u2028",
    "\x00",
)  # fmt: skip
FORMULA_LIKE = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
ANY_TEXT = st.one_of(FORMULA_LIKE, st.text(max_size=60))


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        (r"\mathrm{e}^2", "e^{2}"),
        ("½", r"\frac{1}{2}"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}"),
        ("√(2+√3)", r"\sqrt{2+\sqrt{3}}"),
        ("3½", r"\frac{7}{2}"),
        (r"72 \mathrm{~m}", r"72 \text{m}"),
        (r"\pi\mathrm{i}", r"\pi i"),
        (r"\varnothing", r"\emptyset"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        ("x^12", "x^{12}"),
        (r"7^{\text{th}}", "7"),
        ("8$,$4", "8, 4"),
        ("ＡＢ", "AB"),
        (r"\operatorname{arctan} x", r"\arctan x"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("12", "12"),
    ],
)
def test_one_spelling(written: str, spelled: str) -> None:
    assert normalize(written) == spelled


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
@example(r"\text{\textbf{\text{4}}}")
@example(r"\\\\frac12")
def test_a_spelling_is_its_own(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT, ANY_TEXT)
def test_comparison_never_fails(one: str, other: str) -> None:
    assert compare_answers(one, other) in (True, False, None)
    assert compare_answers(one, one) is True
    answer = extract_answer(one)
    assert answer is None or answer.strip()


@pytest.fixture(scope="module")
def grader():
    with Grader(VerifyConfig(workers=1, timeout_seconds=1.0)) as grader:
        grader.grade([r"\boxed{x+x}"], ["2x"])
        yield grader


@settings(deadline=None, max_examples=4)
@given(st.lists(st.tuples(FORMULA_LIKE, FORMULA_LIKE), min_size=8, max_size=8))
def test_grading_is_bounded(grader: Grader, pairs: list[tuple[str, str]]) -> None:
    started = time.monotonic()
    verdicts = grader.grade([f"\\boxed{{{one}}}" for one, _ in pairs], [other for _, other in pairs])
    assert len(verdicts) == len(pairs)
    # Each pair is given up after a second, and a worker is started anew in less than four.
    assert time.monotonic() - started < 5 * len(pairs)


@pytest.mark.parametrize(
    "piece", [*PIECES, r"\text{", r"\frac{", r"\frac1", "(√", "1/", "1 ", "^(", "x^{", "1,", "#### "]
)
def test_time_is_linear(piece: str) -> None:
    long = piece * (2_000 // len(piece))
    started = time.process_time()
    for text in (long, long + "7", "{" + long, "1" + long):
        compare_answers(text, "7 " + text)
    assert time.process_time() - started < 2
