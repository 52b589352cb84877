"""Hugging Face configs: which ones can be trained, and their rotary embedding in Megatron-Core's terms. Imports no Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dasd_megatron.config import ConfigError

# Megatron-Core's llama3 frequency scaling has these constants built in; only the factor is an argument.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Biases that the architecture can have and mbridge drops without a word. Qwen2's are always there, and mbridge keeps them.
_DROPPED_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}


def rotary_arguments(hf_config: PretrainedConfig) -> dict[str, Any]:
    """GPTModel's rotary arguments for a Hugging Face config; :class:`ConfigError` for a scaling that Megatron-Core cannot represent."""
    arguments: dict[str, Any] = {"rotary_base": hf_config.rope_theta}
    scaling = getattr(hf_config, "rope_scaling", None)
    if not scaling:
        return arguments
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        arguments["seq_len_interpolation_factor"] = scaling["factor"]
    elif kind == "llama3":
        for name, value in _LLAMA3_CONSTANTS.items():
            if scaling[name] != value:
                raise ConfigError(f"model.path: rope_scaling.{name}={scaling[name]} in config.json; Megatron-Core has {value} built in")
        arguments.update(rope_scaling=True, rope_scaling_factor=scaling["factor"])
    elif kind != "default":
        raise ConfigError(f"model.path: rope_scaling type {kind!r} in config.json is not supported: only default, linear and llama3 are")
    return arguments


def read_hf_config(path: str | Path) -> PretrainedConfig:
    """The config of a Hugging Face directory; :class:`ConfigError` when it is missing, broken, or asks for what is not supported."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path={path}: no config.json there; give a Hugging Face model directory")
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True)
    # What transformers raises for unreadable JSON, an unknown model_type, missing keys of rope_scaling, and values of another type.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path={path}: config.json cannot be used ({reason}); give a qwen2, qwen3 or llama model") from error
    if hf_config.model_type not in _DROPPED_BIASES:
        raise ConfigError(f"model.path={path}: model_type {hf_config.model_type!r} is not supported; qwen2, qwen3 and llama are")
    if getattr(hf_config, "use_sliding_window", False):
        raise ConfigError(f"model.path={path}: use_sliding_window=true in config.json is not supported; give a model without it")
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"model.path={path}: hidden_act={hf_config.hidden_act!r} in config.json is not supported; silu is")
    for name in _DROPPED_BIASES[hf_config.model_type]:
        if getattr(hf_config, name, False):
            raise ConfigError(f"model.path={path}: {name}=true in config.json is not supported; give a model without these biases")
    rotary_arguments(hf_config)
    return hf_config
