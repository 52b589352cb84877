"""Generated problems with worked solutions, from reasoning-gym's procedural datasets."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prompts import DataError, Problem, normalize_text


def generate_problems(
    source: DataSourceConfig, name: str = "train", *, exclude: Iterable[Problem] = ()
) -> list[Problem]:
    """Make ``source.size`` distinct problems with reasoning-gym's dataset ``source.generator``.

    ``chain_sum``: the problem is the bare expression, as in ``4-1-7=``, without spaces. reasoning-gym's English
    sentence is left out, because the tokens are characters and it would be most of the prompt. The worked solution has
    a running sum on each line and ends in the answer: ``3``, ``#### -4``.

    ``countdown``: all of some numbers are to be added and subtracted to a target, as in ``4 1 7 = 2``. The worked
    solution, one of many, has an equation on each line: ``7-4=3``, ``3-1=2``, ``#### 7-4-1``. The expected answer is
    the target, and ``verify.reward=dasd_megatron.verify.countdown:uses_all_numbers`` grades responses.

    ``gsm_symbolic``: word problems of grade-school mathematics as reasoning-gym states them. Its worked solution is
    given the answer behind ``####`` at its end.

    reasoning-gym draws with replacement; repeated problems are dropped here.

    Args:
        source: generator, its arguments, number of problems and seed. Equal sources give equal problems.
        name: the place of ``source`` in the configuration, ``train`` or ``heldout``; used in messages.
        exclude: problems that must not come up, compared by their text.

    Raises:
        DataError: unknown generator or argument, or fewer distinct problems exist than asked for.
    """
    if source.generator is None or source.generator not in GENERATORS:
        raise DataError(f"data.{name}.generator is {source.generator!r}; known: {', '.join(GENERATORS)}")
    if source.size is None or source.size < 1:
        raise DataError(
            f"data.{name}.size is {source.size}; a generator needs the number of problems to make, at least 1"
        )
    seen = {normalize_text(problem.problem) for problem in exclude}
    num_excluded = len(seen)
    problems: list[Problem] = []
    repeats = 0
    for problem in _stream(GENERATORS[source.generator], source, name):
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
        f"data.{name}.size asks for {source.size} problems, but {source.generator} with {dict(source.generator_args)} "
        f"has only {len(problems)} distinct ones{excluded}; lower data.{name}.size, or allow more terms or digits in "
        f"data.{name}.generator_args"
    )


def generate_splits(train: DataSourceConfig, heldout: DataSourceConfig) -> tuple[list[Problem], list[Problem]]:
    """Generate a training and a held-out set that share no problem.

    The held-out set is drawn first, and training skips its problems. Two seeds alone do not separate the sets:
    reasoning-gym seeds item ``i`` with ``seed + i``, so datasets of near seeds overlap almost wholly.

    Returns:
        The training problems and the held-out problems.

    Raises:
        DataError: as :func:`generate_problems`.
    """
    heldout_problems = generate_problems(heldout, "heldout")
    return generate_problems(train, "train", exclude=heldout_problems), heldout_problems


def worked_sum(expression: str) -> str:
    """Return the running sums of an expression like ``4 - 1 - 7``, one on each line, the last one behind ``#### ``."""
    first, *rest = expression.split(" ")
    sums = [int(first)]
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        sums.append(sums[-1] + int(term) if operator == "+" else sums[-1] - int(term))
    return "\n".join([*map(str, sums[1:-1]), f"#### {sums[-1]}"])


def _chain_sum(item: dict[str, Any]) -> tuple[str, str, str]:
    expression = item["metadata"]["expression"]
    return f"{expression.replace(' ', '')}=", item["answer"], worked_sum(expression)


def worked_chain(expression: str) -> str:
    """Return the equations of a chain like ``4 - 1 - 7``, one on each line, and the chain itself behind ``#### ``."""
    first, *rest = expression.split(" ")
    lines, value = [], int(first)
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(term) if operator == "+" else value - int(term)
        lines.append(f"{value}{operator}{term}={result}")
        value = result
    return "\n".join([*lines, f"#### {expression.replace(' ', '')}"])


def _countdown(item: dict[str, Any]) -> tuple[str, str, str]:
    expression = item["answer"]
    if set(expression) & set("*/"):
        raise DataError(
            'countdown has worked solutions for sums and differences: add operators: ["+", "-"] to its generator_args'
        )
    numbers, target = item["metadata"]["numbers"], item["metadata"]["target"]
    return f"{' '.join(map(str, numbers))} = {target}", str(target), worked_chain(expression)


def _gsm_symbolic(item: dict[str, Any]) -> tuple[str, str, str]:
    solution = item["metadata"]["answer_cot"].rstrip()
    # Most of its templates end in the answer. A response has to end so, and it learns from the solution.
    end = f"#### {item['answer']}"
    return item["question"], item["answer"], solution if solution.endswith(end) else f"{solution}\n{end}"


class Generator(NamedTuple):
    """A dataset of reasoning-gym, and the function that makes a problem of its items."""

    module: str
    config: str
    dataset: str
    convert: Callable[[dict[str, Any]], tuple[str, str, str]]
    """Returns problem, answer and worked solution of an item."""


GENERATORS = {
    "chain_sum": Generator("reasoning_gym.arithmetic.chain_sum", "ChainSumConfig", "ChainSumDataset", _chain_sum),
    "countdown": Generator("reasoning_gym.games.countdown", "CountdownConfig", "CountdownDataset", _countdown),
    "gsm_symbolic": Generator(
        "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic",
        "GSMSymbolicDatasetConfig",
        "GSMSymbolicDataset",
        _gsm_symbolic,
    ),
}

# The length is bounded because gsm_symbolic draws the kinds of all its items when it is made.
_STREAM_LENGTH = 1_000_000


def _stream(generator: Generator, source: DataSourceConfig, name: str) -> Iterator[Problem]:
    """Yield a long stream of problems, with repeats."""
    # Imported here, because reasoning-gym loads every dataset that it has, and runs on a file of problems need none.
    module = importlib.import_module(generator.module)
    config_class, dataset_class = getattr(module, generator.config), getattr(module, generator.dataset)
    arguments = _checked_arguments(source, name, config_class)
    config = config_class(seed=source.seed, size=_STREAM_LENGTH, **arguments)
    try:
        config.validate()
    except AssertionError as error:
        raise DataError(f"data.{name}.generator_args: {error}") from error
    dataset = dataset_class(config)
    for index in range(_STREAM_LENGTH):
        problem, answer, solution = generator.convert(dataset[index])
        yield Problem(
            id=f"{source.generator}-{source.seed}-{index}",
            problem=problem,
            expected_answer=answer,
            reference_solution=solution,
        )


def _checked_arguments(source: DataSourceConfig, name: str, config_class: Any) -> dict[str, Any]:
    """Return ``source.generator_args`` as the dataset's own configuration takes them.

    Raises:
        DataError: an argument that it does not know, or a value of another type.
    """
    arguments: dict[str, Any] = dict(source.generator_args)
    defaults = {
        field.name: field.default for field in dataclasses.fields(config_class) if field.name not in ("seed", "size")
    }
    unknown = [argument for argument in arguments if argument not in defaults]
    if unknown:
        hint = (
            f"it stands in data.{name}.{unknown[0]}"
            if unknown[0] in ("seed", "size")
            else f"known: {', '.join(defaults)}"
        )
        raise DataError(f"data.{name}.generator_args: {source.generator} takes no {unknown[0]!r}; {hint}")
    for argument, value in arguments.items():
        expected = type(defaults[argument])
        if expected is tuple and isinstance(value, list):
            arguments[argument] = tuple(value)
            continue
        if type(value) is not expected and not (expected is float and type(value) is int):
            kind = {bool: "true or false", int: "an integer", float: "a number"}[expected]
            raise DataError(f"data.{name}.generator_args.{argument} is {value!r}; it must be {kind}")
    return arguments
