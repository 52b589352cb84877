"""Between Hugging Face directories and sharded Megatron-Core models: mbridge, with what it gets wrong put right.

mbridge 0.15.1 names layer norms for Transformer Engine's fused layers alone, shares one weight mapping between all models of a class,
and treats every RoPE scaling as linear. :func:`make_bridge` returns the architecture's own mbridge class with these three corrected.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core.bridge import _MODEL_REGISTRY, Bridge
from safetensors.torch import save_file
from transformers import PretrainedConfig

from dasd_megatron.models.hf_config import rotary_arguments

# Rows of embedding and head are padded to a multiple of this on every tensor-parallel rank, for the alignment of the GEMMs.
VOCAB_ALIGNMENT = 64
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class _Corrections:
    """Mixed in before an mbridge class; set up by :func:`make_bridge`."""

    def use_local_layer_norm_names(self) -> None:
        """Map the separate norms of Megatron's local layers; the fused names stay in place for Transformer Engine's."""
        layer = "model.layers.{layer_number}."
        self._MLP_MAPPING = {**self._MLP_MAPPING, "pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"]}
        self._OTHER_MAPPING = {**self._OTHER_MAPPING, "input_layernorm.weight": [layer + "input_layernorm.weight"]}

    def _adjust_mapping_for_shared_weights(self) -> None:
        tied = self.hf_config.tie_word_embeddings
        self._DIRECT_MAPPING = {
            **self._DIRECT_MAPPING,
            "output_layer.weight": "model.embed_tokens.weight" if tied else "lm_head.weight",
        }

    def _get_gptmodel_args(self) -> dict[str, Any]:
        return dict(
            vocab_size=self.hf_config.vocab_size,
            max_sequence_length=self.hf_config.max_position_embeddings,
            position_embedding_type="rope",
            **rotary_arguments(self.hf_config),
        )


def make_bridge(hf_config: PretrainedConfig, *, dtype: torch.dtype, transformer_engine: bool, **transformer_config: Any) -> Bridge:
    """The bridge for ``hf_config`` on the parallel state initialised in this process.

    ``transformer_config`` overrides fields of the TransformerConfig that mbridge derives from the Hugging Face config.
    """
    base = _MODEL_REGISTRY[hf_config.model_type]
    bridge = type(base.__name__, (_Corrections, base), {})(hf_config, dtype=dtype)
    if not transformer_engine:
        bridge.use_local_layer_norm_names()
    bridge.set_extra_args(**transformer_config)
    alignment = VOCAB_ALIGNMENT * bridge.mpu.tp_size
    bridge.make_vocab_size_divisible_by = alignment
    bridge.vocab_size = hf_config.vocab_size
    bridge.padded_vocab_size = math.ceil(hf_config.vocab_size / alignment) * alignment
    return bridge


@torch.no_grad()
def gather_hf_tensors(bridge: Bridge, chunks: list[torch.nn.Module], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The sharded model's weights by their Hugging Face names, whole, on the host of global rank 0; an empty dict on other ranks.

    Collective over all ranks, one tensor at a time: an all-gather over tensor-parallel ranks and a broadcast over pipeline ranks.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in bridge.export_weights(chunks):
        # A tied head comes by again from the last pipeline stage.
        if dist.get_rank() == 0 and name not in tensors:
            # The copy keeps the next gather, or the optimizer, from writing into what is being saved.
            tensors[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return tensors


def write_hf_directory(tensors: dict[str, torch.Tensor], path: Path, *, template_dir: Path, dtype: torch.dtype) -> None:
    """Write ``tensors`` as a Hugging Face directory at ``path``, which appears whole or not at all and replaces one that is there.

    config.json, tokenizer, chat template and generation config are carried over from ``template_dir``. OSError or SafetensorError when
    the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    hf_config = json.loads((template_dir / "config.json").read_text())
    hf_config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    for name in _COPIED_FILES:
        if (template_dir / name).is_file():
            shutil.copyfile(template_dir / name, partial / name)
    for written in [*partial.iterdir(), partial]:
        descriptor = os.open(written, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
