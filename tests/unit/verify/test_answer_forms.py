"""The generator of harmless forms and near misses, on references of every kind, and on some of the real ones.

``benchmarks/grader_agreement.py`` does the same with all references of all benchmarks, and with other graders.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dasd_megatron.data.benchmarks import BENCHMARKS, benchmark_problems
from dasd_megatron.verify.comparison import compare_answers
from dasd_megatron.verify.symbolic import equal_by_algebra
from tests.support.answer_forms import bare, forms, near_misses

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("DASD_TEST_DATA", ROOT.parent / "shared" / "data"))
REFERENCES = [
    "42", "-7", "1234", "0", "3.75", r"\frac{3}{4}", r"-\frac{5}{2}", r"2\sqrt{3}", r"11\sqrt2", r"4\pi",
    "x^2+3x-5", "2n+1",
    "(3,-4)", "5, 8", r"\{1, 2\}", r"[0, 4)", r"(-\infty, 3) \cup (5, \infty)", r"45^\circ", "1101_2", r"15\%",
    r"\text{even}",
    r"\text{(B)}", "y = 3x - 1", "3.5e-7", r"\begin{pmatrix} 1 \\ 4 \end{pmatrix}", r"1 \pm \sqrt{7}",
    r"x \in [-2, 6]",
    r"\binom{9}{4}", "10,\\!500", r"\frac{e^{-2t}}{15}", "$6$,$9$",
]  # fmt: skip


def check(reference: str) -> None:
    expected = bare(reference)
    written, missed = forms(reference), near_misses(reference)
    assert len(written) == 12 and len(missed) == 6
    assert expected not in missed.values()
    refused = [form for form in written.values() if compare_answers(form, expected, equal_by_algebra) is not True]
    taken = [miss for miss in missed.values() if compare_answers(miss, expected, equal_by_algebra) is not False]
    assert (refused, taken) == ([], [])


@pytest.mark.parametrize("reference", REFERENCES)
def test_forms_are_right_and_near_misses_wrong(reference: str) -> None:
    check(reference)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA}; set DASD_TEST_DATA to a folder with them")
@pytest.mark.parametrize(("name", "step"), [("gsm8k", 60), ("math500", 25), ("aime24", 6)])
def test_real_references(name: str, step: int) -> None:
    (problems,) = benchmark_problems([name], DATA, None).values()
    for problem in problems[::step]:
        check(problem.expected_answer)


def test_the_table_of_the_documentation_is_the_measured_one() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "grader_agreement.json").read_text())
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name in BENCHMARKS:
        row = next(line for line in reversed(page.splitlines()) if line.startswith(f"| `{name}` |"))
        if name not in results:
            assert "not run" in row
            continue
        for kind in ("false_negatives", "false_positives"):
            ours, *theirs = results[name][kind].values()
            assert all(ours <= other for other in theirs), name
            assert f"| {' / '.join(map(str, (ours, *theirs)))} of " in row
