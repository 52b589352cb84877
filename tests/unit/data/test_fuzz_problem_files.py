"""Whatever a problem file holds, its readers take the same rows of it, or say in one line what is wrong."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.data.prompts import normalize_text, read_written_problems
from tests.support.problem_files import USERS, Outcome

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *(
                "1",
                "2",
                " ",
                "",
                "proof",
                "N/A",
                "$5$",
                "\\boxed{3}",
                "x\n#### 4",
                "#### ",
                '["1", "2"]',
                "['1']",
                "[1, 2]",
            ),
            *("\ud800", "\u2028", "\x85", "\x00", "\x0c", "<<1=1>>", "7" * 600, "{", "\\boxed{", "the answer is 6"),
            '[{"role": "user", "content": "q"}]',
        ]
    ),
)
SCALARS = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.sampled_from([10**40, 1e300, 0.5])
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": SCALARS}), max_size=3
)
VALUES = st.one_of(TEXTS, SCALARS, MESSAGES, st.lists(SCALARS, max_size=3), st.dictionaries(TEXTS, SCALARS, max_size=2))
NAMES = st.sampled_from(
    [
        "id",
        "problem",
        "question",
        "prompt",
        "expected_answer",
        "answer",
        "final_answer",
        "reference_solution",
        "solution",
    ]
)
GOOD_TEXTS = st.sampled_from(
    ["p", "q?", "P", "3\u00b2", "32", "a\u2028b", "\x85", "x << 1 >> y", '[{"role": "user"}]', "#### 2"]
)
GOOD_ANSWERS = st.one_of(
    st.sampled_from(
        ["1", "$5$", "\\boxed{3}", "x\n#### 4", '["1", "2"]', "[1, 2]", "\\boxed{\\boxed{6}}", "#### #### 7"]
    ),
    st.lists(st.sampled_from(["1", "$2$", "\\boxed{3}", 4, 5.0]), min_size=1, max_size=3),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
GOOD_ROWS = st.builds(
    lambda problem, answer, row: {problem: row["problem"], answer: row["answer"], **row["rest"]},
    st.sampled_from(["problem", "problem", "question", "prompt"]),
    st.sampled_from(["answer", "expected_answer", "final_answer"]),
    st.fixed_dictionaries(
        {
            "problem": GOOD_TEXTS,
            "answer": GOOD_ANSWERS,
            "rest": st.fixed_dictionaries(
                {}, optional={"solution": GOOD_TEXTS | st.just("so \\boxed{8}"), "ground_truth": st.none()}
            ),
        }
    ),
)
ROWS = st.one_of(
    *[GOOD_ROWS] * 4,
    st.builds(dict.__or__, GOOD_ROWS, st.dictionaries(NAMES, VALUES, max_size=2)),
    st.dictionaries(NAMES | st.just("reward_model") | st.just("extra_info"), VALUES | st.just({"ground_truth": "8"})),
    SCALARS,
)
END = st.sampled_from(["\n", "\r\n", "\n\n"])


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Return a file of rows in one of the forms, perhaps damaged."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=60))
    rows: list[Any] = draw(st.lists(draw(st.sampled_from([GOOD_ROWS, GOOD_ROWS, ROWS])), max_size=4))
    is_ascii, indent, end = draw(st.booleans()), draw(st.sampled_from([None, None, 1])), draw(END)
    lines = [json.dumps(row, ensure_ascii=is_ascii, indent=indent) for row in rows]
    text = end.join(lines) if draw(st.booleans()) else "[" + f",{end}".join(lines) + "]"
    content = (draw(st.sampled_from(["", "\ufeff", "\n"])) + text + end).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + draw(st.integers(0, 3)) :]
    return gzip.compress(content, mtime=0) if draw(st.integers(0, 9)) == 0 else content


def check_outcome(outcome: Outcome, path: Path) -> None:
    assert bool(outcome.problems) != bool(outcome.error)
    assert "\n" not in outcome.error and len(outcome.error) < 2000
    if outcome.error:
        assert str(path) in outcome.error


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents())
def test_the_readers_agree_on_any_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        path.write_bytes(content)
        training, evaluation, preparation = (user(path) for user in USERS.values())
        for outcome in (training, evaluation, preparation):
            check_outcome(outcome, path)
        if "confidence" in evaluation.error:
            assert any("distinct" in line for line in training.said)
        else:
            assert evaluation.problems == training.problems
        if training.problems:
            kept: dict[str, Any] = {}
            for problem in training.problems:
                kept.setdefault(normalize_text(problem[0]), problem)
            assert preparation.problems == list(kept.values())
        elif preparation.problems:
            # Training stops at the row that preparation drops.
            assert " line " in training.error


@settings(max_examples=100, deadline=None)
@given(contents())
def test_what_was_prepared_reads_the_same_again(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        path.write_bytes(content)
        again = USERS["preparation"](path)
        output = Path(folder) / "set.jsonl-prepared.jsonl"
        if output.exists():
            written = read_written_problems(output)
            assert again.problems == [(row.problem, row.expected_answer, row.reference_solution) for row in written]
