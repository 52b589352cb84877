"""Generated problems with worked solutions, from reasoning-gym's procedural datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prompts import DataError, Problem, normalize_text

GENERATORS = ("chain_sum",)


def generate_problems(source: DataSourceConfig, name: str = "train", *, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Make ``source.size`` distinct problems with reasoning-gym's dataset ``source.generator``.

    ``chain_sum``: the problem is the bare expression, as in ``4-1-7=``, without spaces and not in reasoning-gym's English sentence: the
    tokens are characters, and these would be most of the prompt. The worked solution has one running sum a line and ends in the
    answer: ``3``, ``#### -4``. reasoning-gym draws with replacement; repeated expressions are dropped here.

    Args:
        source: generator, its arguments, number of problems and seed; equal sources give equal problems.
        name: the place of ``source`` in the configuration, ``train`` or ``heldout``; used in messages.
        exclude: problems that must not come up, compared by their text.

    Raises:
        DataError: unknown generator or argument, or fewer distinct problems exist than asked for.
    """
    if source.generator not in GENERATORS:
        raise DataError(f"data.{name}.generator is {source.generator!r}; known: {', '.join(GENERATORS)}")
    if source.size is None or source.size < 1:
        raise DataError(f"data.{name}.size is {source.size}; a generator needs the number of problems to make, at least 1")
    seen = {normalize_text(problem.problem) for problem in exclude}
    num_excluded = len(seen)
    problems: list[Problem] = []
    repeats = 0
    for problem in _chain_sum(source, name):
        key = normalize_text(problem.problem)
        if key not in seen:
            seen.add(key)
            problems.append(problem)
            repeats = 0
            if len(problems) == source.size:
                return problems
        else:
            repeats += 1
            # One unseen problem among n equally likely ones escapes 50 n draws with probability e^-50.
            if repeats > 1000 + 50 * len(seen):
                break
    excluded = f" beside {num_excluded} excluded ones" if num_excluded else ""
    raise DataError(
        f"data.{name}.size asks for {source.size} problems, but {source.generator} with {dict(source.generator_args)} has only "
        f"{len(problems)} distinct ones{excluded}; lower data.{name}.size, or allow more terms or digits in data.{name}.generator_args"
    )


def generate_splits(train: DataSourceConfig, heldout: DataSourceConfig) -> tuple[list[Problem], list[Problem]]:
    """Generate a training and a held-out set that share no problem: the held-out set is drawn first, training skips what stands in it.

    Two seeds alone do not separate the sets: reasoning-gym seeds item ``i`` with ``seed + i``, so datasets of near seeds overlap almost
    wholly.

    Returns:
        The training problems and the held-out problems.

    Raises:
        DataError: as :func:`generate_problems`.
    """
    heldout_problems = generate_problems(heldout, "heldout")
    return generate_problems(train, "train", exclude=heldout_problems), heldout_problems


def worked_sum(expression: str) -> str:
    """Running sums of an expression like ``4 - 1 - 7``, one a line, the last one behind ``#### ``."""
    first, *rest = expression.split(" ")
    sums = [int(first)]
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        sums.append(sums[-1] + int(term) if operator == "+" else sums[-1] - int(term))
    return "\n".join([*map(str, sums[1:-1]), f"#### {sums[-1]}"])


def _chain_sum(source: DataSourceConfig, name: str) -> Iterator[Problem]:
    """An endless stream of problems, with repeats."""
    # Imported here: reasoning-gym loads every dataset that it has, and runs on a prompt file need none of them.
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    arguments: dict[str, Any] = dict(source.generator_args)
    known = [field.name for field in dataclasses.fields(ChainSumConfig) if field.name not in ("seed", "size")]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        hint = f"it stands in data.{name}.{unknown[0]}" if unknown[0] in ("seed", "size") else f"known: {', '.join(known)}"
        raise DataError(f"data.{name}.generator_args: {source.generator} takes no {unknown[0]!r}; {hint}")
    for argument, value in arguments.items():
        expected = bool if argument == "allow_negation" else int
        if type(value) is not expected:
            raise DataError(
                f"data.{name}.generator_args.{argument} is {value!r}; it must be {'true or false' if expected is bool else 'an integer'}"
            )
    config = ChainSumConfig(seed=source.seed, size=1, **arguments)
    try:
        config.validate()
    except AssertionError as error:
        raise DataError(f"data.{name}.generator_args: {error}") from error
    dataset = ChainSumDataset(config)
    index = 0
    while True:
        item = dataset[index]
        expression = item["metadata"]["expression"]
        yield Problem(
            id=f"chain_sum-{source.seed}-{index}",
            problem=f"{expression.replace(' ', '')}=",
            expected_answer=item["answer"],
            reference_solution=worked_sum(expression),
        )
        index += 1
