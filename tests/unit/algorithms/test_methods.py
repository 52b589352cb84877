"""The table of methods: complete, importable without torch, and what it says is what the methods do."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import dasd_megatron
from dasd_megatron import algorithms
from dasd_megatron.algorithms import METHODS, Credit, Method, MethodSettings, RolloutFacts, token_advantages

PRESETS = sorted((Path(dasd_megatron.__file__).parent / "conf/algorithm").glob("*.yaml"))
SETTINGS = MethodSettings(
    verifier_weight=1.0, beta=0.3, rho=0.2, quantile_side="upper", scale_floor=0.5, gate=True, rlsd_clip=0.2
)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rewards_advantage": torch.tensor([0.8, -0.5]),
        "entropy": torch.rand(12, generator=generator) * 3,
        "delta": torch.randn(12, generator=generator),
        "lengths": torch.tensor([5, 7]),
    }


def facts(has_teacher: list[bool], **changes: torch.Tensor) -> RolloutFacts:
    count = len(has_teacher)
    right = torch.tensor([place % 2 == 1 for place in range(count)])
    known = RolloutFacts(torch.tensor(has_teacher), right, torch.full((count,), 0.5), torch.linspace(0.1, 2.0, 12))
    return known._replace(**changes)


def advantages(
    method: Method, settings: MethodSettings = SETTINGS, **changes: torch.Tensor
) -> tuple[torch.Tensor, Credit]:
    """Return the method's advantages of the first batch, both rollouts with a teacher, the second of them right."""
    return token_advantages(method.name, settings, **batch() | changes, facts=facts([True, True]))


def test_every_preset_has_a_record_and_every_record_a_preset() -> None:
    named = {path.stem: yaml.safe_load(path.read_text()) for path in PRESETS}
    named = {stem: preset.get("algorithm", preset)["name"] for stem, preset in named.items()}
    assert set(named.values()) == set(METHODS)
    assert {stem for stem, name in named.items() if stem == name} == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name and method.description and "\n" not in method.description


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_without_need_of_the_teacher_does_not_read_it(method: Method) -> None:
    advantage, _ = advantages(method)
    other, _ = advantages(method, delta=batch(1)["delta"])
    assert torch.equal(advantage, other) is not method.needs_teacher


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_with_a_direction_trains_without_the_verifier(method: Method) -> None:
    advantage, credit = advantages(method, replace(SETTINGS, verifier_weight=0.0))
    assert bool(advantage.any()) is method.has_direction
    assert bool(credit.omega.any()) is method.has_direction
    assert method.has_mean_one or (credit.omega.abs() <= 1).all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_pushes_where_it_says_so(method: Method) -> None:
    _, credit = advantages(method)
    assert bool((credit.omega < 0).any()) is method.pushes_away


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_rho_matters_to_the_methods_that_route_by_entropy(method: Method) -> None:
    advantage, _ = advantages(method)
    other, _ = advantages(method, replace(SETTINGS, rho=0.7))
    assert torch.equal(advantage, other) is not method.routes_by_entropy


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_rollout_without_a_teacher_has_the_verifiers_advantage_alone(method: Method) -> None:
    data = batch(torch.seed() % 2**31)
    advantage, credit = token_advantages(method.name, SETTINGS, **data, facts=facts([True, False]))
    whole, whole_credit = token_advantages(method.name, SETTINGS, **data, facts=facts([True, True]))
    assert (advantage[5:] == -0.5).all()
    for name in ("omega", "delta_bar", "advantage_term"):
        assert (getattr(credit, name)[5:] == 0).all()
        assert torch.equal(getattr(credit, name)[:5], getattr(whole_credit, name)[:5])
    assert torch.equal(advantage[:5], whole[:5])


def test_facts_change_nothing_for_grpo() -> None:
    data = batch(torch.seed() % 2**31)
    without = token_advantages("grpo", SETTINGS, **data)
    known = facts([True, True], teacher_entropy=torch.rand(12))
    assert torch.equal(token_advantages("grpo", SETTINGS, **data, facts=known)[0], without[0])
    known = facts([False, True], is_right=torch.tensor([False, True]), solve_rate=torch.tensor([0.0, 1.0]))
    advantage, credit = token_advantages("grpo", SETTINGS, **data, facts=known)
    assert torch.equal(advantage, without[0])
    assert torch.equal(credit.omega, without[1].omega)
    assert torch.equal(credit.advantage_term, without[1].advantage_term)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (facts([True]), r"facts.has_teacher has shape \(1,\); expected \(2,\)"),
        (facts([True] * 2, solve_rate=torch.ones(3)), r"facts.solve_rate has shape \(3,\)"),
        (facts([True] * 2, teacher_entropy=torch.ones(2)), r"facts.teacher_entropy has shape \(2,\); expected \(12,\)"),
    ],
)
def test_facts_of_other_rollouts_are_refused(known: RolloutFacts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_advantages("dasd", SETTINGS, **batch(), facts=known)


def test_the_table_imports_no_torch() -> None:
    script = (
        "import sys; from dasd_megatron.algorithms import METHODS; import dasd_megatron.algorithms.methods;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_public_names_are_what_they_are_called() -> None:
    for name in algorithms.__all__:
        value = getattr(algorithms, name)
        assert not inspect.ismodule(value)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert getattr(importlib.import_module(value.__module__), name) is value
    with pytest.raises(AttributeError, match="no_such_name"):
        algorithms.no_such_name  # noqa: B018
