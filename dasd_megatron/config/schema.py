"""The typed configuration: every value that a run reads, with its unit, its bounds and its choices.

The sections stand in ``schema_training``, ``schema_rollout`` and ``schema_observability``; :class:`Config` joins them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dasd_megatron.config.fields import REQUIRED, limits_of, setting, walk_fields
from dasd_megatron.config.schema_backend import BackendConfig
from dasd_megatron.config.schema_observability import HealthConfig, LoggingConfig, WatchConfig
from dasd_megatron.config.schema_rollout import DataConfig, EvaluationConfig, RolloutConfig, VerifyConfig
from dasd_megatron.config.schema_training import (
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    PrecisionConfig,
    TeacherConfig,
    WarmStartConfig,
)

UMASKS = {"owner": 0o077, "group": 0o027, "all": 0o022}
"""Permissions that ``run.readable_by`` takes away from new files."""


@dataclass
class RunConfig:
    """The run itself: its name, its place and its length."""

    name: str = setting(REQUIRED, "name of the run; also the folder under runs/")
    dir: str | None = setting(
        None, "run directory; null: runs/<name>/<date-time>, or with resume=auto the newest run of that name"
    )
    seed: int = setting(1, "seed of weights, data order, rollouts and dropout", low=0, high=2**31 - 1)
    steps: int = setting(REQUIRED, "training steps; one step is one batch of rollouts", low=0)
    readable_by: str = setting(
        "owner",
        "owner, group or all: who may read what the run writes; only the owner may change it",
        choices=tuple(UMASKS),
    )


@dataclass
class Config:
    """The whole configuration: every value that a run reads."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    algorithm: AlgorithmConfig = dataclasses.field(default_factory=AlgorithmConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    loss: PolicyLossConfig = dataclasses.field(default_factory=PolicyLossConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    verify: VerifyConfig = dataclasses.field(default_factory=VerifyConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    resume: str = setting(
        "none",
        "none, auto (the newest checkpoint of the run directory, or a fresh start), or the path of a checkpoint",
    )


def known_fields() -> dict[str, str]:
    """Return the documentation of every field of the configuration by its dotted name."""
    return {name: field.metadata["doc"] for name, field in walk_fields(Config)}


def field_limits() -> dict[str, str]:
    """Return, for people, what each field accepts that has choices or inclusive bounds."""
    described = {}
    for name, field in walk_fields(Config):
        limits = limits_of(field)
        if limits.choices:
            described[name] = ", ".join(limits.choices)
        elif limits.low is not None and limits.high is not None:
            described[name] = f"{limits.low} to {limits.high}"
        elif limits.low is not None:
            described[name] = f"at least {limits.low}"
        elif limits.high is not None:
            described[name] = f"at most {limits.high}"
    return described
