"""What of a row is the problem, the answer and the solution, and what is none."""

from __future__ import annotations

import decimal
import math
from typing import Any

import pytest

from dasd_megatron.data.columns import Columns, Remedies, parse_record
from dasd_megatron.data.prompts import DataError
from dasd_megatron.data.rows import Number

REMEDIES = Remedies("give --problem-field", "give --answer-field", "give --solution-field")


def parse(record: dict[str, Any], **fields: Any) -> tuple[str, str, str]:
    problem, _ = parse_record(record, "file line 1", "id", Columns(REMEDIES, needs_solution=False, **fields))
    return problem.problem, problem.expected_answer, problem.reference_solution


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1/2", "1/2"),
        (" $\\frac{1}{2}$ ", "\\frac{1}{2}"),
        ("$1$ or $2$", "$1$ or $2$"),
        ("$$5$$", "$$5$$"),
        (7, "7"),
        (0, "0"),
        (27.0, "27"),
        (2.5, "2.5"),
        (1e22, "1e+22"),
        (decimal.Decimal("3.140"), "3.14"),
        (Number("27.0"), "27"),
        (Number("2.50"), "2.5"),
        (Number("1e400"), "1e400"),
        (Number("7" * 5000), "7" * 5000),
        (["1", "2"], "1, 2"),
        (["$1$", 2, Number("3.0")], "1, 2, 3"),
        (["$(1,2)$"], "(1,2)"),
        ('["1", "2"]', "1, 2"),
        ('["\\\\frac{1}{2}"]', "\\frac{1}{2}"),
        ("[1, 2]", "[1, 2]"),
        ("[0, 1) \\cup (2, 3]", "[0, 1) \\cup (2, 3]"),
        (["\\boxed{1}", "$\\boxed{2}$"], "1, 2"),
        ('["\\\\boxed{1}", "2"]', "1, 2"),
        ("\\boxed{42}", "42"),
        ("$\\boxed{42}$", "42"),
        ("So it is \\boxed{42}.", "42"),
        ("6*7=42\n#### 42", "42"),
        ("#### 1,072\n\n", "1,072"),
        ("a\n#### 5\nb", "a\n#### 5\nb"),
        ("{1, 2}", "{1, 2}"),
        ("(A)", "(A)"),
    ],
)
def test_answers(value: Any, text: str) -> None:
    assert parse({"problem": "p", "answer": value})[1] == text
    # What was read once reads the same again.
    assert parse({"problem": "p", "expected_answer": text})[1] == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "is true; an answer must be a string or a finite number"),
        (math.nan, "is NaN; an answer must be"),
        (math.inf, "is Infinity; an answer must be"),
        (decimal.Decimal("NaN"), "an answer must be"),
        ({"a": 1}, 'is {"a": 1}; an answer must be'),
        ([["1"]], "an answer must be"),
        (['["1"]'], "an answer must be"),
        (["1", None], "is null; an answer must be"),
        (b"1", 'is "a bytes"; an answer must be'),
        ("['1', '2']", "a list of answers that is not JSON"),
        ('["1", "2"', "a list of answers that is not JSON"),
        ('["\\frac{1}{2}"]', r"has the control character '\\x0c'; most likely a backslash of LaTeX was lost"),
        ("\x0crac{1}{2}", "has the control character"),
        ("\ud800", "holds half of a surrogate pair at character 0"),
        ("proof", "stands for a missing one"),
        (["proof"], "stands for a missing one"),
        ([], "no answer"),
        ("", "no answer"),
        (None, "no answer"),
        ("#### ", "no answer"),
    ],
)
def test_what_is_no_answer(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse({"problem": "p", "answer": value})
    assert str(caught.value).startswith("file line 1: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("$11\\cdot 11=\\boxed{121}$.", "121"),
        ("First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("Two.\n#### 2", "2"),
        (["one", "so \\boxed{2}"], "2"),
    ],
)
def test_the_mark_of_a_solution_gives_the_answer(solution: Any, answer: str) -> None:
    assert parse({"problem": "p", "solution": solution})[1] == answer
    # Null and empty answers are none.
    assert parse({"problem": "p", "solution": solution, "answer": None, "final_answer": []})[1] == answer
    # An answer in the file counts more.
    assert parse({"problem": "p", "solution": solution, "answer": "7"})[1] == "7"


def test_an_answer_field_with_a_worked_solution_gives_both() -> None:
    text = "Multiplying, $11\\cdot 11=\\boxed{121}$."
    assert parse({"problem": "p", "solution": text}, answer="solution", solution="solution") == ("p", "121", text)
    assert parse({"problem": "p", "answer": text}) == ("p", "121", text)
    assert parse({"problem": "p", "answer": "$\\boxed{121}$"}) == ("p", "121", "")


def test_a_solution_that_is_the_answer_alone_is_none() -> None:
    assert parse({"problem": "p", "answer": "7", "solution": "$7$."})[2] == ""
    assert parse({"problem": "p", "answer": "7", "solution": "7"}, solution="solution")[2] == "7"


def test_calculator_marks_are_removed_and_other_signs_stay() -> None:
    assert parse({"problem": "p", "answer": "1", "solution": "48/2 = <<48/2=24>>24"})[2] == "48/2 = 24"
    text = "as x << 1 and y >> 2 and <<a=b>>"
    assert parse({"problem": "p", "answer": "1", "solution": text})[2] == text


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "What?"}, "What?"),
        ({"prompt": MESSAGES}, "What?"),
        ({"prompt": MESSAGES[1:]}, "What?"),
        ({"prompt": '[{"role": "user", "content": "What?"}]'}, "What?"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]}, "What?"),
        ({"prompt": MESSAGES, "extra_info": {"question": "Bare?"}}, "Bare?"),
        ({"prompt": MESSAGES, "problem": "P?"}, "P?"),
        ({"prompt": "What?", "extra_info": {"index": 1}}, "What?"),
        ({"problem": '[{"role": "user", "content": "What?"}]'}, '[{"role": "user", "content": "What?"}]'),
        ({"prompt": '[{"role" is a word'}, '[{"role" is a word'),
        ({"question": "Q?", "context": "C."}, "C.\nQ?"),
        ({"question": "Q?", "context": None}, "Q?"),
        ({"problem": "P?", "image": None, "images": []}, "P?"),
    ],
)
def test_problems(record: dict[str, Any], problem: str) -> None:
    assert parse({**record, "answer": "1"})[0] == problem


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [*MESSAGES, MESSAGES[1]]}, "has the messages 'system, user, user'; a problem is one user message"),
        ({"prompt": [*MESSAGES, {"role": "assistant", "content": "a"}]}, "has the messages 'system, user, assistant'"),
        ({"prompt": MESSAGES[:1]}, "has the messages 'system'"),
        ({"prompt": [{"role": "user"}]}, "the user message of field 'prompt' is null, not text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is .*, not text"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "has the messages"),
        ({"prompt": [{"content": "x"}]}, "not a string or a list of chat messages; give --problem-field"),
        ({"problem": 5}, "field 'problem' is 5, not a string or a list"),
        ({"problem": Number("1e400")}, "field 'problem' is \"1e400\", not a string"),
        ({"problem": " \n"}, "field 'problem' is empty"),
        ({"problem": "\udc00"}, "half of a surrogate pair"),
        ({"problem": "P?", "image_1": {"bytes": b"x"}}, "field 'image_1' holds an image"),
        ({}, r"no problem \(fields: 'answer'\)"),
        ({f"x{number}": 1 for number in range(1000)}, r"no problem \(fields: 'x0'.*\.\.\.\)"),
    ],
)
def test_what_is_no_problem(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse({**record, "answer": "1"})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_named_fields_are_the_only_ones() -> None:
    record = {"problem": "P?", "q": {"text": ["A?", "B?"]}, "answer": "1", "a.b": "2", "a": {"b": "3"}}
    assert parse(record, problem="q.text.1", answer="a.b")[:2] == ("B?", "2")
    for name in ("q.text.2", "q.text.-1", "q.text.1.x", "nothing", "q..text", "q.text.99999999999999999999"):
        with pytest.raises(DataError, match="no problem"):
            parse(record, problem=name)
    with pytest.raises(DataError, match=r"no answer \(fields: .*\): field 'z' is absent or empty, .* --answer-field"):
        parse(record, answer="z")


def test_deep_values_are_named() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for name in ("problem", "answer", "solution", "id"):
        with pytest.raises(DataError, match="is a list|is \\["):
            parse({"problem": "P?", "answer": "1", name: deep})
