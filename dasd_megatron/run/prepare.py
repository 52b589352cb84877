"""What happens before any process starts: the run directory, the problems, the first model, and every check that needs
no GPU."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import dasd_megatron
from dasd_megatron.config import UMASKS, Config, read_config, save_config
from dasd_megatron.data.generators import generate_problems, generate_splits
from dasd_megatron.data.prompts import Problem, check_disjoint, load_problems, write_problems
from dasd_megatron.data.templates import make_renderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import (
    TIED_HEAD,
    expected_tensors,
    is_megatron_checkpoint,
    load_tokenizer,
    read_hf_config,
)
from dasd_megatron.models.hf_weights import HfWeights
from dasd_megatron.planning.layout import check_layout
from dasd_megatron.plugins import load_function
from dasd_megatron.run.checks import (
    check_key,
    check_prompt_lengths,
    check_warm_start_lengths,
    flatten,
    needs_teacher,
)
from dasd_megatron.run.paths import RunPaths, start_hf_files

_PACKAGES = (
    "dasd-megatron",
    "torch",
    "megatron-core",
    "mbridge",
    "transformers",
    "transformer-engine",
    "reasoning-gym",
    "math-verify",
    "sglang",
)
# What a checkpoint's tensors, or the meaning of its data position, depend on. Everything else may change when a run
# goes on.
_FIXED_ON_RESUME = (
    "model", "data", "run.seed", "batch.groups", "warm_start", "precision.params_dtype", "optimizer.distributed", "teacher.weights",
)  # fmt: skip
_LOST_NODE_SECONDS = 300.0
_claimed: dict[Path, Any] = {}

logger = logging.getLogger(__name__)


def prepare_run(config: Config, root: Path) -> RunPaths:
    """Check everything that can be checked without a model in memory and write the run directory's fixed parts.

    Raises:
        ConfigError, DataError, TemplateError, WeightsError, AccessError, DiscoveryError: with one line on what is wrong
        and what to do.
    """
    paths = RunPaths(root)
    check_key(config)
    functions = {
        "verify.reward": config.verify.reward,
        "rollout.filter": config.rollout.filter,
        "rollout.function": config.rollout.function,
    }
    for field, path in functions.items():
        load_function(path, field)
    if paths.config.exists() and config.resume == "none":
        raise ConfigError(f"run.dir={root} already holds a run: write resume=auto to continue it, or another run.dir")
    continued = _continued_runs(config, paths)
    for run in continued:
        _check_same_run(read_config(run.config), config)
    try:
        paths.problems("train").parent.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("not writable")
        if config.run.readable_by != "owner":
            # Whoever made it may have kept it to himself.
            os.chmod(root, stat.S_IMODE(root.stat().st_mode) | (0o777 & ~UMASKS[config.run.readable_by]))
    except OSError as error:
        raise ConfigError(
            f"run.dir={root} cannot be written ({error.strerror or error}): give a directory you can write to"
        ) from error
    _claim(root)

    if config.model.path is None and config.model.architecture:
        raise ConfigError(
            "model.path is required with a preset: write model.path=DIRECTORY, with the weights of that model"
        )
    if config.model.path is None and not (paths.start_model / "config.json").exists():
        from dasd_megatron.models.tiny import make_tiny_model

        make_tiny_model(paths.start_model, config.model.tiny, config.run.seed)
    # Before the tokenizer: of an architecture that is not supported, it is the config that should be complained about.
    hf_config = read_hf_config(start_hf_files(config, paths))
    for name, expected in config.model.architecture.items():
        # The context length is not part of the weights: releases of one model differ in it.
        if name != "max_position_embeddings" and getattr(hf_config, name, None) != expected:
            raise ConfigError(
                f"model.path={config.model.path}: config.json has {name}={getattr(hf_config, name, None)}, the chosen "
                f"preset {expected}: choose the preset of that model, or model=hf"
            )
    check_layout(config, hf_config)
    tokenizer = load_tokenizer(start_hf_files(config, paths))
    if config.model.path is not None and not is_megatron_checkpoint(config.model.path):
        with HfWeights(config.model.path) as weights:
            weights.check_coverage(expected_tensors(hf_config), ignored=TIED_HEAD)
    train, heldout = _load_data(config)
    for run in continued:
        _check_same_problems(run, {"train": train, "heldout": heldout})
    renderer = make_renderer(config, tokenizer)
    check_prompt_lengths(config, renderer, train, heldout)
    if config.warm_start.steps > 0:
        check_warm_start_lengths(config, hf_config, renderer, tokenizer, train)
    if config.batch.groups > len(train):
        raise ConfigError(
            f"batch.groups={config.batch.groups} exceeds the {len(train)} training problems: lower it, or give more "
            "problems"
        )
    for name, problems in {"train": train, "heldout": heldout}.items():
        # The problems of a run that goes on have just been found equal, and stay as they were written.
        if not (paths.config.exists() and paths.problems(name).exists()):
            write_problems(paths.problems(name), problems)
    save_config(config, paths.config)
    (root / "environment.json").write_text(json.dumps(_environment(config), indent=2) + "\n")
    return paths


def _claim(root: Path) -> None:
    """Keep other processes from working in the run directory until this one ends: they would remove each other's
    checkpoints.

    A requeued job may come back before a file system has heard that its node is lost, and waits for that.
    """
    path = root / "owner.json"
    if path in _claimed:
        return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the process lives
    job = os.environ.get("SLURM_JOB_ID")
    deadline = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip()
            if deadline is None:
                deadline = time.monotonic() + (_LOST_NODE_SECONDS if job is not None and f'"{job}"' in owner else 0.0)
            if time.monotonic() >= deadline:
                file.close()
                raise ConfigError(
                    f"run.dir={root} is in use by another process ({owner}): wait for it or stop it, or write another "
                    "run.dir"
                ) from error
            time.sleep(1.0)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other run uses run.dir=%s", path, error.strerror, root
            )
            break
    file.truncate(0)
    file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "slurm_job": job}))
    file.flush()
    _claimed[path] = file


def _load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    needs_solution = config.warm_start.steps > 0 or (needs_teacher(config) and config.teacher.privileged != "answer")
    sources = config.data
    if sources.train.generator is not None and sources.heldout.generator is not None:
        return generate_splits(sources.train, sources.heldout)
    if sources.heldout.generator is not None:
        heldout = generate_problems(sources.heldout, "heldout")
    else:
        heldout = load_problems(sources.heldout, "heldout", needs_solution=False)
    if sources.train.generator is not None:
        train = generate_problems(sources.train, "train", exclude=heldout)
    else:
        train = load_problems(sources.train, "train", needs_solution=needs_solution)
    check_disjoint(train, heldout)
    return train, heldout


def _continued_runs(config: Config, paths: RunPaths) -> list[RunPaths]:
    """The runs that this one goes on from: the one in its directory, and the one that the checkpoint in ``resume``
    belongs to."""
    runs = [paths] if paths.config.exists() else []
    if config.resume not in ("none", "auto"):
        other = RunPaths(Path(config.resume).resolve().parent.parent)
        if other.config.exists() and other.root != paths.root.resolve():
            runs.append(other)
    return runs


def _check_same_problems(run: RunPaths, loaded: dict[str, list[Problem]]) -> None:
    """Refuse to go on with other problems than those the run began with: the data position would mean something
    else."""
    for name, problems in loaded.items():
        path = run.problems(name)
        if not path.exists():
            continue
        # Only the newline byte ends a line: str.splitlines would also break inside a problem's text.
        saved = [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if saved != problems:
            raise ConfigError(
                f"data.{name}: the file or generator changed since the run began, its problems differ from {path}: "
                "restore it, or start a new run"
            )


def _check_same_run(previous: Config, config: Config) -> None:
    """Refuse to resume with another model or other data, and say what else has changed."""
    before, after = flatten(dataclasses.asdict(previous)), flatten(dataclasses.asdict(config))
    for name, value in after.items():
        # A problem set may have moved: what it holds is compared itself.
        if name in ("resume", "run.dir", "data.train.path", "data.heldout.path") or before.get(name) == value:
            continue
        if any(name == fixed or name.startswith(fixed + ".") for fixed in _FIXED_ON_RESUME):
            raise ConfigError(
                f"{name}={value} differs from {before.get(name)} in the run to resume: write "
                f"{name}={before.get(name)}, or start a new run"
            )
        print(f"resuming with {name}={value} (was {before.get(name)})", flush=True)


def _environment(config: Config) -> dict:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "seed": config.run.seed,
        "git_revision": _git_revision(),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def _git_revision() -> str | None:
    """The revision of this package's sources; None where they are no checkout, or lie inside another project's, or git
    does not work."""
    package = Path(dasd_megatron.__file__).resolve().parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() / package.name != package:
            return None
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40") or None
    # A run does not depend on this record, and git may be missing or hang on a slow disk.
    except (OSError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
