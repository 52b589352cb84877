"""Bounds and choices stand at the fields, and each is enforced just where it stands."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest

from dasd_megatron.config import Config, load_config, validate
from dasd_megatron.config.checks import check_fields
from dasd_megatron.config.fields import REQUIRED, Limits, limits_of, setting, walk_fields
from dasd_megatron.errors import ConfigError

FIELDS = dict(walk_fields(Config))


@functools.cache
def quickstart() -> Config:
    return load_config(["experiment=quickstart"])


def changed(name: str, value: Any) -> Config:
    """Return the quickstart's configuration with one field set, whatever its type."""

    def with_value(section: Any, path: list[str]) -> Any:
        inner = with_value(getattr(section, path[0]), path[1:]) if len(path) > 1 else value
        return dataclasses.replace(section, **{path[0]: inner})

    return with_value(quickstart(), name.split("."))


def beyond(name: str, bound: float, direction: int) -> float:
    """Return the nearest value of the field's type on one side of ``bound``."""
    if str(FIELDS[name].type).startswith("int"):
        return int(bound) + direction
    return math.nextafter(bound, direction * math.inf)


CHOICES = [(name, limits_of(field).choices) for name, field in FIELDS.items() if limits_of(field).choices]
BOUNDS = [
    (name, kind, bound)
    for name, field in FIELDS.items()
    for kind in ("low", "high", "above", "below")
    if (bound := getattr(limits_of(field), kind)) is not None
]


def test_there_are_bounds_and_choices_to_test() -> None:
    assert len(CHOICES) >= 24
    assert len(BOUNDS) > 120


@pytest.mark.parametrize(("name", "choices"), CHOICES, ids=[name for name, _ in CHOICES])
def test_every_choice_is_taken_and_nothing_else(name: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        check_fields(changed(name, choice))
    for wrong in ("", choices[0].upper(), choices[0] + " ", "other"):
        with pytest.raises(ConfigError) as refused:
            check_fields(changed(name, wrong))
        assert str(refused.value) == f"{name}={wrong}: write one of {', '.join(choices)}"


@pytest.mark.parametrize(("name", "kind", "bound"), BOUNDS, ids=[f"{name}-{kind}" for name, kind, _ in BOUNDS])
def test_every_bound_holds_just_where_it_stands(name: str, kind: str, bound: float) -> None:
    outward = -1 if kind in ("low", "above") else 1
    inside, outside = (
        (bound, beyond(name, bound, outward)) if kind in ("low", "high") else (beyond(name, bound, -outward), bound)
    )
    limits = limits_of(FIELDS[name])
    # An exclusive bound may stand where the inclusive one does.
    if not (kind == "high" and limits.below == bound):
        check_fields(changed(name, inside))
    with pytest.raises(ConfigError) as refused:
        check_fields(changed(name, outside))
    assert str(refused.value).startswith(f"{name}={outside}: must be ")


@pytest.mark.parametrize(
    ("name", "accepted", "refused", "fault"),
    [
        ("run.seed", 2**31 - 1, 2**31, "must be between 0 and 2.14748e+09"),
        ("run.steps", 0, -1, "must be at least 0"),
        ("backend.timeout_seconds", 1.0, 0.5, "must be at least 1"),
        ("parallel.virtual_pipeline_model_parallel_size", 2, 1, "must be at least 2"),
        ("parallel.virtual_pipeline_model_parallel_size", None, 0, "must be at least 2"),
        ("algorithm.rho", 1.0, 1.5, "must be between 0 and 1"),
        ("algorithm.rlsd_clip", 1.0, 1.01, "must be between 0 and 1"),
        ("algorithm.position_s", 0.01, 0.0, "must be above 0"),
        ("algorithm.jsd_weight", 0.01, 0.0, "must be above 0"),
        ("algorithm.jsd_weight", 0.99, 1.0, "must be below 1"),
        ("teacher.hint_fraction", 1.0, 1.1, "must be at most 1"),
        ("teacher.hint_fraction", 0.01, 0.0, "must be above 0"),
        ("loss.dual_clip", None, 1.0, "must be above 1"),
        ("loss.importance_cap", 0.1, 0.0, "must be above 0"),
        ("rollout.port", 65535, 65536, "must be between 0 and 65535"),
        ("rollout.sglang.mem_fraction_static", 0.99, 0.995, "must be between 0.01 and 0.99"),
        ("rollout.temperature", 1e-3, 0.0, "must be at least 0.001"),
        ("rollout.top_p", 1e-6, 0.0, "must be between 1e-06 and 1"),
        ("rollout.top_k", -1, -2, "must be at least -1"),
        ("rollout.over_sampling", 100.0, 101.0, "must be between 1 and 100"),
        ("evaluation.confidence", 0.5, 0.4, "must be between 0.5 and 0.9999"),
        ("evaluation.bootstrap_resamples", 1_000_000, 1_000_001, "must be between 1 and 1e+06"),
        ("warm_start.hidden_dropout", 0.99, 1.0, "must be below 1"),
        ("warm_start.hidden_dropout", 0.0, 1.5, "must be between 0 and 1"),
        ("optimizer.adam_beta2", 0.0, 1.0, "must be below 1"),
        ("watch.saturated_share", 1.0, 0.0, "must be above 0"),
        ("optimizer.lr", 0.0, math.inf, "must be a finite number"),
        ("watch.length_growth", 1.0, math.nan, "must be a finite number"),
    ],
)
def test_bounds_that_are_written_here_too(name: str, accepted: Any, refused: Any, fault: str) -> None:
    check_fields(changed(name, accepted))
    with pytest.raises(ConfigError) as error:
        check_fields(changed(name, refused))
    assert str(error.value) == f"{name}={refused}: {fault}"


def test_a_wrong_choice_is_named_before_a_value_out_of_range() -> None:
    config = changed("run.seed", -1)
    config = dataclasses.replace(config, watch=dataclasses.replace(config.watch, action="halt"))
    with pytest.raises(ConfigError, match="watch.action=halt"):
        validate(config)


def test_defaults_keep_their_own_limits() -> None:
    for name, field in FIELDS.items():
        limits, default = limits_of(field), field.default
        if limits.choices:
            assert default in limits.choices, name
        if default in (REQUIRED, dataclasses.MISSING, None):
            continue
        assert limits.low is None or default >= limits.low, name
        assert limits.high is None or default <= limits.high, name
        assert limits.above is None or default > limits.above, name
        assert limits.below is None or default < limits.below, name


def test_fields_of_sections_within_have_dotted_names() -> None:
    @dataclasses.dataclass
    class Inner:
        size: int = setting(3, "size of it", low=1, below=9)

    @dataclasses.dataclass
    class Outer:
        inner: Inner = setting(Inner, "inner section")
        names: list[str] = setting(["a"], "names")
        table: dict[str, int] = setting({}, "numbers by name")

    fields = dict(walk_fields(Outer))
    assert list(fields) == ["inner.size", "names", "table"]
    assert limits_of(fields["inner.size"]) == Limits(low=1, below=9) and limits_of(fields["names"]) == Limits()
    first, second = Outer(), Outer()
    first.names.append("b")
    first.table["c"] = 1
    assert (second.inner.size, second.names, second.table) == (3, ["a"], {})
