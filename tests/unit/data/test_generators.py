from __future__ import annotations

import re
import secrets
from types import SimpleNamespace

import pytest

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.generators import generate_problems, generate_splits, worked_sum
from dasd_megatron.data.prompts import DataError, check_disjoint
from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.countdown import uses_all_numbers


def chain_sum(size, seed=0, **arguments):
    return DataSourceConfig(generator="chain_sum", size=size, seed=seed, generator_args=arguments)


def test_solutions_add_up_and_end_in_the_answer():
    problems = generate_problems(
        chain_sum(300, min_terms=1, max_terms=5, min_digits=1, max_digits=3, allow_negation=True)
    )
    for problem in problems:
        expression = problem.problem.removesuffix("=")
        # The expression has digits and signs only.
        assert re.fullmatch(r"[-+0-9]+", expression)
        assert eval(expression) == int(problem.expected_answer)
        *steps, final = problem.reference_solution.split("\n")
        terms = re.findall(r"(?:^|(?<=[0-9]))[-+]?-?[0-9]+", expression)
        assert [int(step) for step in steps] == [eval("".join(terms[:count])) for count in range(2, len(terms))]
        assert final == f"#### {problem.expected_answer}"
        assert extract_answer(problem.reference_solution) == problem.expected_answer


@pytest.mark.parametrize(
    ("expression", "solution"),
    [("4 - 1 - 7", "3\n#### -4"), ("5", "#### 5"), ("2 - -3", "#### 5"), ("-2 + 3 + 4 - 1", "1\n5\n#### 4")],
)
def test_worked_sum(expression, solution):
    assert worked_sum(expression) == solution


def test_problems_are_distinct_and_depend_on_the_seed_alone():
    source = chain_sum(150, seed=7, min_terms=2, max_terms=2, max_digits=1)
    problems = generate_problems(source)
    assert len({problem.problem for problem in problems}) == len({problem.id for problem in problems}) == 150
    assert problems == generate_problems(source)
    assert problems[:20] == generate_problems(chain_sum(20, seed=7, min_terms=2, max_terms=2, max_digits=1))
    assert problems != generate_problems(chain_sum(150, seed=1000, min_terms=2, max_terms=2, max_digits=1))


def test_a_whole_space_can_be_drawn_but_no_more():
    arguments = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert len(generate_problems(chain_sum(200, **arguments))) == 200
    with pytest.raises(DataError, match=r"data\.train\.size asks for 201 problems.* has only 200 distinct"):
        generate_problems(chain_sum(201, **arguments))


@pytest.mark.parametrize("train_seed", [0, 1, 5])
def test_splits_share_no_problem(train_seed):
    arguments = dict(min_terms=2, max_terms=2, max_digits=1)
    train, heldout = generate_splits(chain_sum(150, train_seed, **arguments), chain_sum(50, 0, **arguments))
    assert (len(train), len(heldout)) == (150, 50)
    assert not {problem.problem for problem in train} & {problem.problem for problem in heldout}
    assert len({problem.id for problem in train + heldout}) == 200
    check_disjoint(train, heldout)
    assert heldout == generate_problems(chain_sum(50, 0, **arguments))
    with pytest.raises(DataError, match="only 150 distinct ones beside 50 excluded"):
        generate_splits(chain_sum(151, train_seed, **arguments), chain_sum(50, 0, **arguments))


def test_countdown_solutions_are_right_by_their_own_reward_and_use_given_numbers():
    arguments = {"min_numbers": 4, "max_numbers": 4, "min_value": 1, "max_value": 9, "min_target": 1, "max_target": 20}
    arguments |= {"operators": ["+", "-"]}
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    problems = generate_problems(DataSourceConfig(generator="countdown", generator_args=arguments, size=200, seed=seed))
    for problem in problems:
        *steps, answer = problem.reference_solution.splitlines()
        assert len(steps) == 3 and answer.startswith("#### ")
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in steps))
        assert (
            eval(answer.removeprefix("#### ")) == int(problem.expected_answer) == int(problem.problem.split(" = ")[1])
        )
        assert uses_all_numbers(SimpleNamespace(problem=problem.problem, text=problem.reference_solution)) == 1.0
    with pytest.raises(DataError, match="operators"):
        generate_problems(DataSourceConfig(generator="countdown", generator_args={"min_target": 1}, size=50, seed=1))


def test_word_problems_end_in_their_answer():
    source = DataSourceConfig(generator="gsm_symbolic", size=30, seed=3, generator_args={"difficulty": 1})
    problems = generate_problems(source)
    assert len({problem.problem for problem in problems}) == 30
    for problem in problems:
        assert problem.reference_solution.rsplit("#### ", 1)[1] == problem.expected_answer
        assert "\n#### " in problem.reference_solution and problem.id.startswith("gsm_symbolic-3-")
    assert problems == generate_problems(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataSourceConfig(generator="chain_sums", size=1), r"data\.train\.generator is 'chain_sums'; known: chain_sum"),
        (DataSourceConfig(size=1), "generator is None"),
        (DataSourceConfig(generator="chain_sum"), r"data\.train\.size is None"),
        (chain_sum(0), r"data\.train\.size is 0"),
        (
            chain_sum(5, terms=3),
            "takes no 'terms'; known: min_terms, max_terms, min_digits, max_digits, allow_negation",
        ),
        (
            DataSourceConfig(generator="chain_sum", size=5, generator_args={"seed": 3}),
            r"'seed'; it stands in data\.train\.seed",
        ),
        (chain_sum(5, min_terms=4, max_terms=2), "max_terms must be >= min_terms"),
        (chain_sum(5, min_terms="2"), "min_terms is '2'; it must be an integer"),
        (chain_sum(5, allow_negation=1), "allow_negation is 1; it must be true or false"),
    ],
)
def test_bad_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        generate_problems(source)
