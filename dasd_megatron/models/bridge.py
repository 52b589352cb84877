"""Between Hugging Face directories and sharded Megatron-Core models: mbridge, with what it gets wrong put right.

mbridge 0.15.1 names layer norms for Transformer Engine's fused layers alone, shares one weight mapping between all
models of a class, and treats every RoPE scaling as linear. :func:`make_bridge` returns the architecture's own mbridge
class with these three corrected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from transformers import PretrainedConfig

from dasd_megatron.models.families import FAMILIES
from dasd_megatron.models.hf_config import expected_tensors, padded_vocab_size, rotary_arguments
from dasd_megatron.models.hf_weights import HfDirectoryWriter, HfWeights, WeightsError, cast
from dasd_megatron.models.mbridge_families import Bridge, bridge_class


@dataclass(frozen=True)
class ExportEntry:
    """One Megatron parameter: where it is, and the shape of its shard."""

    stage: int
    """Pipeline stage."""
    chunk: int
    """Model chunk on that stage."""
    local_name: str
    """Name in the chunk."""
    name: str
    """Name in the whole model."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    partition_dim: int | None
    """Dimension that tensor-parallel ranks share; None where each has all of it."""


class _CheckedReader:
    """The part of mbridge's reader that loading needs. Its own reads every safetensors file in a directory without an
    index, and lets values become infinite."""

    def __init__(self, weights: HfWeights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def load_one_hf_weight(self, name: str) -> torch.Tensor:
        return cast(name, self._weights.tensor(name), self._dtype)


class _Corrections(Bridge):
    """Methods that :func:`make_bridge` puts before those of an mbridge class."""

    _plan: list[ExportEntry] | None = None
    _DIRECT_MAPPING: dict[str, str]
    _MLP_MAPPING: dict[str, list[str]]
    _OTHER_MAPPING: dict[str, list[str]]

    def load_weights(self, models: list[torch.nn.Module], weights_path: str) -> None:
        """Fill this rank's part of the model from a Hugging Face directory, one tensor at a time; raises WeightsError
        where a value does not fit into the model's dtype."""
        with HfWeights(weights_path, compare_hashes=False) as weights:
            self._reader = _CheckedReader(weights, self.dtype)
            super().load_weights(models, weights_path, memory_efficient=True)

    def _get_safetensor_io(self, _: str) -> _CheckedReader:
        return self._reader

    def export_plan(self, chunks: list[torch.nn.Module]) -> list[ExportEntry]:
        """Return every parameter of the model, in the order of :meth:`export_weights`, the same on all ranks.

        The plan is made once, because mbridge asks other ranks about each tensor anew, which takes longer than the
        tensors themselves. The first call gathers objects over the pipeline ranks.
        """
        if self._plan is None:
            mine = []
            for index, model in enumerate(unwrap_model(chunk) for chunk in chunks):
                names = self._weight_name_mapping_mcore_local_to_global(model, consider_ep=False)
                for name, parameter in model.named_parameters():
                    dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
                    place = (self.mpu.pp_rank, index, name, names[name])
                    mine.append(ExportEntry(*place, tuple(parameter.shape), parameter.dtype, dim))
            stages: list[list[ExportEntry]] = [[] for _ in range(self.mpu.pp_size)]
            dist.all_gather_object(stages, mine, group=self.mpu.pp_group)
            self._plan = [entry for stage in stages for entry in stage]
        return self._plan

    @torch.no_grad()
    def export_weights(
        self, chunks: list[torch.nn.Module], only: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield Hugging Face's names and tensors, on every rank; with ``only`` those made of these parameters of the
        plan.

        Collectives: per parameter a broadcast over the pipeline ranks and an all-gather over the tensor-parallel ranks,
        where there are several. Tensors may be views of the parameters.
        """
        parameters = [dict(unwrap_model(chunk).named_parameters()) for chunk in chunks]
        device = next(parameter.device for chunk in parameters for parameter in chunk.values())
        for entry in self.export_plan(chunks):
            if only is not None and entry.name not in only:
                continue
            if entry.stage == self.mpu.pp_rank:
                shard: Any = parameters[entry.chunk][entry.local_name]
            else:
                shard = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                if entry.partition_dim is not None:
                    shard.tensor_model_parallel, shard.partition_dim = True, entry.partition_dim
            if self.mpu.pp_size > 1:
                dist.broadcast(
                    shard.detach(), dist.get_global_rank(self.mpu.pp_group, entry.stage), group=self.mpu.pp_group
                )
            whole = shard.detach()
            if entry.partition_dim is not None and self.mpu.tp_size > 1:
                shards = [torch.empty_like(whole) for _ in range(self.mpu.tp_size)]
                dist.all_gather(shards, whole, group=self.mpu.tp_group)
                whole = self._weight_merge_across_tp(entry.name, shards, shard)
            yield from zip(*self._weight_to_hf_format(entry.name, whole), strict=True)

    @functools.cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor. Every weight sync asks for them, so they are computed once."""
        return expected_tensors(self.hf_config)

    def use_local_layer_norm_names(self) -> None:
        """Map the separate norms of Megatron's local layers; the fused names stay in place for Transformer Engine's."""
        layer = "model.layers.{layer_number}."
        self._MLP_MAPPING = {
            **self._MLP_MAPPING,
            "pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"],
        }
        self._OTHER_MAPPING = {**self._OTHER_MAPPING, "input_layernorm.weight": [layer + "input_layernorm.weight"]}

    def _build_config(self) -> TransformerConfig:
        family = FAMILIES[self.hf_config.model_type]
        return self._build_base_config(add_qkv_bias=family.qkv_bias, qk_layernorm=family.qk_layernorm)

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


def make_bridge(
    hf_config: PretrainedConfig, *, dtype: torch.dtype, transformer_engine: bool, **transformer_config: Any
) -> Bridge:
    """Return the bridge for ``hf_config`` on the parallel state initialised in this process.

    ``transformer_config`` overrides fields of the TransformerConfig that mbridge derives from the Hugging Face config.
    """
    base = bridge_class(FAMILIES[hf_config.model_type])
    bridge = type(base.__name__, (_Corrections, base), {})(hf_config, dtype=dtype)
    if not transformer_engine:
        bridge.use_local_layer_norm_names()
    bridge.set_extra_args(**transformer_config)
    bridge.vocab_size = hf_config.vocab_size
    # mbridge cuts the padding off only where make_vocab_size_divisible_by is set.
    bridge.padded_vocab_size = bridge.make_vocab_size_divisible_by = padded_vocab_size(
        hf_config.vocab_size, bridge.mpu.tp_size
    )
    return bridge


@torch.no_grad()
def export_hf(
    bridge: Bridge, chunks: list[torch.nn.Module], path: Path, *, template_dir: Path, dtype: torch.dtype, manifest: bool
) -> Callable[[], None]:
    """Write the sharded model's weights as a Hugging Face directory at ``path``, tensor by tensor, by global rank 0.

    Collective over all ranks: per tensor an all-gather over tensor-parallel ranks and a broadcast over pipeline ranks.
    Rank 0 holds one whole tensor at a time. If its disk fails, it goes on until every tensor has come, so that no other
    rank waits for it.

    Args:
        template_dir: Hugging Face directory to take config, tokenizer, chat template and generation config from.
        manifest: note the SHA-256 of each tensor; costs a pass over the bytes.

    Returns:
        What is left to do for rank 0 alone: raise the disk's error (OSError or WeightsError), or let the directory
        appear.
    """
    failure: Exception | None = None
    writer = None
    if dist.get_rank() == 0:
        try:
            writer = HfDirectoryWriter(path, bridge.hf_shapes, dtype, template_dir=template_dir, hashes=manifest)
        except (OSError, WeightsError) as error:
            failure = error
    for name, tensor in bridge.export_weights(chunks):
        if writer is not None and failure is None:
            try:
                # A tied head comes by again from the last pipeline stage, and is written already.
                writer.write(name, tensor)
            except (OSError, WeightsError) as error:
                failure = error

    def finish() -> None:
        if writer is not None:
            writer.close()
        if failure is not None:
            raise failure
        if writer is not None:
            writer.finish({"kind": "hf"})

    return finish
