"""Between Hugging Face directories and sharded Megatron-Core models: mbridge, with what it gets wrong put right.

mbridge 0.15.1 names layer norms for Transformer Engine's fused layers alone, shares one weight mapping between all
models of a class, and treats every RoPE scaling as linear. :func:`make_bridge` returns the architecture's own mbridge
class with these three corrected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from transformers import PretrainedConfig

from dasd_megatron.models.families import FAMILIES
from dasd_megatron.models.hf_config import expected_tensors, padded_vocab_size, rotary_arguments
from dasd_megatron.models.hf_weights import HfDirectoryWriter, HfWeights, WeightsError, cast
from dasd_megatron.models.mbridge_families import Bridge, bridge_class
from dasd_megatron.models.weight_export import ExportBucket, ExportEntry, plan_buckets, split_bucket
from dasd_megatron.models.weight_formats import PLAIN, HfTensor, WeightFormat

EXPORT_BUCKET_BYTES = 32 * 2**20
"""Bytes of tensors that are gathered at once where nobody asks for another size."""


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
                    tensors = tuple(
                        HfTensor(hf_name, parameter.dtype, self.hf_shapes[hf_name])
                        for hf_name in self._weight_name_mapping_mcore_to_hf(names[name])
                    )
                    mine.append(ExportEntry(*place, tuple(parameter.shape), parameter.dtype, dim, tensors))
            stages: list[list[ExportEntry]] = [[] for _ in range(self.mpu.pp_size)]
            dist.all_gather_object(stages, mine, group=self.mpu.pp_group)
            self._plan = [entry for stage in stages for entry in stage]
        return self._plan

    @property
    def export_stage(self) -> int | None:
        """The pipeline stage whose weights this rank gathers, as its source: that is the first tensor-parallel rank of
        the stage, in the first data-parallel replica, since the others have the same weights. None on other ranks; 0
        on global rank 0."""
        return self.mpu.pp_rank if self._exports() and self.mpu.tp_rank == 0 else None

    def _exports(self) -> bool:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    @torch.no_grad()
    def export_weights(
        self, chunks: list[torch.nn.Module], only: Collection[str] | None = None, form: WeightFormat = PLAIN
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield Hugging Face's names and tensors, in the form ``form``, on global rank 0, and nothing on other ranks;
        with ``only`` those made of these parameters of the plan.

        To be iterated on every rank. Collectives: those of :meth:`collect_bucket` for every bucket of
        ``EXPORT_BUCKET_BYTES``. The tensors are views of the bucket, whose memory nothing else uses.
        """
        rank0 = self.export_stage == 0
        for bucket in plan_buckets(self.export_plan(chunks), EXPORT_BUCKET_BYTES, only, form):
            flat = torch.empty(bucket.size, dtype=torch.uint8, device=_device(chunks)) if rank0 else None
            self.collect_bucket(chunks, bucket, flat, to_stage=0)
            if flat is not None:
                yield from _named_views(bucket, flat)

    @torch.no_grad()
    def collect_bucket(
        self, chunks: list[torch.nn.Module], bucket: ExportBucket, flat: torch.Tensor | None, *, to_stage: int
    ) -> None:
        """Bring a bucket to the source rank of the pipeline stage ``to_stage``.

        Every rank may call it; those that have no part in it return at once. Collectives: one gather over the
        tensor-parallel ranks of the bucket's stage, of the shards of all its parameters, and one message between two
        pipeline stages where ``to_stage`` is another one.

        flat: [bucket.size] uint8 on the rank that gets it, elsewhere None. None there too lets the bucket go by.
        """
        if not self._exports():
            return
        source, moves = self.export_stage == bucket.stage, bucket.stage != to_stage
        receives = moves and self.export_stage == to_stage
        if flat is None and (receives or (moves and source)):
            flat = torch.empty(bucket.size, dtype=torch.uint8, device=_device(chunks))
        if self.mpu.pp_rank == bucket.stage:
            parameters = [dict(unwrap_model(chunk).named_parameters()) for chunk in chunks]
            shards = [parameters[entry.chunk][entry.local_name] for entry in bucket.entries]
            parts = self._gather_shards(bucket.entries, shards)
            if flat is not None:
                self._fill_bucket(bucket, flat, shards, parts)
        pipeline = self.mpu.pp_group
        if flat is not None and receives:
            dist.recv(flat, dist.get_global_rank(pipeline, bucket.stage), group=pipeline)
        elif flat is not None and moves:
            dist.send(flat, dist.get_global_rank(pipeline, to_stage), group=pipeline)

    def _gather_shards(
        self, entries: Sequence[ExportEntry], shards: Sequence[torch.Tensor]
    ) -> dict[str, list[torch.Tensor]]:
        """Return all tensor-parallel ranks' shards of the parameters that they share, by name, on the first of them;
        elsewhere nothing. One gather, where there are several ranks."""
        shared = [
            (entry, shard) for entry, shard in zip(entries, shards, strict=True) if entry.partition_dim is not None
        ]
        if self.mpu.tp_size == 1 or not shared:
            return {}
        # Wide elements first, so that each shard begins at a multiple of its element's size.
        shared.sort(key=lambda pair: -pair[0].dtype.itemsize)
        packed = torch.cat([shard.detach().contiguous().view(torch.uint8).flatten() for _, shard in shared])
        first = self.mpu.tp_rank == 0
        # The other ranks have no use for the whole bucket.
        gathered = [torch.empty_like(packed) for _ in range(self.mpu.tp_size)] if first else None
        dist.gather(packed, gathered, dist.get_global_rank(self.mpu.tp_group, 0), group=self.mpu.tp_group)
        dtypes, shapes = [entry.dtype for entry, _ in shared], [entry.shape for entry, _ in shared]
        by_rank = [split_bucket(flat, dtypes, shapes) for flat in gathered or []]
        return {entry.name: [parts[index] for parts in by_rank] for index, (entry, _) in enumerate(shared) if first}

    def _fill_bucket(
        self,
        bucket: ExportBucket,
        flat: torch.Tensor,
        shards: Sequence[torch.Tensor],
        parts: dict[str, list[torch.Tensor]],
    ) -> None:
        """Write the Hugging Face tensors of a bucket into ``flat``."""
        places = dict(_named_views(bucket, flat))
        for entry, shard in zip(bucket.entries, shards, strict=True):
            whole = shard.detach()
            if entry.name in parts:
                whole = self._weight_merge_across_tp(entry.name, parts[entry.name], shard)
            for hf_name, tensor in zip(*self._weight_to_hf_format(entry.name, whole), strict=True):
                for name, formed in bucket.form.convert(hf_name, tensor):
                    places[name].copy_(formed)

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


def _device(chunks: list[torch.nn.Module]) -> torch.device:
    return next(chunks[0].parameters()).device


def _named_views(bucket: ExportBucket, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of a bucket with their names, views into ``flat``."""
    tensors = bucket.tensors
    views = split_bucket(flat, [tensor.dtype for tensor in tensors], [tensor.shape for tensor in tensors])
    return zip([tensor.name for tensor in tensors], views, strict=True)


@torch.no_grad()
def export_hf(
    bridge: Bridge,
    chunks: list[torch.nn.Module],
    path: Path,
    *,
    template_dir: Path,
    dtype: torch.dtype,
    manifest: bool,
    form: WeightFormat = PLAIN,
) -> Callable[[], None]:
    """Write the sharded model's weights as a Hugging Face directory at ``path``, tensor by tensor, by global rank 0.

    Collective over all ranks, as ``bridge.export_weights``: the weights come bucket by bucket, of which rank 0 holds
    one. If its disk fails, it goes on until every bucket has come, so that no other rank waits for it.

    Args:
        template_dir: Hugging Face directory to take config, tokenizer, chat template and generation config from.
        manifest: note the SHA-256 of each tensor; costs a pass over the bytes.
        form: what the tensors are turned into; config.json says so.

    Returns:
        What is left to do for rank 0 alone: raise the disk's error (OSError or WeightsError), or let the directory
        appear.
    """
    failure: Exception | None = None
    writer = None
    if dist.get_rank() == 0:
        try:
            formed = [
                tensor
                for name, shape in bridge.hf_shapes.items()
                for tensor in form.tensors(HfTensor(name, dtype, shape))
            ]
            writer = HfDirectoryWriter(
                path,
                {tensor.name: tensor.shape for tensor in formed},
                dtype,
                template_dir=template_dir,
                hashes=manifest,
                other_dtypes={tensor.name: tensor.dtype for tensor in formed if tensor.dtype != dtype},
                config_fields=form.config,
            )
        except (OSError, WeightsError) as error:
            failure = error
    for name, tensor in bridge.export_weights(chunks, form=form):
        if writer is not None and failure is None:
            try:
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
