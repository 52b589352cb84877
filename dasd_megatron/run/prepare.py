"""Preparation of a run before any of its processes starts: the run directory, the problems, the first model, and every
check that needs no GPU."""

from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_megatron.config import UMASKS, Config, read_config, save_config
from dasd_megatron.data.examples import Example, load_examples, write_examples
from dasd_megatron.data.generators import generate_problems, generate_splits
from dasd_megatron.data.privileged import NEEDS_SOLUTION
from dasd_megatron.data.prompts import Problem, check_disjoint, write_problems
from dasd_megatron.data.reader import load_problems
from dasd_megatron.data.templates import make_renderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.files import naming_path, replace_file
from dasd_megatron.models.hf_config import (
    TIED_HEAD,
    expected_tensors,
    is_megatron_checkpoint,
    load_tokenizer,
    read_hf_config,
)
from dasd_megatron.models.hf_weights import HfWeights
from dasd_megatron.planning.layout import check_layout, check_teacher_lengths
from dasd_megatron.plugins import load_function
from dasd_megatron.run.checks import (
    check_end_tokens,
    check_key,
    check_run_prompts,
    check_warm_start_end,
    check_warm_start_lengths,
    learns_solutions,
    make_teacher,
    needs_teacher,
)
from dasd_megatron.run.claim import claim_directory
from dasd_megatron.run.dates import choose_date, with_date
from dasd_megatron.run.environment import describe_environment
from dasd_megatron.run.paths import RunPaths, start_hf_files
from dasd_megatron.run.resume import (
    check_free_directory,
    check_same_examples,
    check_same_problems,
    check_same_prompts,
    check_same_run,
    find_continued_runs,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def prepare_run(config: Config, root: Path) -> RunPaths:
    """Check everything that can be checked without a model in memory and write the run directory's fixed parts.

    The configuration that the run goes by is the one that is written: it may have got a date.

    Raises:
        ConfigError, DataError, TemplateError, WeightsError, AccessError, DiscoveryError, RunDirectoryError: with one
        line on what is wrong and what to do.
    """
    paths = RunPaths(root)
    check_key(config)
    _check_functions(config)
    check_free_directory(config.resume, paths)
    continued = find_continued_runs(config.resume, paths)
    for run in continued:
        previous = read_config(run.config)
        # A run keeps its date when it goes on.
        config = with_date(config, config.data.date or previous.data.date)
        check_same_run(previous, config)
    _make_directory(paths, config.run.readable_by)
    claim_directory(root)
    hf_config, tokenizer = _prepare_model(config, paths)
    config = choose_date(config, tokenizer)
    train, heldout = _load_problems(config)
    for run in continued:
        check_same_problems(run, {"train": train, "heldout": heldout})
    digests = _check_problems(config, hf_config, tokenizer, train, heldout)
    examples = _load_examples(config, hf_config, tokenizer)
    for run in continued:
        check_same_prompts(run, digests, config.teacher)
        check_same_examples(run, examples)
    for name, problems in {"train": train, "heldout": heldout}.items():
        # The problems of a run that goes on have just been found equal, and stay as they were written.
        if not (paths.config.exists() and paths.problems(name).exists()):
            with naming_path(paths.problems(name)):
                write_problems(paths.problems(name), problems)
    if examples and not (paths.config.exists() and paths.examples.exists()):
        with naming_path(paths.examples):
            write_examples(paths.examples, examples)
    replace_file(paths.prompts, json.dumps(digests, indent=2) + "\n")
    with naming_path(paths.config):
        save_config(config, paths.config)
    replace_file(root / "environment.json", json.dumps(describe_environment(config.run.seed), indent=2) + "\n")
    return paths


def _check_functions(config: Config) -> None:
    """Load the user's own functions, so that one that cannot be loaded is refused now."""
    functions = {
        "verify.reward": config.verify.reward,
        "verify.measures": config.verify.measures,
        "rollout.filter": config.rollout.filter,
        "rollout.function": config.rollout.function,
    }
    for field, path in functions.items():
        load_function(path, field)


def _make_directory(paths: RunPaths, readable_by: str) -> None:
    root = paths.root
    try:
        paths.problems("train").parent.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("not writable")
        if readable_by != "owner":
            # A directory that was there before may be closed to others.
            os.chmod(root, stat.S_IMODE(root.stat().st_mode) | (0o777 & ~UMASKS[readable_by]))
    except OSError as error:
        raise ConfigError(
            f"run.dir={root} cannot be written ({error.strerror or error}): give a directory you can write to"
        ) from error


def _prepare_model(config: Config, paths: RunPaths) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Make the tiny model where none is given, check the model that the run starts from, and return its config and
    tokenizer."""
    model = config.model
    if model.path is None and model.architecture:
        raise ConfigError(
            "model.path is required with a preset: write model.path=DIRECTORY, with the weights of that model"
        )
    if model.path is None and not (paths.start_model / "config.json").exists():
        from dasd_megatron.models.tiny import make_tiny_model

        with naming_path(paths.start_model):
            make_tiny_model(paths.start_model, model.tiny, config.run.seed)
    # The config comes before the tokenizer: of an architecture that is not supported, it is the config that should be
    # complained about.
    hf_config = read_hf_config(start_hf_files(model, paths))
    for name, expected in model.architecture.items():
        # The context length is not part of the weights: releases of one model differ in it.
        if name != "max_position_embeddings" and getattr(hf_config, name, None) != expected:
            raise ConfigError(
                f"model.path={model.path}: config.json has {name}={getattr(hf_config, name, None)}, the chosen "
                f"preset {expected}: choose the preset of that model, or model=hf"
            )
    check_layout(config.model, config.parallel, config.rollout, hf_config)
    check_teacher_lengths(config, hf_config)
    tokenizer = load_tokenizer(start_hf_files(model, paths))
    check_end_tokens(start_hf_files(model, paths), tokenizer, hf_config.vocab_size)
    if model.path is not None and not is_megatron_checkpoint(model.path):
        with HfWeights(model.path) as weights:
            weights.check_coverage(expected_tensors(hf_config), ignored=TIED_HEAD)
    return hf_config, tokenizer


def _load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Return the training and the held-out problems, which have none in common."""
    needs_solution = learns_solutions(config.warm_start) or (
        needs_teacher(config.algorithm) and set(config.teacher.privileged) <= set(NEEDS_SOLUTION)
    )
    sources = config.data
    say = functools.partial(print, flush=True)
    if sources.train.generator is not None and sources.heldout.generator is not None:
        return generate_splits(sources.train, sources.heldout)
    if sources.heldout.generator is not None:
        heldout = generate_problems(sources.heldout, "heldout")
    else:
        heldout = load_problems(
            sources.heldout, "heldout", needs_solution=False, max_answer_chars=config.verify.max_answer_chars, say=say
        )
    if sources.train.generator is not None:
        train = generate_problems(sources.train, "train", exclude=heldout)
    else:
        train = load_problems(
            sources.train,
            "train",
            needs_solution=needs_solution,
            max_answer_chars=config.verify.max_answer_chars,
            say=say,
        )
    check_disjoint(train, heldout)
    return train, heldout


def _check_problems(
    config: Config,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Problem],
    heldout: list[Problem],
) -> dict[str, str]:
    """Refuse problems that cannot be trained or evaluated on; return the digests of the prompts."""
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    digests = check_run_prompts(config, renderer, train, heldout, vocab_size=hf_config.vocab_size)
    if config.warm_start.steps > 0:
        check_warm_start_end(config.model, config.warm_start, tokenizer)
    if learns_solutions(config.warm_start):
        check_warm_start_lengths(
            config.model,
            config.warm_start,
            hf_config,
            make_teacher(config, renderer, train),
            tokenizer,
            train,
        )
    if config.batch.groups > len(train):
        raise ConfigError(
            f"batch.groups={config.batch.groups} exceeds the {len(train)} training problems: lower it, or give more "
            "problems"
        )
    return digests


def _load_examples(config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the examples of ``warm_start.path``, none without one."""
    if config.warm_start.path is None:
        return []
    return load_examples(
        Path(config.warm_start.path),
        make_renderer(config.data, config.teacher, tokenizer),
        vocab_size=hf_config.vocab_size,
        max_tokens=hf_config.max_position_embeddings,
    )
