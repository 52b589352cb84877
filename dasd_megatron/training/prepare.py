"""What happens before any process starts: the run directory, the problems, the first model, and every check that needs no GPU."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dasd_megatron.config import Config, ConfigError, read_config, save_config
from dasd_megatron.data.generators import generate_problems, generate_splits
from dasd_megatron.data.prompts import Problem, check_disjoint, load_problems, write_problems
from dasd_megatron.data.templates import PromptRenderer, check_lengths

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
# What a checkpoint's tensors, or the meaning of its data position, depend on. Everything else may change when a run goes on.
_FIXED_ON_RESUME = (
    "model", "data", "run.seed", "batch.groups", "warm_start", "precision.params_dtype", "optimizer.distributed", "teacher.weights",
)  # fmt: skip


@dataclass(frozen=True)
class RunPaths:
    """Places in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def start_model(self) -> Path:
        """The tiny model made in code, where model.path is null."""
        return self.root / "start"

    @property
    def warm_started_model(self) -> Path:
        return self.root / "warm_start"

    @property
    def final_model(self) -> Path:
        return self.root / "model"

    @property
    def weights(self) -> Path:
        """Weights handed to the rollout server, one folder a version."""
        return self.root / "weights"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    def problems(self, name: str) -> Path:
        return self.root / "data" / f"{name}.jsonl"


def needs_teacher(config: Config) -> bool:
    """GRPO alone never looks at the teacher."""
    return config.algorithm.name != "grpo"


def start_path(config: Config, paths: RunPaths) -> Path:
    """The Hugging Face directory that the run begins from, before any warm start."""
    return Path(config.model.path) if config.model.path is not None else paths.start_model


def choose_run_dir(config: Config) -> Path:
    """``run.dir``, or ``runs/<name>/<date-time>``, or with ``resume=auto`` the newest run of that name."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    runs = Path("runs") / config.run.name
    if config.resume == "auto":
        existing = sorted(path.parent for path in runs.glob("*/config.yaml"))
        if existing:
            return existing[-1]
    return runs / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def prepare_run(config: Config, root: Path) -> RunPaths:
    """Check everything that can be checked without a model in memory and write the run directory's fixed parts.

    Raises:
        ConfigError, DataError, TemplateError: with one line on what is wrong and what to do.
    """
    paths = RunPaths(root)
    previous = read_config(paths.config) if paths.config.exists() else None
    if previous is not None:
        if config.resume == "none":
            raise ConfigError(f"run.dir={root} already holds a run: write resume=auto to continue it, or another run.dir")
        _check_same_run(previous, config)
    try:
        paths.problems("train").parent.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise ConfigError(f"run.dir={root} cannot be written ({error.strerror or error}): give a directory you can write to") from error

    if config.model.path is None and not (paths.start_model / "config.json").exists():
        from dasd_megatron.models.tiny import make_tiny_model

        make_tiny_model(paths.start_model, config.model.tiny, config.run.seed)
    tokenizer = load_tokenizer(start_path(config, paths))
    train, heldout = _load_data(config)
    check_prompt_lengths(config, make_renderer(config, tokenizer), train, heldout)
    if config.batch.groups > len(train):
        raise ConfigError(f"batch.groups={config.batch.groups} exceeds the {len(train)} training problems: lower it, or give more problems")
    write_problems(paths.problems("train"), train)
    write_problems(paths.problems("heldout"), heldout)
    save_config(config, paths.config)
    (root / "environment.json").write_text(json.dumps(_environment(config), indent=2) + "\n")
    return paths


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def make_renderer(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    return PromptRenderer(tokenizer, config.data.template, config.teacher.template, config.teacher.privileged, config.teacher.hint_fraction)


def check_prompt_lengths(config: Config, renderer: PromptRenderer, train: list[Problem], heldout: list[Problem]) -> None:
    """Refuse problems whose prompt, and for training ones the privileged prompt, exceed ``rollout.max_prompt_tokens``."""
    check_lengths(train, renderer, config.rollout.max_prompt_tokens, teacher=needs_teacher(config) or config.warm_start.steps > 0)
    check_lengths(heldout, renderer, config.rollout.max_prompt_tokens, teacher=False)


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


def _check_same_run(previous: Config, config: Config) -> None:
    """Refuse to resume with another model or other data, and say what else has changed."""
    before, after = _flatten(dataclasses.asdict(previous)), _flatten(dataclasses.asdict(config))
    for name, value in after.items():
        if name in ("resume", "run.dir") or before.get(name) == value:
            continue
        if any(name == fixed or name.startswith(fixed + ".") for fixed in _FIXED_ON_RESUME):
            raise ConfigError(
                f"{name}={value} differs from {before.get(name)} in the run to resume: write {name}={before.get(name)}, or start a new run"
            )
        print(f"resuming with {name}={value} (was {before.get(name)})", flush=True)


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _environment(config: Config) -> dict:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    source = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", source, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10
    )
    return {
        "seed": config.run.seed,
        "git_revision": git.stdout.strip() or None,
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }
