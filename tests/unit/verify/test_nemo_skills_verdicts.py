"""Our verdicts beside those of NeMo-Skills 0.7.0 with math-verify 0.9.0, on a file of our making that it has graded.

``nemo_skills_graded.jsonl`` holds what NeMo-Skills said of each response; the test has every difference by name, and
docs/evaluation.md says why they are there.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from dasd_megatron.config import VerifyConfig
from dasd_megatron.verify import Grader

GRADED = [json.loads(line) for line in Path(__file__).with_name("nemo_skills_graded.jsonl").read_text().splitlines()]
# (category, answer as NeMo-Skills extracts it or the response's end, expected answer): whether we call it right. It
# says the opposite.
DIFFERENCES = {
    ("leading zeros", "025", "25"): True,
    ("leading zeros", "25", "025"): True,
    ("leading zeros", "007", "7"): True,
    ("leading zeros", "00", "0"): True,
    ("units", "18 dollars", "18"): True,
    # Repeating the problem as its own answer must not pay.
    ("expressions", "6+6", "12"): False,
    ("expressions", "3*4", "12"): False,
    # The number has the digits that are expected of it.
    ("radicals and powers", "e^{2}", "7.389"): True,
    ("other marks", "#### 4", "4"): True,
    ("other marks", "The answer is 4.", "4"): True,
    ("other marks", "The answer is: $4$.", "4"): True,
    ("thinking tags", r"<think>so it is \boxed{4}</think> Done.", "4"): True,
    ("thinking tags", r"<think>it must be \boxed{4}", "4"): True,
    ("thinking tags", r"it is \boxed{4}</think>", "4"): True,
}


def test_verdicts_differ_where_they_are_said_to_and_nowhere_else() -> None:
    with Grader(VerifyConfig(timeout_seconds=20)) as grader:
        verdicts = grader.grade([row["generation"] for row in GRADED], [row["expected_answer"] for row in GRADED])
    assert not any(verdict.timed_out for verdict in verdicts)
    found = {
        (row["category"], row["predicted_answer"] or row["generation"], row["expected_answer"]): verdict.correct
        for row, verdict in zip(GRADED, verdicts, strict=True)
        if verdict.correct != row["symbolic_correct"]
    }
    assert found == DIFFERENCES
    assert len(GRADED) - len(found) == 73
    assert Counter(row["symbolic_correct"] for row in GRADED) == {True: 61, False: 26}


def test_units_are_no_difference() -> None:
    assert {row["expected_answer"] for row in GRADED if row["category"] == "units"} >= {
        r"5\text{ inches}",
        "90",
        r"90^\circ",
    }
    assert [answer for category, answer, _ in DIFFERENCES if category == "units"] == ["18 dollars"]
