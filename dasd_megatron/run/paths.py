"""The places of a run's files: its directory, the files in it, and the model that it starts from."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from dasd_megatron.config import Config, ModelConfig
from dasd_megatron.data.prompts import Problem, read_written_problems
from dasd_megatron.models.hf_config import hf_folder


@dataclass(frozen=True)
class RunPaths:
    """Places in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The whole configuration of the run."""
        return self.root / "config.yaml"

    @property
    def start_model(self) -> Path:
        """The tiny model that is made in code where model.path is null."""
        return self.root / "start"

    @property
    def warm_started_model(self) -> Path:
        """The model after the warm start."""
        return self.root / "warm_start"

    @property
    def final_model(self) -> Path:
        """The trained model."""
        return self.root / "model"

    @property
    def weights(self) -> Path:
        """The weights that are handed to the rollout servers, one folder a version."""
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def checkpoint_mark(self) -> Path:
        """The file in a run that has had a checkpoint. Such a run never starts over by itself."""
        return self.root / "has_checkpoints"

    @property
    def rollouts(self) -> Path:
        """The folder of recorded rollouts."""
        return self.root / "rollouts"

    @property
    def prompts(self) -> Path:
        """Digests of the prompts that the problems had when the run began."""
        return self.root / "data" / "prompts.json"

    @property
    def examples(self) -> Path:
        """The examples of a warm start from a file, as token ids."""
        return self.root / "data" / "warm_start.jsonl"

    def problems(self, name: str) -> Path:
        """The run's own copy of a problem set."""
        return self.root / "data" / f"{name}.jsonl"


def start_path(model: ModelConfig, paths: RunPaths) -> Path:
    """Return the model that the run begins from, before any warm start: a Hugging Face directory or a converted
    checkpoint."""
    return Path(model.path) if model.path is not None else paths.start_model


def start_hf_files(model: ModelConfig, paths: RunPaths) -> Path:
    """Return the directory of the config and the tokenizer of the model that the run begins from."""
    return hf_folder(start_path(model, paths))


def choose_run_dir(config: Config) -> Path:
    """Return ``run.dir``; where it is null ``runs/<name>/<date-time>``, or with ``resume=auto`` the newest run of that
    name."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    runs = Path("runs") / config.run.name
    if config.resume == "auto":
        existing = sorted(path.parent for path in runs.glob("*/config.yaml"))
        if existing:
            return existing[-1]
    return runs / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def run_problems(paths: RunPaths, name: str) -> list[Problem]:
    """Return the problems ``train`` or ``heldout`` that :func:`dasd_megatron.run.prepare.prepare_run` has written."""
    return read_written_problems(paths.problems(name))
