"""The typed configuration, its checks and its loading."""

from dasd_megatron.config.checks import validate
from dasd_megatron.config.checks_rollout import check_servers, check_sglang_arguments, is_loopback
from dasd_megatron.config.fields import FUNCTION_PATH
from dasd_megatron.config.loading import load_config, read_config, save_config
from dasd_megatron.config.passes import why_scored_first
from dasd_megatron.config.pipeline import stage_layers
from dasd_megatron.config.schedules import ScheduleConfig
from dasd_megatron.config.schema import UMASKS, Config, RunConfig, field_limits, known_fields
from dasd_megatron.config.schema_backend import BackendConfig
from dasd_megatron.config.schema_observability import WATCH_CONDITIONS, HealthConfig, LoggingConfig, WatchConfig
from dasd_megatron.config.schema_rollout import (
    DataConfig,
    DataSourceConfig,
    EvaluationConfig,
    RolloutConfig,
    SGLangConfig,
    VerifyConfig,
)
from dasd_megatron.config.schema_training import (
    ARISING_SOURCES,
    PRIVILEGED_SOURCES,
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    PrecisionConfig,
    TeacherConfig,
    TinyModelConfig,
    WarmStartConfig,
)

__all__ = [
    "ARISING_SOURCES",
    "AlgorithmConfig",
    "BackendConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSourceConfig",
    "EvaluationConfig",
    "FUNCTION_PATH",
    "HealthConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PRIVILEGED_SOURCES",
    "ParallelConfig",
    "PolicyLossConfig",
    "PrecisionConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "ScheduleConfig",
    "TeacherConfig",
    "TinyModelConfig",
    "UMASKS",
    "VerifyConfig",
    "WATCH_CONDITIONS",
    "WarmStartConfig",
    "WatchConfig",
    "check_servers",
    "check_sglang_arguments",
    "field_limits",
    "is_loopback",
    "known_fields",
    "load_config",
    "read_config",
    "save_config",
    "stage_layers",
    "validate",
    "why_scored_first",
]
