"""Checks of a run against its model and its problems, with a tokenizer of characters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dasd_megatron.access import AccessError
from dasd_megatron.config import AlgorithmConfig, ModelConfig, WarmStartConfig
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import make_renderer
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.run.checks import (
    check_key,
    check_run_prompts,
    check_warm_start_end,
    check_warm_start_lengths,
    flatten,
    needs_teacher,
    require_hf_directory,
)
from tests.support.small_configs import configure, refusal
from tests.support.teachers import solution_of, teacher_of

KEY = "k-0123456789abcdefghijklmnopqrstuv"


def test_grpo_alone_needs_no_teacher() -> None:
    names = ("dasd", "grpo", "opsd", "reversed", "rlsd")
    assert [name for name in names if not needs_teacher(AlgorithmConfig(name=name))] == ["grpo"]


def test_a_key_in_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASD_API_KEY", KEY)
    config = configure()
    check_key(config)
    config.run.name = f"a-{KEY}"
    with pytest.raises(AccessError, match="stands in the configuration too"):
        check_key(config)


def test_a_checkpoint_of_megatron_is_no_start_for_a_server(tmp_path: Path) -> None:
    require_hf_directory(None)
    require_hf_directory(str(tmp_path))
    (tmp_path / ".metadata").touch()
    assert "dasd convert megatron-to-hf" in refusal(lambda: require_hf_directory(str(tmp_path)))


def test_the_longest_warm_start_sequence_fits_to_the_token() -> None:
    config, tokenizer = configure(), character_tokenizer()
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    teacher = teacher_of(renderer)
    problem = Problem("p", "1 + 1 =", "2", "1 + 1 = 2")
    prompt = max(len(renderer.teacher(problem, solution_of(problem))), len(renderer.student(problem)))
    # The end-of-sequence token counts too.
    length = prompt + len(problem.reference_solution) + 1

    def check(positions: int, path: str | None = None) -> None:
        model, sizes = (
            ModelConfig(path=path),
            SimpleNamespace(max_position_embeddings=positions, vocab_size=len(tokenizer)),
        )
        check_warm_start_lengths(model, WarmStartConfig(steps=3), sizes, teacher, tokenizer, [problem])

    check(length)
    message = refusal(lambda: check(length - 1))
    assert "warm_start.steps=3: problem 'p'" in message and f"{length - 1} (model.tiny)" in message
    assert "(config.json of model.path=/m)" in refusal(lambda: check(length - 1, "/m"))
    sizes = SimpleNamespace(max_position_embeddings=length, vocab_size=tokenizer.eos_token_id)
    message = refusal(
        lambda: check_warm_start_lengths(ModelConfig(), WarmStartConfig(steps=3), sizes, teacher, tokenizer, [problem])
    )
    assert "problem 'p' has a solution that, with its end, has the token" in message
    check_warm_start_end(ModelConfig(path="/m"), WarmStartConfig(steps=3), tokenizer)
    tokenizer.eos_token = None
    message = refusal(lambda: check_warm_start_end(ModelConfig(path="/m"), WarmStartConfig(steps=3), tokenizer))
    assert "end-of-sequence token" in message and "model.path=/m" in message


@pytest.mark.parametrize(("method", "warm_start"), [("dasd", 0), ("grpo", 0), ("grpo", 1)])
def test_privileged_prompts_are_limited_where_they_are_used(method: str, warm_start: int) -> None:
    config = configure(f"algorithm={method}", f"warm_start.steps={warm_start}")
    renderer = make_renderer(config.data, config.teacher, character_tokenizer())
    problem = Problem("p", "1 + 1 =", "2", "1 + 1 = 2")
    student, teacher = len(renderer.student(problem)), len(renderer.teacher(problem, solution_of(problem)))
    assert student < teacher
    config.rollout.max_prompt_tokens = student
    # No teacher sees held-out problems.
    check_run_prompts(config, renderer, [], [problem], vocab_size=500)
    if method == "grpo" and not warm_start:
        check_run_prompts(config, renderer, [problem], [], vocab_size=500)
    else:
        with pytest.raises(DataError, match="max_prompt_tokens"):
            check_run_prompts(config, renderer, [problem], [], vocab_size=500)
    config.rollout.max_prompt_tokens = student - 1
    with pytest.raises(DataError, match="max_prompt_tokens"):
        check_run_prompts(config, renderer, [], [problem], vocab_size=500)


def test_other_problems_are_shown_only_where_every_problem_has_one() -> None:
    config = configure("teacher.privileged=[unpaired]")
    renderer = make_renderer(config.data, config.teacher, character_tokenizer())
    one, same = Problem("a", "1 + 1 =", "2", "1 + 1 = 2"), Problem("b", "1 + 1  =", "2", "2")
    bare = Problem("c", "2 + 2 =", "4", "")
    with pytest.raises(DataError, match="teacher.privileged has unpaired.*1 of 3 has one.*two that differ"):
        check_run_prompts(config, renderer, [one, same, bare], [], vocab_size=500)
    check_run_prompts(config, renderer, [one, same, Problem("c", "2 + 2 =", "4", "4")], [], vocab_size=500)


def test_a_template_that_makes_too_much_of_a_peer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.jinja"
    path.write_text("{{ problem }}{{ privileged }}{{ privileged }}")
    config = configure("teacher.privileged=[peer]", f"teacher.template={path}", "rollout.max_prompt_tokens=30")
    config.teacher.max_privileged_tokens = 40
    renderer = make_renderer(config.data, config.teacher, character_tokenizer())
    problem = Problem("p", "1 + 1 =", "2", "")
    with pytest.raises(
        TemplateError, match=r"twice.jinja on problem 'p' makes a prompt of .* of a peer of 40, over 70"
    ):
        check_run_prompts(config, renderer, [problem], [], vocab_size=500)
    config.teacher.max_privileged_tokens = 10
    check_run_prompts(config, renderer, [problem], [], vocab_size=500)


def test_nested_mappings_are_flattened() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": None}) == {"a.b.c": 1, "a.d": [], "e": None}
