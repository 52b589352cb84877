"""Wrong verdicts of our grader, of math-verify alone and of NeMo-Skills' grader, on the references of every benchmark.

    python benchmarks/grader_agreement.py --data data        # folders of benchmarks, as dasd evaluate reads them

Each reference is written in twelve ways that change nothing, and changed in six that do
(``tests/support/answer_forms.py``); equal references of a benchmark count once. A benchmark whose file is not there is
left out, and so is NeMo-Skills where it cannot be imported: put its source on PYTHONPATH. Writes
``benchmarks/results/grader_agreement.json`` and prints the table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from record import write_record  # noqa: E402

from dasd_megatron.config import VerifyConfig  # noqa: E402
from dasd_megatron.data.benchmarks import BENCHMARKS, benchmark_problems  # noqa: E402
from dasd_megatron.data.prompts import DataError  # noqa: E402
from dasd_megatron.verify.answers import extract_answer  # noqa: E402
from dasd_megatron.verify.comparison import compare_answers  # noqa: E402
from dasd_megatron.verify.symbolic import equal_by_algebra  # noqa: E402
from tests.support.answer_forms import bare, forms, near_misses  # noqa: E402

Judge = Callable[[str, str], bool]
OURS, MATH_VERIFY, NEMO_SKILLS = "here", "math-verify 0.9.0", "NeMo-Skills 0.7.0"


class OutOfTimeError(Exception):
    """A comparison took longer than a grading worker may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def judge_ours(response: str, reference: str) -> bool:
    answer = extract_answer(response)
    try:
        with time_limit(VerifyConfig().timeout_seconds):
            return answer is not None and compare_answers(answer, reference, equal_by_algebra) is True
    except OutOfTimeError:
        return False


def judge_math_verify(response: str, reference: str) -> bool:
    import math_verify

    return bool(math_verify.verify(math_verify.parse(f"\\boxed{{{reference}}}"), math_verify.parse(response)))


def judge_nemo_skills(response: str, reference: str) -> bool:
    from nemo_skills.evaluation.math_grader import extract_answer, math_equal

    return bool(math_equal(reference, extract_answer(response)))


def judges() -> dict[str, Judge]:
    found: dict[str, Judge] = {OURS: judge_ours, MATH_VERIFY: judge_math_verify}
    with contextlib.suppress(ImportError):
        import nemo_skills.evaluation.math_grader  # noqa: F401

        found[NEMO_SKILLS] = judge_nemo_skills
    return found


def judge_reference(reference: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return for each grader the spellings that it calls wrong, and the near misses that it calls right."""
    logging.disable(logging.ERROR)
    verdicts = {}
    for name, judge in judges().items():
        refused = [form for form in forms(reference).values() if not judge(f"\\boxed{{{form}}}", bare(reference))]
        taken = [miss for miss in near_misses(reference).values() if judge(f"\\boxed{{{miss}}}", bare(reference))]
        verdicts[name] = (refused, taken)
    return verdicts


def judge_benchmark(references: list[str], pool: Any) -> dict[str, Any]:
    negatives, positives = Counter[str](), Counter[str]()
    examples: dict[str, list[str]] = {}
    for reference, verdicts in zip(references, pool.imap(judge_reference, references, chunksize=4), strict=True):
        for name, (refused, taken) in verdicts.items():
            negatives[name] += len(refused)
            positives[name] += len(taken)
            if name == OURS:
                examples.setdefault("ours", []).extend(f"{reference} | {answer}" for answer in (*refused, *taken))
    return {
        "references": len(references),
        "false_negatives": {name: negatives[name] for name in judges()},
        "false_positives": {name: positives[name] for name in judges()},
        "our_errors": examples.get("ours", []),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as the table of docs/evaluation.md."""
    names = [OURS, MATH_VERIFY, NEMO_SKILLS]
    lines = [
        f"| benchmark | references | right, called wrong: {' / '.join(names)} | wrong, called right: "
        f"{' / '.join(names)} |",
        "|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        row = results.get(name)
        if row is None:
            lines.append(f"| `{name}` | not run | | |")
            continue
        counts = [
            f"{' / '.join(str(row[kind].get(grader, 'not run')) for grader in names)} of {per * row['references']:,}"
            for kind, per in (("false_negatives", 12), ("false_positives", 6))
        ]
        lines.append(f"| `{name}` | {row['references']} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--benchmarks", nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "grader_agreement.json")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for name in options.benchmarks:
            try:
                problems = benchmark_problems([name], options.data, None)[name]
            except DataError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            references = list(dict.fromkeys(problem.expected_answer for problem in problems))
            results[name] = judge_benchmark(references, pool)
            write_record(options.output, results)
            print(f"{name}: {results[name]['false_negatives']} {results[name]['false_positives']}", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
