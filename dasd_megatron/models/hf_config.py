"""Hugging Face configs: the ones that can be trained, and their rotary embedding in Megatron-Core's terms.

Imports no Megatron, and torch and transformers only where a function needs them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_megatron.errors import ConfigError, enumerate_names, first_line
from dasd_megatron.models.families import FAMILIES
from dasd_megatron.reading import UnreadableError, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Rows of embedding and head are padded to a multiple of this on every tensor-parallel rank, for the alignment of the
# GEMMs.
_VOCAB_ALIGNMENT = 64
# Megatron-Core's llama3 frequency scaling has these constants built in; only the factor is an argument.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# A tied model's files may hold these weights although the architecture has no use for them.
TIED_HEAD = ("lm_head.weight",)
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# Configs give the number of experts in a mixture under one of these names.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# These fields change what the model computes, but Megatron-Core or mbridge would ignore them. So only these values
# are accepted.
_ONLY = {"partial_rotary_factor": 1.0, "rope_interleaved": False}

_PARTS = {
    "weight": ("*.safetensors",),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken"),
}
"""Files of a complete directory, of which each kind has one."""


def rotary_arguments(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Return GPTModel's rotary arguments for a Hugging Face config; :class:`ConfigError` for a scaling that
    Megatron-Core cannot represent."""
    arguments: dict[str, Any] = {"rotary_base": hf_config.rope_theta}
    scaling = getattr(hf_config, "rope_scaling", None)
    if not scaling:
        return arguments
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    supported = FAMILIES[hf_config.model_type].rope_types
    if kind not in supported:
        names = enumerate_names(supported, "and")
        raise ConfigError(f"rope_scaling type {kind!r} is not supported: only {names} are")
    if kind == "linear":
        arguments["seq_len_interpolation_factor"] = scaling["factor"]
    elif kind == "llama3":
        for name, value in _LLAMA3_CONSTANTS.items():
            if scaling[name] != value:
                raise ConfigError(f"rope_scaling.{name}={scaling[name]}; Megatron-Core has {value} built in")
        arguments.update(rope_scaling=True, rope_scaling_factor=scaling["factor"])
    return arguments


def check_model_directory(path: str | Path, field: str) -> dict[str, Any]:
    """Refuse what is no Hugging Face directory before anything of it is loaded; return its config.json.

    ``field``: what the caller's user has called the path. Raises ConfigError.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    folder = Path(path)
    advice = "give a Hugging Face model directory"
    if not folder.is_dir():
        raise ConfigError(f"{field}={path} is {'a file' if folder.exists() else 'not there'}; {advice}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{field}={path}: no config.json there; {advice}")
    try:
        config = read_json(folder / "config.json", dict, advice=advice)
    except UnreadableError as error:
        raise ConfigError(f"{field}={path}: {error}") from error
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{field}={path}: config.json names no model_type; {advice}")
    if kind not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"{field}={path}: config.json names the model_type {kind[:80]!r}, which transformers does not know"
        )
    return config


def check_complete_directory(path: str | Path, field: str) -> None:
    """Refuse a Hugging Face directory that lacks weights or a tokenizer; raises as :func:`check_model_directory`."""
    check_model_directory(path, field)
    for kind, names in _PARTS.items():
        if not any(found for name in names for found in Path(path).glob(name)):
            raise ConfigError(f"{field}={path}: there is no {kind} ({', '.join(names)}); give a complete directory")


def read_hf_config(path: str | Path, field: str = "model.path") -> PretrainedConfig:
    """Return the config of a Hugging Face directory; :class:`ConfigError` when it is missing, broken, or asks for what
    is not supported.

    ``field``: what the caller's user has called the path.
    """
    raw = check_model_directory(path, field)
    from transformers import AutoConfig, PretrainedConfig

    families = enumerate_names(FAMILIES, "or")
    try:
        raw = read_json(Path(path) / "config.json", dict, advice=f"give a {families} model")
    except UnreadableError as error:
        raise ConfigError(
            f"{field}={path}: config.json cannot be used ({error.reason}); give a {families} model"
        ) from error
    try:
        hf_config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # transformers raises these for unreadable JSON, an unknown model_type, missing keys of rope_scaling, and values of
    # another type.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{field}={path}: config.json cannot be used ({first_line(error)}); give a {families} model"
        ) from error
    reason = _other_family(hf_config)
    if reason is None and raw.get("rope_parameters") is not None and not hasattr(PretrainedConfig, "rope_parameters"):
        reason = (
            "rope_parameters in config.json is read by transformers 5 alone; write rope_theta and rope_scaling instead"
        )
    reason = reason or _wrong_type(hf_config) or _unsupported(hf_config)
    if reason is not None:
        raise ConfigError(f"{field}={path}: {reason}")
    try:
        rotary_arguments(hf_config)
    except ConfigError as error:
        raise ConfigError(f"{field}={path}: {error} (config.json)") from error
    return hf_config


def _other_family(hf_config: PretrainedConfig) -> str | None:
    """Return why the architecture is none of the table, or None."""
    experts = next((name for name in _EXPERTS if getattr(hf_config, name, None)), None)
    if experts is not None:
        return (
            f"{experts}={getattr(hf_config, experts)} in config.json makes it a mixture of experts, which needs expert "
            f"parallelism and is not supported yet; give a dense {enumerate_names(FAMILIES, 'or')} model"
        )
    if hf_config.model_type not in FAMILIES:
        families = enumerate_names(FAMILIES, "and")
        return f"model_type {hf_config.model_type!r} is not supported; {families} are"
    return None


def _wrong_type(hf_config: PretrainedConfig) -> str | None:
    """Return which field that the package reads is missing or of another type, or None."""
    kinds_of: dict[str, tuple[type, ...]] = {
        "tie_word_embeddings": (bool,),
        "rope_theta": (int, float),
        "rms_norm_eps": (int, float),
        **dict.fromkeys(_SIZES, (int,)),
    }
    for name, kinds in kinds_of.items():
        value = getattr(hf_config, name, None)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds != (bool,)):
            return f"{name}={value!r} in config.json; expected {' or '.join(kind.__name__ for kind in kinds)}"
    return None


def _unsupported(hf_config: PretrainedConfig) -> str | None:
    """Return what the model of a supported family asks for and Megatron-Core would pass over, or None."""
    if getattr(hf_config, "use_sliding_window", False):
        return "use_sliding_window=true in config.json is not supported; give a model without it"
    if hf_config.hidden_act != "silu":
        return f"hidden_act={hf_config.hidden_act!r} in config.json is not supported; silu is"
    for name in FAMILIES[hf_config.model_type].refused_biases:
        if getattr(hf_config, name, False):
            return f"{name}=true in config.json is not supported; give a model without these biases"
    for name, supported in _ONLY.items():
        value = getattr(hf_config, name, None)
        if value is not None and value != supported:
            return f"{name}={value!r} in config.json is not supported; {supported!r} is"
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or []):
        return "layer_types has sliding_attention in config.json, which is not supported"
    if getattr(hf_config, "quantization_config", None) is not None:
        return "quantization_config in config.json is not supported; give unquantised weights"
    return None


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the rows of embedding and head, padding included, that ``tensor_parallel`` ranks share."""
    alignment = _VOCAB_ALIGNMENT * tensor_parallel
    return math.ceil(vocab_size / alignment) * alignment


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Return True where ``path`` is a distributed checkpoint of Megatron-Core, and not a Hugging Face directory."""
    return (Path(path) / ".metadata").is_file()


def hf_folder(path: str | Path) -> Path:
    """Return the folder of a model's config and tokenizer: its directory, or the folder ``hf`` of a checkpoint that
    this package has written."""
    return Path(path) / "hf" if is_megatron_checkpoint(path) else Path(path)


def expected_tensors(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight of the architecture, as transformers has them; a tied head is not one."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"config.json describes no model that transformers can make ({first_line(error)})") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def declared_dtype(hf_config: PretrainedConfig) -> str | None:
    """Return the name of the weights' dtype by config.json, which need not be that of the files; None where it does not
    say."""
    values = hf_config.to_dict()
    # transformers 4.56 renamed it.
    name = values.get("dtype") or values.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def stored_vocab_size(path: str | Path) -> int | None:
    """Return the number of tokens by the config of a Hugging Face directory, of any architecture; None where it does
    not say."""
    from transformers import AutoConfig

    if not (Path(path) / "config.json").is_file():
        return None
    try:
        size = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).vocab_size
    # A config that cannot be read is refused by what makes a model of it. Those of several models have no such field.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def end_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a response of a Hugging Face directory's model: by its config, by its generation
    config and by its tokenizer. Servers take all of them."""
    from transformers import AutoConfig, GenerationConfig

    ids: set[int] = set()
    for load in (AutoConfig.from_pretrained, GenerationConfig.from_pretrained, lambda *_args, **_options: tokenizer):
        try:
            given = getattr(load(path, local_files_only=True), "eos_token_id", None)
        # A generation config may be absent, and a config that cannot be read is refused by what makes a model of it.
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        ids.update(token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int))
    return ids


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a Hugging Face directory; :class:`ConfigError` when it has none or a broken one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # transformers raises a dozen classes here, and the tokenizers library bare Exceptions.
    except Exception as error:
        raise ConfigError(
            f"model.path={path}: its tokenizer cannot be loaded ({first_line(error)}); "
            "put the model's tokenizer.json and tokenizer_config.json there"
        ) from error
