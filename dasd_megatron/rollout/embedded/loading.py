"""Models and tokenizers of the embedded server, from Hugging Face directories on this machine."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dasd_megatron.models.hf_weights import INDEX_FILE
from dasd_megatron.reading import UnreadableError, read_json
from dasd_megatron.rollout.embedded.schema import brief

MAX_FILES = 4096
MAX_BYTES_PER_WEIGHT = 8
"""An update may have files as large as the served model in float64."""
MAX_CONFIG_INTEGER = 2**31
_ADVICE = "give a complete Hugging Face model directory"
_IGNORED_SETTINGS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
)


class ModelDirectoryError(RuntimeError):
    """A directory that is not a complete Hugging Face causal LM, or not of the served architecture."""


def message_in_one_line(error: BaseException) -> str:
    """Return what an error says without line breaks, at most 500 characters."""
    return " ".join(str(error).split())[:500]


def load_update(
    path: str, dtype: torch.dtype, device: torch.device, config: PretrainedConfig, weights: int
) -> PreTrainedModel:
    """Load other weights for the served model from a directory that a client has named.

    config: the served model's, which the directory has to fit exactly; weights: the number of its parameters. Raises
    ModelDirectoryError.
    """
    try:
        _check_files(Path(path), MAX_BYTES_PER_WEIGHT * weights + (1 << 26))
        if (Path(path) / "config.json").exists():
            _check_same_architecture(path, config)
    except UnreadableError as error:
        raise ModelDirectoryError(str(error)) from error
    # The system refuses paths that are too long or have a null character.
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"{brief(path)} cannot be read: {message_in_one_line(error)}") from error
    return load_model(path, dtype, device, config)


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load a causal LM onto ``device`` from a local directory; nothing is fetched.

    config: takes the place of the directory's. Raises ModelDirectoryError when the directory is missing, incomplete,
    unreadable or of another shape.
    """
    if not Path(path).is_dir():
        raise ModelDirectoryError(f"{path} is not a directory; give a Hugging Face model directory")
    try:
        with torch.inference_mode(False):
            # The type is a pair where output_loading_info is set, which transformers does not declare.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=copy.deepcopy(config),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,  # other weights are pickles
                trust_remote_code=False,
            )
    # transformers raises a dozen kinds of errors here. Each of them means that this directory cannot be served.
    except Exception as error:
        raise ModelDirectoryError(
            f"cannot load a causal LM from {path}: {type(error).__name__}: {message_in_one_line(error)}"
        ) from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise ModelDirectoryError(
                f"{path} does not fit its architecture: {len(info[kind])} {kind.replace('_', ' ')} ({names}, ...)"
            )
    # matmul picks other kernels, with other rounding, where a weight requires a gradient.
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        # A copy is equally aligned on every load, and no longer backed by the file.
        parameter.data = parameter.data.to(device, copy=True)
    # Buffers are left.
    return model.to(device)


def _check_files(path: Path, most_bytes: int) -> None:
    """Refuse files that would be waited for without end, or take more memory than the served model's could.

    Raises ModelDirectoryError, UnreadableError, OSError and ValueError.
    """
    if not path.parts or not path.is_dir():
        raise ModelDirectoryError(f"{brief(str(path), quote=False)} is not a directory; {_ADVICE}")
    total = 0
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_FILES:
                raise ModelDirectoryError(f"{path} has more than {MAX_FILES} files; {_ADVICE}")
            if not entry.name.endswith((".json", ".safetensors")):
                continue
            if not entry.is_file():
                raise ModelDirectoryError(f"{entry.path} is no regular file; {_ADVICE}")
            total += entry.stat().st_size if entry.name.endswith(".safetensors") else 0
    if total > most_bytes:
        raise ModelDirectoryError(f"{path} has {total} bytes of weights, and the served model {most_bytes} at most")
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json", dict, advice=_ADVICE)
    if (path / INDEX_FILE).exists():
        index = read_json(path / INDEX_FILE, {"weight_map": {str: str}}, advice=_ADVICE)
        for name in sorted(set(index["weight_map"].values())):
            # A part elsewhere would not have been looked at.
            if Path(name).name != name or not (path / name).is_file():
                raise ModelDirectoryError(f"{path / INDEX_FILE} names {brief(name)}, which is no file of {path}")


def _check_same_architecture(path: str, config: PretrainedConfig) -> None:
    served = config.to_dict()
    given = read_json(Path(path) / "config.json", dict, advice=_ADVICE)
    # transformers computes with the numbers that it reads: a billion layers become a list of as many names.
    _check_numbers(path, given, served, config.attribute_map)
    try:
        other = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
    # Each class of configurations fails in its own way on values of other types.
    except Exception as error:
        raise ModelDirectoryError(f"cannot read {path}/config.json: {message_in_one_line(error)}") from error
    for name in sorted((served.keys() | other.keys()) - _IGNORED_SETTINGS):
        if served.get(name) != other.get(name):
            raise _other_architecture(path, name, other.get(name), served.get(name))


def _check_numbers(path: str, given: Mapping[str, Any], served: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse settings whose numbers differ from the served model's, or are out of all proportion."""
    for key, value in given.items():
        if key in _IGNORED_SETTINGS:
            continue
        known = served.get(names.get(key, key))
        if isinstance(value, dict):
            _check_numbers(path, value, known if isinstance(known, dict) else {}, {})
        elif isinstance(value, int) and (
            (isinstance(known, int) and value != known) or abs(value) >= MAX_CONFIG_INTEGER
        ):
            raise _other_architecture(path, key, value, known)


def _other_architecture(path: str, name: str, given: Any, served: Any) -> ModelDirectoryError:
    return ModelDirectoryError(
        f"{path} is a model of another architecture: its config has {brief(name, quote=False)}={brief(given)}, the "
        f"served one {brief(served)}"
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory; raises ModelDirectoryError."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # transformers raises as many kinds of errors here as for a model.
    except Exception as error:
        raise ModelDirectoryError(
            f"cannot load a tokenizer from {path}: {type(error).__name__}: {message_in_one_line(error)}"
        ) from error
