"""Checks of a run that goes on from another one, or from where it was."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dasd_megatron.config import Config, TeacherConfig, read_config
from dasd_megatron.data.examples import Example, read_examples
from dasd_megatron.data.prompts import Problem, read_written_problems
from dasd_megatron.errors import ConfigError
from dasd_megatron.reading import read_json
from dasd_megatron.run.checks import flatten
from dasd_megatron.run.paths import RunPaths

# A run writes these once its configuration is written.
_ROWS = ("metrics.jsonl", "warm_start.jsonl", "evaluation.jsonl")
# The tensors of a checkpoint, or the meaning of its data position, depend on these. Everything else may change when a
# run goes on.
_FIXED_ON_RESUME = (
    "model",
    "data",
    "run.seed",
    "batch.groups",
    "warm_start",
    "precision.params_dtype",
    "optimizer.distributed",
    "teacher.weights",
)
# What a file holds is compared itself, since it may have moved.
_MAY_DIFFER = (
    "resume",
    "run.dir",
    "warm_start.path",
    *(
        f"data.{name}.{field}"
        for name in ("train", "heldout")
        for field in ("path", "problem_field", "answer_field", "solution_field", "no_answer")
    ),
)


def check_free_directory(resume: str, paths: RunPaths) -> None:
    """Refuse (ConfigError) to begin a run in a directory that holds one, whole or not."""
    if os.path.lexists(paths.config):
        if resume == "none":
            raise ConfigError(
                f"run.dir={paths.root} already holds a run: write resume=auto to continue it, or another run.dir"
            )
        return
    traces = [paths.checkpoint_mark, *(paths.root / name for name in _ROWS)]
    found = [*(path for path in traces if os.path.lexists(path)), *paths.checkpoints.glob("step_*")]
    if found:
        raise ConfigError(
            f"run.dir={paths.root} holds {found[0].name} of a run and no {paths.config.name} that says of which: "
            f"restore that file, or write another run.dir, where resume={paths.checkpoints}/step_... goes on"
        )


def find_continued_runs(resume: str, paths: RunPaths) -> list[RunPaths]:
    """Return the runs that this one goes on from: the one in its directory, and the one that the checkpoint in
    ``resume`` belongs to."""
    runs = [paths] if os.path.lexists(paths.config) else []
    if resume not in ("none", "auto"):
        other = RunPaths(Path(resume).resolve().parent.parent)
        if other.config.exists() and other.root != paths.root.resolve():
            runs.append(other)
    return runs


def check_same_run(previous: Config, config: Config) -> None:
    """Refuse (ConfigError) to resume with another model or other data, and print what else has changed."""
    before, after = flatten(dataclasses.asdict(previous)), flatten(dataclasses.asdict(config))
    # A mapping's entry may be in one of the two alone.
    for name in {**before, **after}:
        value = after.get(name)
        if name in _MAY_DIFFER or before.get(name) == value:
            continue
        if name == "data.date" and before[name] is None:
            # The run began before dates were kept, or with a template without a date.
            continue
        if name == "warm_start.privileged_share" and value is None and before[name] == 0.5:
            # The run began when this was the default.
            continue
        if any(name == fixed or name.startswith(fixed + ".") for fixed in _FIXED_ON_RESUME):
            raise ConfigError(
                f"{name}={value} differs from {before.get(name)} in the run to resume: write "
                f"{name}={before.get(name)}, or start a new run"
            )
        print(f"resuming with {name}={value} (was {before.get(name)})", flush=True)


def check_same_prompts(run: RunPaths, digests: Mapping[str, str], teacher: TeacherConfig) -> None:
    """Refuse (ConfigError) to go on with other prompts than those the run began with. The teacher's may change with
    its settings."""
    if not run.prompts.exists():
        return
    found = read_json(run.prompts, {str: str}, advice="remove it to go on without it")
    changed = [name for name, digest in digests.items() if found.get(name, digest) != digest]
    if "train.teacher" in changed and read_config(run.config).teacher != teacher:
        changed.remove("train.teacher")
    if changed:
        raise ConfigError(
            f"the prompts of {changed[0]} are not those that the run began with ({run.prompts}): a template, a "
            "function of yours or the tokenizer has changed; restore it, or start a new run"
        )


def check_same_problems(run: RunPaths, loaded: Mapping[str, Sequence[Problem]]) -> None:
    """Refuse (ConfigError) to go on with other problems than those the run began with: the data position would mean
    something else."""
    for name, problems in loaded.items():
        path = run.problems(name)
        if read_written_problems(path) != problems:
            raise ConfigError(
                f"data.{name}: the file or generator changed since the run began, its problems differ from {path}: "
                "restore it, or start a new run"
            )


def check_same_examples(run: RunPaths, loaded: Sequence[Example]) -> None:
    """Refuse (ConfigError) to go on with other examples of ``warm_start.path`` than those the run began with; none
    stands for a warm start without a file."""
    found = read_examples(run.examples) if run.examples.exists() else []
    if found != loaded:
        raise ConfigError(
            f"warm_start.path: the file, a template or the tokenizer changed since the run began, its examples differ "
            f"from {run.examples}: restore it, or start a new run"
        )
