"""Checks of a run against its model and its data that need neither weights in memory nor servers that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_megatron.access import AccessError, api_key
from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.config import AlgorithmConfig, Config, ModelConfig, WarmStartConfig
from dasd_megatron.data.prompt_checks import check_prompts, foreign_token
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import end_token_ids, is_megatron_checkpoint
from dasd_megatron.planning.layout import longest_run_text, longest_teacher_prompt
from dasd_megatron.rollout.discovery import check_access

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def needs_teacher(algorithm: AlgorithmConfig) -> bool:
    """Return whether the teacher scores the rollouts of this run."""
    return METHODS[algorithm.name].needs_teacher


def make_teacher(
    config: Config, renderer: PromptRenderer, problems: Sequence[Problem], vocab_size: int | None = None
) -> TeacherPrompts:
    """Return the maker of the teacher's prompts of a run on these training problems."""
    return TeacherPrompts(
        config.teacher, renderer, problems, config.run.seed, longest_teacher_prompt(config), vocab_size
    )


def teacher_of_rollouts(
    config: Config, renderer: PromptRenderer, problems: Sequence[Problem], vocab_size: int | None
) -> TeacherPrompts | None:
    """Return the maker of the prompts behind which the teacher scores the rollouts; None where it scores none."""
    return make_teacher(config, renderer, problems, vocab_size) if needs_teacher(config.algorithm) else None


def check_key(config: Config) -> None:
    """Refuse (AccessError) an API key that cannot be one, that stands in the configuration, or that external servers do
    not take."""
    key = api_key()
    if key is not None and any(key in str(value) for value in flatten(dataclasses.asdict(config)).values()):
        raise AccessError(
            "the API key in DASD_API_KEY stands in the configuration too, which is written into run.dir: leave it out"
        )
    if config.rollout.engine == "external" and config.rollout.replay is None:
        check_access(config.rollout)


def require_hf_directory(model_path: str | None) -> None:
    """Refuse (ConfigError) a ``model.path`` that a rollout server cannot be started from."""
    if model_path is not None and is_megatron_checkpoint(model_path):
        raise ConfigError(
            f"model.path={model_path} is a Megatron checkpoint: make a directory of it with dasd convert megatron-to-hf"
        )


def learns_solutions(warm_start: WarmStartConfig) -> bool:
    """Return whether a run begins with supervised fine-tuning on its training problems' reference solutions."""
    return warm_start.steps > 0 and warm_start.path is None


def check_warm_start_end(model: ModelConfig, warm_start: WarmStartConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse (ConfigError) a tokenizer without the token that ends what the warm start teaches."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"warm_start.steps={warm_start.steps} needs a tokenizer with an end-of-sequence token: "
            f"set eos_token in tokenizer_config.json of model.path={model.path}, or write warm_start.steps=0"
        )


def check_warm_start_lengths(
    model: ModelConfig,
    warm_start: WarmStartConfig,
    hf_config: PretrainedConfig,
    teacher: TeacherPrompts,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
) -> None:
    """Refuse (ConfigError) problems whose prompt, reference solution and end-of-sequence token do not fit into the
    model's positions."""
    limit = hf_config.max_position_embeddings
    for problem in problems:
        prompt = max(len(teacher.example(problem)), len(teacher.renderer.student(problem)))
        ids = tokenizer.encode(problem.reference_solution, add_special_tokens=False)
        fault = foreign_token([*ids, tokenizer.eos_token_id], tokenizer, hf_config.vocab_size)
        if fault is not None:
            raise ConfigError(
                f"warm_start.steps={warm_start.steps}: problem {problem.id!r} has a solution that, with its end, has "
                f"{fault}"
            )
        solution = len(ids)
        if prompt + solution + 1 > limit:
            where = "model.tiny" if model.path is None else f"config.json of model.path={model.path}"
            raise ConfigError(
                f"warm_start.steps={warm_start.steps}: problem {problem.id!r} has a prompt of {prompt} and a "
                f"solution of {solution} tokens, with its end over max_position_embeddings={limit} ({where}): remove "
                "it from data.train, or write 0"
            )


def check_end_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Refuse (ConfigError) a model of the Hugging Face directory ``path`` that has none of the tokens that end a
    response: each would go on to the limit."""
    ids = end_token_ids(path, tokenizer)
    if ids and vocab_size is not None and min(ids) >= vocab_size:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in sorted(ids))
        raise ConfigError(
            f"model.path={path}: no response could end, since the model has {vocab_size} tokens (vocab_size in "
            f"config.json) and not {named}: set eos_token_id in config.json, or give the tokenizer that belongs to the "
            "model"
        )


def check_run_prompts(
    config: Config,
    renderer: PromptRenderer,
    train: Sequence[Problem],
    heldout: Sequence[Problem],
    *,
    vocab_size: int,
) -> dict[str, str]:
    """Refuse problems and templates as :func:`check_prompts` does; of training problems the privileged prompt too,
    where it is used. Return the digests of all prompts."""
    limit = config.rollout.max_prompt_tokens
    shows_teacher = needs_teacher(config.algorithm) or learns_solutions(config.warm_start)
    teacher = make_teacher(config, renderer, train, vocab_size) if shows_teacher else None
    if teacher is not None:
        _check_unpaired(teacher)
    of_train = check_prompts(train, renderer, limit, vocab_size=vocab_size, teacher=teacher)
    if teacher is not None and train and (longest := longest_run_text(config)):
        teacher.check_long_texts(max(train, key=lambda problem: len(problem.problem)), longest)
    of_heldout = check_prompts(heldout, renderer, limit, vocab_size=vocab_size)
    return {
        **{f"train.{kind}": digest for kind, digest in of_train.items()},
        **{f"heldout.{kind}": digest for kind, digest in of_heldout.items()},
    }


def _check_unpaired(teacher: TeacherPrompts) -> None:
    """Refuse (DataError) to show other problems where a problem may have none beside it."""
    if "unpaired" not in teacher.settings.privileged:
        return
    found = teacher.unpaired.distinct
    if found < 2:
        raise DataError(
            f"teacher.privileged has unpaired, which shows another training problem with its solution: {found} of "
            f"{len(teacher.problems)} has one, and there must be two that differ; give data.train.solution_field, or "
            "leave unpaired out"
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
