"""GGUF files as Hugging Face directories, through the reader that transformers has."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dasd_megatron.errors import ConfigError, first_line
from dasd_megatron.files import replace_directory
from dasd_megatron.models.hf_weights import dtype_name


def gguf_to_hf(file: Path, output: Path, *, dtype: torch.dtype | None = None) -> int:
    """Dequantise a GGUF file and write model, tokenizer with chat template, and generation config to ``output``, all of
    it or nothing.

    ``dtype``: of the weights written; None: float32. Returns the number of parameters.

    Raises:
        ConfigError: the file cannot be read, or the ``gguf`` package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the gguf package: pip install 'dasd-megatron[gguf]'")
    from gguf import GGUFReader

    if not file.is_file():
        raise ConfigError(f"--gguf {file}: no such file")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype or torch.float32,
            local_files_only=True,
            trust_remote_code=False,  # transformers would ask whether to run what lies beside the file
        )
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    # transformers and gguf raise many classes for a file that is none, or holds an architecture they do not know.
    except Exception as error:
        raise ConfigError(f"{file} cannot be read as a language model in GGUF ({first_line(error)})") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(
                f"{file}: tensor {name} has values that are not finite in {dtype_name(model.dtype)}; "
                "choose another --dtype"
            )
    if tokenizer.chat_template is None:
        raise ConfigError(f"{file} has no chat template; give a chat model")
    for name in ("bos", "eos", "pad", "unk"):
        # The ids come from the file, because the tokenizer's reader guesses other ids.
        tokenizer.init_kwargs.pop(f"{name}_token_id", None)
        token_id = getattr(model.config, f"{name}_token_id", None)
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    # These settings are the file's. By default transformers would put a first token in front of every text and remove
    # the space before a question mark.
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    tokenizer.add_bos_token = bool(field.contents()) if field is not None else False
    tokenizer.clean_up_tokenization_spaces = False
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace_directory(partial, output)
    return sum(parameter.numel() for parameter in model.parameters())
