from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from dasd_megatron.config import DataSourceConfig, load_config
from dasd_megatron.data.prompts import DataError, NoAnswerError, Problem, check_disjoint
from dasd_megatron.data.reader import load_problems, stem_of
from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.comparison import compare_answers

DATA = Path(os.environ.get("DASD_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason=f"no benchmark files in {DATA}; set DASD_TEST_DATA to a folder with gsm8k, math500 and aime24",
)

GOOD = {"problem": "1 + 1 =", "expected_answer": "2", "reference_solution": "1+1=2\n#### 2"}


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, **fields) -> DataSourceConfig:
        path = tmp_path / "set.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return DataSourceConfig(path=str(path), **fields)

    return write


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_plain_file(write):
    source = write(lines({**GOOD, "id": "a"}, GOOD, {**GOOD, "id": 7}))
    expected = [Problem(id, "1 + 1 =", "2", "1+1=2\n#### 2") for id in ("a", "set-1", "7")]
    assert load_problems(source, "train") == expected


def test_byte_order_mark_blank_lines_and_line_ends_are_tolerated(write):
    record = json.dumps({**GOOD, "problem": "a\u2028b"}, ensure_ascii=False)
    source = write(f"\ufeff{record}\r\n\r\n  \n{record}".encode())
    assert [(problem.id, problem.problem) for problem in load_problems(source, "train")] == [
        ("set-0", "a\u2028b"),
        ("set-3", "a\u2028b"),
    ]


def test_size_takes_the_head_and_reads_no_further(write):
    source = write(lines(GOOD, GOOD) + "not JSON\n", size=2)
    assert len(load_problems(source, "train")) == 2


@pytest.mark.parametrize(("value", "text"), [(72, "72"), (-3, "-3"), (2.5, "2.5"), (" 1/2 ", "1/2"), (0, "0")])
def test_answers_become_text(write, value, text):
    (problem,) = load_problems(write(lines({**GOOD, "expected_answer": value})), "train")
    assert problem.expected_answer == text


@pytest.mark.parametrize("answer_field", ["expected_answer", "answer"])
def test_gsm8k_style(write, answer_field):
    record = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>1,072.\n#### 1,072\n"}
    source = write(lines(record), problem_field="question", solution_field="answer", answer_field=answer_field)
    assert load_problems(source, "train") == [
        Problem("set-0", "How many?", "1,072", "48/2 = 24 clips.\nIn all 1,072.\n#### 1,072")
    ]
    source.solution_field = "reference_solution"
    source.answer_field = "answer"
    assert load_problems(source, "train") == [
        Problem("set-0", "How many?", "1,072", "48/2 = 24 clips.\nIn all 1,072.\n#### 1,072")
    ]
    source = DataSourceConfig(path=source.path)
    assert load_problems(source, "train") == [
        Problem("set-0", "How many?", "1,072", "48/2 = 24 clips.\nIn all 1,072.\n#### 1,072")
    ]


def test_an_answer_field_wins_over_the_solution(write):
    (problem,) = load_problems(write(lines({**GOOD, "expected_answer": "3"})), "train")
    assert problem.expected_answer == "3"


def test_a_solution_may_be_missing_only_on_request(write):
    for solution in ({}, {"reference_solution": ""}, {"reference_solution": None}):
        source = write(lines({"problem": "1", "expected_answer": "2", **solution}))
        assert load_problems(source, "heldout", needs_solution=False)[0].reference_solution == ""
        with pytest.raises(
            DataError,
            match=r"set.jsonl line 1: no reference solution \(fields: 'problem', .*\): each of reference_solution, "
            r"solution, .* set data.heldout.solution_field",
        ):
            load_problems(source, "heldout")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        (lines(GOOD) + "{oops\n", r"line 2: not JSON \(.*column 2\)"),
        ("[" * 100_000, r"line 1 \(element 1\): not JSON \(nested too deeply\)"),
        ('{"a":' * 100_000, r"line 1: not JSON \(nested too deeply\)"),
        ("\n[1]\n", r"line 2 \(element 1\): a JSON int, not an object"),
        ("null\n", "line 1: a JSON NoneType, not an object"),
        (
            lines({"text": "1"}),
            r"line 1: no problem \(fields: 'text'\): each of problem, question, .*; set data.train.problem_field",
        ),
        (lines({}), r"no problem \(fields: none\)"),
        (lines({**GOOD, "problem": 5}), "line 1: field 'problem' is 5, not a string"),
        (lines({**GOOD, "problem": None}), "line 1: no problem"),
        (lines({**GOOD, "problem": " \n"}), "line 1: field 'problem' is empty"),
        (lines({**GOOD, "problem": "\ud800"}), "line 1: field 'problem' holds half of a surrogate pair at character 0"),
        (lines({**GOOD, "reference_solution": ["a", 1]}), r"field 'reference_solution' is \[\"a\", 1\], not a string"),
        (
            lines({"problem": "1", "reference_solution": "two"}),
            r"line 1: no answer \(fields: 'problem', 'reference_solution'\).*set data.train.answer_field",
        ),
        (lines({**GOOD, "expected_answer": " ", "reference_solution": "x"}), "line 1: no answer"),
        (lines({"problem": "1", "reference_solution": "#### "}), "line 1: no answer"),
        (lines({**GOOD, "expected_answer": True}), "field 'expected_answer' is true; an answer must be"),
        (lines({**GOOD, "expected_answer": [["2"]]}), "an answer must be a string or a finite number"),
        ('{"problem": "1", "expected_answer": NaN}\n', "field 'expected_answer' is NaN"),
        (lines({**GOOD, "id": "a"}, GOOD, {**GOOD, "id": "a"}), "line 3: id 'a' already stands on line 1"),
        (lines({**GOOD, "id": 7.0}), "field 'id' is \"7.0\"; an id must be"),
        (lines({**GOOD, "id": ["a"]}), "field 'id' is"),
        (lines(GOOD).encode() + b'{"problem": "\xff"}\n', "line 2: not UTF-8 at byte 13"),
        (lines(GOOD).encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_bad_content_is_refused(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_problems(write(content), "train")
    assert "set.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_shorter_than_asked_for_is_refused(write):
    with pytest.raises(DataError, match=r"holds 1 problems, but data\.train\.size asks for 2"):
        load_problems(write(lines(GOOD), size=2), "train")
    with pytest.raises(DataError, match=r"data\.train\.size is 0"):
        load_problems(write(lines(GOOD), size=0), "train")


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl does not exist; set data\.heldout\.path"):
        load_problems(DataSourceConfig(path=str(tmp_path / "absent.jsonl")), "heldout")
    with pytest.raises(DataError, match=r"is a folder without a .parquet, .jsonl or .json file; set data\.train\.path"):
        load_problems(DataSourceConfig(path=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"data\.train\.path is not set"):
        load_problems(DataSourceConfig(), "train")


REPEATED = lines(*({"problem": f"p{index % 5}?", "answer": str(index % 5)} for index in range(15)))


def test_problems_that_repeat_are_said_in_training_and_refused_in_evaluation(write):
    said = []
    source = write(REPEATED)
    assert len(load_problems(source, "train", needs_solution=False, say=said.append)) == 15
    assert "15 problems, 5 distinct: line 6 repeats line 1; tools/prepare_data.py drops" in said[-1]
    with pytest.raises(DataError, match="set.jsonl: 15 problems, 5 distinct: line 6 repeats line 1; confidence"):
        load_problems(source, "heldout", needs_solution=False)
    source.size = 5
    assert len(load_problems(source, "heldout", needs_solution=False)) == 5


def test_where_problems_were_found_is_said_for_files_of_others_alone(write):
    said = []
    load_problems(write(lines(GOOD)), "train", say=said.append)
    assert said == []
    source = write(
        lines(
            {"question": "1", "answer": "2", "solution": "x"},
            {"question": "3", "solution": "#### 4"},
            {"question": "5", "answer": "2+4=6\n#### 6"},
        )
    )
    load_problems(source, "train", say=said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "1 row: problem from question, answer from answer, solution from solution",
        "1 row: problem from question, answer from the marked answer of solution, solution from solution",
        "1 row: problem from question, answer from the marked answer of answer, solution from answer",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "proof", "NotFound", "not found.", " N/A ", "None", "$proof$", "\\boxed{notfound}", "\\text{not found}",
        "\\boxed{\\text{None}}",
    ],
)  # fmt: skip
def test_words_for_a_missing_answer_are_no_answers(write, answer):
    source = write(lines({**GOOD, "expected_answer": answer, "reference_solution": "\\boxed{3}"}))
    with pytest.raises(DataError, match=r"line 1: no answer: .* stands for a missing one.*prepare_data"):
        load_problems(source, "train")
    source.no_answer = []
    assert len(load_problems(source, "train")) == 1


@pytest.mark.parametrize("answer", ["\\boxed{}", "$", "$$", "\\text{ }"])
def test_signs_that_show_nothing_are_no_answers(write, answer):
    with pytest.raises(NoAnswerError, match=r"line 1: no answer.* set data\.train\.answer_field"):
        load_problems(write(lines({**GOOD, "expected_answer": answer})), "train")


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("a/b.jsonl.gz", "b"),
        ("b.v2.json", "b.v2"),
        ("b", "b"),
        (".", tmp_path.name),
        ("a/..", tmp_path.name),
    ):
        assert stem_of(Path(path)) == name


def test_settings_of_a_source_are_overridden_on_the_command_line(tmp_path):
    (tmp_path / "set-0.jsonl").write_text(lines(GOOD))
    config = load_config(
        [
            "experiment=quickstart",
            "data=jsonl",
            f"data.train.path='{tmp_path}/set-*.jsonl'",
            f"data.heldout.path={tmp_path}",
            "data.train.no_answer=[]",
            "data.train.problem_field=a.b",
            "data.heldout.no_answer=[x]",
        ]
    )
    assert (config.data.train.no_answer, config.data.train.problem_field) == ([], "a.b")
    assert config.data.heldout.no_answer == ["x"] and config.data.heldout.answer_field is None


def test_an_answer_that_cannot_be_graded_is_refused(write):
    source = write(lines({**GOOD, "expected_answer": "7" * 513}))
    assert len(load_problems(source, "train")) == 1
    with pytest.raises(DataError, match=r"line 1: expected_answer is an answer of 513 .* verify.max_answer_chars=512"):
        load_problems(source, "train", max_answer_chars=512)


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k(split, count):
    source = DataSourceConfig(
        path=str(DATA / "gsm8k" / f"{split}.jsonl"), problem_field="question", solution_field="answer"
    )
    problems = load_problems(source, "train")
    assert len(problems) == count
    for problem in problems:
        assert "<<" not in problem.reference_solution
        assert extract_answer(problem.reference_solution) == problem.expected_answer
        # Every GSM8K answer is a plain integer.
        assert compare_answers(problem.expected_answer, str(int(problem.expected_answer.replace(",", "")))) is True


@needs_data
def test_math500():
    source = DataSourceConfig(
        path=str(DATA / "math500" / "test.jsonl"), answer_field="answer", solution_field="solution"
    )
    problems = load_problems(source, "heldout")
    assert len(problems) == 500
    verdicts = Counter(
        compare_answers(extract_answer(problem.reference_solution), problem.expected_answer) for problem in problems
    )
    assert verdicts == {True: 500}


@needs_data
def test_aime24():
    problems = load_problems(DataSourceConfig(path=str(DATA / "aime24" / "test.jsonl")), "heldout")
    assert [problem.id for problem in problems] == [f"aime24-{i}" for i in range(30)]
    assert all(0 <= int(problem.expected_answer) <= 999 for problem in problems)


@needs_data
def test_gsm8k_splits_are_disjoint():
    train, test = (
        load_problems(
            DataSourceConfig(
                path=str(DATA / "gsm8k" / f"{split}.jsonl"), problem_field="question", solution_field="answer"
            ),
            split,
        )
        for split in ("train", "test")
    )
    check_disjoint(train, test)
