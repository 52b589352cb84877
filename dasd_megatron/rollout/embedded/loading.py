"""Models and tokenizers of the embedded server, from Hugging Face directories on this machine."""

from __future__ import annotations

import copy
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


class ModelDirectoryError(RuntimeError):
    """A directory that is not a complete Hugging Face causal LM, or not of the served architecture."""


def message_in_one_line(error: BaseException) -> str:
    """Return what an error says without line breaks, at most 500 characters."""
    return " ".join(str(error).split())[:500]


def load_model(path: str, dtype: torch.dtype, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """Load a causal LM onto the CPU from a local directory; nothing is fetched.

    With ``config``, that of the served model, the directory's weights must fit it exactly. Raises ModelDirectoryError
    when the directory is missing, incomplete, unreadable or of another shape.
    """
    if not Path(path).is_dir():
        raise ModelDirectoryError(f"{path} is not a directory; give a Hugging Face model directory")
    if config is not None and (Path(path) / "config.json").is_file():
        _check_same_architecture(path, config)
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
        parameter.data = parameter.data.clone()
    return model


def _check_same_architecture(path: str, config: PretrainedConfig) -> None:
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
    try:
        other = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ModelDirectoryError(f"cannot read {path}/config.json: {message_in_one_line(error)}") from error
    served = config.to_dict()
    for name in sorted((served.keys() | other.keys()) - ignored):
        if served.get(name) != other.get(name):
            raise ModelDirectoryError(
                f"{path} is a model of another architecture: its config has {name}={other.get(name)!r}, the served "
                f"one {served.get(name)!r}"
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
