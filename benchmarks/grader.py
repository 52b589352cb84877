"""Time that the grader takes over answers of MATH-500: each reference against the end of its solution, and against
another reference.

    python benchmarks/grader.py --data data        # a folder with math-500/test.jsonl or math500/test.jsonl

Two workers grade a thousand pairs: the 500 expected answers against the answers that the reference solutions mark, and
against the expected answers of the next problem, many of which need algebra. The workers' start, about two
seconds, is reported apart. Writes ``benchmarks/results/grader.json`` unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from machine import describe
from record import write_record

from dasd_megatron.config import VerifyConfig
from dasd_megatron.data.benchmarks import benchmark_problems
from dasd_megatron.verify.grader import Grader

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "grader.json")
    options = parser.parse_args()
    problems = benchmark_problems(["math-500"], options.data, None)["math-500"]
    references = [problem.expected_answer for problem in problems]
    responses = [problem.reference_solution for problem in problems]
    responses += [f"\\boxed{{{answer}}}" for answer in references[1:] + references[:1]]
    seconds = []
    for _ in range(options.rounds):
        with Grader(VerifyConfig(workers=2)) as grader:
            started = time.perf_counter()
            grader.grade([r"\boxed{x+x}"], ["2x"])
            start = time.perf_counter() - started
            started = time.perf_counter()
            verdicts = grader.grade(responses, references * 2)
            seconds.append(time.perf_counter() - started)
    own, other = verdicts[:500], verdicts[500:]
    result = {
        "machine": describe(),
        "pairs": len(responses),
        "workers": 2,
        "seconds": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "start_seconds": start,
        "references_right": sum(verdict.correct for verdict in own),
        "next_answers_right": sum(verdict.correct for verdict in other),
        "timed_out": sum(verdict.timed_out for verdict in verdicts),
    }
    write_record(options.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
