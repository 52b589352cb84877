"""A constructed task: chains of additions, subtractions and products modulo 10, which a policy may answer by thinking
or straight.

    python examples/think_or_answer/think_or_answer.py DIR

writes DIR/train.jsonl, DIR/heldout.jsonl and DIR/warm_start.jsonl, the same files for the same options.

A problem is like ``7*4-9=``, to be computed from the left. A response that thinks begins with ``?``, writes an equation
a line, and then the answer; a straight one has the answer alone:

    ?7*4=8
    8-9=9
    #### 9

The student's prompt is the problem. The teacher's shows a solution, an answer or a right response with it.
:func:`measures` (``verify.measures``) counts which responses think, and how many of either kind are right.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

THINK = "?"
"""The first character of a response that thinks."""


class Chain(NamedTuple):
    """A problem, and the equations that solve it; the right side of the last is the answer."""

    problem: str
    equations: list[str]

    @property
    def answer(self) -> str:
        return self.equations[-1][-1]

    @property
    def solution(self) -> str:
        return "\n".join([*self.equations, f"#### {self.answer}"])

    @property
    def straight(self) -> str:
        """The right response that does not think."""
        return f"#### {self.answer}"

    @property
    def thinking(self) -> str:
        """The right response that thinks."""
        return THINK + self.solution


def apply(left: int, operator: str, right: int) -> int:
    """Return the last digit of ``left operator right``, which is below 10 and not negative."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def solve(problem: str) -> list[str]:
    """Return the equations of a problem like ``7*4-9=``: ``7*4=8`` and ``8-9=9``."""
    value, equations = int(problem[0]), []
    for operator, term in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        result = apply(value, operator, int(term))
        equations.append(f"{value}{operator}{term}={result}")
        value = result
    return equations


def make_chains(count: int, terms: int, seed: int) -> list[Chain]:
    """Return ``count`` different problems of ``terms`` numbers from 1 to 9."""
    if count > 9**terms * 3 ** (terms - 1) // 2:
        raise ValueError(f"{count} problems of {terms} terms: there are too few different ones; take more terms")
    draw = random.Random(f"think or answer {seed}")
    problems: dict[str, None] = {}
    while len(problems) < count:
        first, *others = [str(draw.randint(1, 9)) for _ in range(terms)]
        problem = first + "".join(draw.choice("+-*") + term for term in others) + "="
        problems[problem] = None
    return [Chain(problem, solve(problem)) for problem in problems]


def make_examples(chains: list[Chain], options: argparse.Namespace) -> list[dict[str, str]]:
    """Return rows of ``warm_start.path``: student's and teacher's prompts with responses that think or do not, in the
    shares of the options."""
    draw = random.Random(f"think or answer, examples {options.seed}")
    rows = []
    for _ in range(options.examples):
        chain = draw.choice(chains)
        row = {"problem": chain.problem}
        is_teacher = draw.random() < options.teacher_share
        if is_teacher:
            # A teacher that is shown any of them has to be able to use it.
            row["privileged"] = draw.choice([chain.solution, chain.answer, chain.straight, chain.thinking])
        thinks = draw.random() < (options.teacher_thinks if is_teacher else options.student_thinks)
        rows.append(row | {"response": chain.thinking if thinks else chain.straight})
    return rows


def measures(sample: Any) -> dict[str, float]:
    """Return what a graded response shows of thinking: whether it thinks; if it does, whether it is right and the share
    of its equations that are; if it does not, whether it is right."""
    right = float(sample.reward > 0)
    if not sample.text.startswith(THINK):
        return {"thinks": 0.0, "straight_right": right}
    expected = solve(sample.problem)
    written = sample.text.removeprefix(THINK).splitlines()[: len(expected)]
    steps = sum(line == equation for line, equation in zip(written, expected, strict=False))
    return {"thinks": 1.0, "thinking_right": right, "step_accuracy": steps / len(expected)}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--terms", type=int, default=6)
    parser.add_argument("--train", type=int, default=4096, help="training problems")
    parser.add_argument("--heldout", type=int, default=128, help="held-out problems, none of which is trained on")
    parser.add_argument("--examples", type=int, default=65536, help="rows of warm_start.jsonl")
    parser.add_argument("--teacher-share", type=float, default=0.5, help="share of the teacher's prompts among them")
    parser.add_argument("--student-thinks", type=float, default=0.5, help="share of the student's answers that think")
    parser.add_argument("--teacher-thinks", type=float, default=0.1, help="share of the teacher's answers that think")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    chains = make_chains(options.train + options.heldout, options.terms, options.seed)
    heldout, train = chains[: options.heldout], chains[options.heldout :]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", heldout), ("train", train)):
        rows = [
            {
                "id": f"{name}-{index}",
                "problem": chain.problem,
                "expected_answer": chain.answer,
                "reference_solution": chain.solution,
            }
            for index, chain in enumerate(part)
        ]
        write_rows(options.folder / f"{name}.jsonl", rows)
    write_rows(options.folder / "warm_start.jsonl", make_examples(train, options))
    print(f"{options.folder}: {len(train)} and {len(heldout)} problems, {options.examples} examples")


if __name__ == "__main__":
    main()
