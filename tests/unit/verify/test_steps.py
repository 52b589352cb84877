from __future__ import annotations

import random
import secrets

import pytest

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.generators import generate_problems
from dasd_megatron.verify.steps import STEP_CHECKERS, StepCheck, chain_sum_steps, running_sums


def test_running_sums_are_those_of_the_worked_solutions():
    for arguments in ({}, {"allow_negation": True, "max_terms": 6}):
        source = DataSourceConfig(
            generator="chain_sum", generator_args=arguments, size=100, seed=secrets.randbelow(10**6)
        )
        for problem in generate_problems(source):
            lines = problem.reference_solution.split("\n")
            assert [str(value) for value in running_sums(problem.problem)] == [
                *lines[:-1],
                lines[-1].removeprefix("#### "),
            ]
            check = STEP_CHECKERS["chain_sum"](problem.problem, problem.reference_solution)
            assert check == StepCheck(len(lines), len(lines), None)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # 3, -4, 1
        ("3\n-4\n#### 1", (3, 3, None)),
        ("3\n-5\n#### 1", (2, 3, 2)),
        ("2\n-5\n#### 0", (0, 3, 1)),
        ("#### 1", (1, 3, 1)),
        ("3\n#### 1", (2, 3, 2)),
        ("3\n-4\n5\n#### 1", (3, 3, 3)),
        ("3\n-4\n5\n#### 2", (2, 3, 3)),
        ("3\n-5\n5\n#### 1", (2, 3, 2)),
        ("3\n-4\n1", (3, 3, None)),
        ("3\n-4", (2, 3, 3)),
        ("3\n-4\n1\n1", (3, 3, 4)),
        ("First 4 - 1 = 3.\nThen 3-7=-4, and -4 + 5 = 1.\n#### 1", (3, 3, None)),
        ("First 4 - 1 = 3.\nThen 3-7=-4.\n#### 1", (3, 3, None)),
        ("\u22124\n\u2212\n#### 01", (1, 3, 1)),
        ("3\n\u22124\n#### 01.", (3, 3, None)),
        ("3\n-4\n#### 1\n99\n98", (3, 3, None)),
        ("#### 3\n-4\n#### 1", (3, 3, None)),
        ("", (0, 3, 1)),
        ("####", (0, 3, 1)),
        ("no numbers here", (0, 3, 1)),
        ("9" * 50_000, (0, 3, 1)),
    ],
)
def test_steps_of_a_response(response, expected):
    assert chain_sum_steps("4-1-7+5=", response) == expected


def test_one_wrong_step_is_found_wherever_it_stands():
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(200):
        terms = [draw.randint(-99, 99) for _ in range(draw.randint(2, 8))]
        problem = str(terms[0]) + "".join(f"{draw.choice('+-')}{term}" for term in terms[1:]) + "="
        sums = running_sums(problem)
        assert sums[-1] == eval(problem.removesuffix("=").replace("--", "+").replace("+-", "-"))
        wrong = draw.randrange(len(sums))
        written = [str(value + (place == wrong) * draw.randint(1, 9)) for place, value in enumerate(sums)]
        written[-1] = f"#### {written[-1]}"
        assert chain_sum_steps(problem, "\n".join(written)) == (len(sums) - 1, len(sums), wrong + 1)


def test_steps_of_other_problems_cannot_be_checked():
    assert chain_sum_steps("Tom has 3 apples.", "3") is None and chain_sum_steps("+8-9", "3") is None
