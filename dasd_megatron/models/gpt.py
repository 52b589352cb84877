"""Megatron-Core GPT models, for every combination of TP, SP, PP, VPP and DP, from a Hugging Face config."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from dasd_megatron import backend
from dasd_megatron.config import Config, PrecisionConfig
from dasd_megatron.errors import first_line
from dasd_megatron.losses import GradientSum
from dasd_megatron.models.bridge import make_bridge
from dasd_megatron.models.extra_state import load_state, without_extra_states
from dasd_megatron.models.hf_config import hf_folder, is_megatron_checkpoint, read_hf_config
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.models.mbridge_families import Bridge
from dasd_megatron.models.megatron_checkpoint import CheckpointFiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm for local layers. Megatron's own wrapper refuses sequence parallelism; this one tags its
    weight for the gradient all-reduce over tensor-parallel ranks that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class CausalAttention(DotProductAttention):
    """Attention of local layers in one fused call. Megatron's own holds scores, mask and probabilities ``[B, n, S,
    S]``, and takes several times as long on CPU at a thousand tokens."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Attend: ``[S, B, n, d]`` queries and ``[S, B, n_kv, d]`` keys and values to ``[S, B, n * d]``; causal,
        without dropout.

        Packed sequences come without B, and each attends to itself alone: the blocks of a block-diagonal mask, without
        the rest of it.
        """
        assert attention_mask is None
        if packed_seq_params is None:
            return self._attend(query, key, value)
        bounds = itertools.pairwise(packed_seq_params.cu_seqlens_q.tolist())
        return torch.cat(
            [self._attend(*(part[begin:end, None] for part in (query, key, value)))[:, 0] for begin, end in bounds]
        )

    def _attend(self, *parts: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.permute(1, 2, 0, 3) for part in parts)
        grouped = query.shape[1] != key.shape[1]
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def fp8_arguments(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the fields of the TransformerConfig for FP8 products in the layers; none without FP8."""
    if precision.fp8 == "none":
        return {}
    return dict(
        fp8=precision.fp8_format,
        fp8_recipe=precision.fp8,
        # Only delayed scaling reads this. It takes the largest value of the last thousand passes, where Megatron's
        # default takes that of the last pass alone.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=bool(precision.bf16_first_layers or precision.bf16_last_layers),
        num_layers_at_start_in_bf16=precision.bf16_first_layers,
        num_layers_at_end_in_bf16=precision.bf16_last_layers,
    )


class HiddenStatesHead(ColumnParallelLinear):
    """An LM head that hands on what it would multiply its weight with: the product is left to ``linear_token_stats``.

    It returns ``[S, B, h]`` of the whole sequence. Under sequence parallelism it gathers that from the tensor-parallel
    ranks, and the backward pass reduce-scatters its gradient, so that nobody else may reduce it; without, the caller
    has to.
    """

    def forward(self, input_: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return the hidden states of the whole sequence, and no bias."""
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        return input_, None


@dataclass
class ShardedModel:
    """This rank's part of the policy: one DDP-wrapped chunk per virtual pipeline stage, and how it maps to Hugging Face
    names.

    With ``fused_linear`` the last pipeline stage's output is ``[B, S, h]``, what the LM head is applied to, and else
    the logits ``[B, S, V_local]``.
    """

    chunks: list[DistributedDataParallel]
    bridge: Bridge
    config: TransformerConfig
    vocab_size: int
    fused_linear: bool

    def head_weight(self) -> torch.nn.Parameter:
        """Return this rank's shard of the LM head, ``[V_local, h]``; on the last pipeline stage only."""
        last = unwrap_model(self.chunks[-1])
        return (
            last.shared_embedding_or_output_weight()
            if last.share_embeddings_and_output_weights
            else last.output_layer.weight
        )

    def head_gradient(self) -> GradientSum | None:
        """Return DDP's float32 sum of the LM head's gradients, for the loss to add to; None where there is none. On the
        last pipeline stage only.

        This is what Megatron's own layers do under ``gradient_accumulation_fusion``: the gradient goes into
        ``main_grad``, the parameter says so by ``grad_added_to_main_grad``, and DDP's hook does not add it again.
        """
        weight: Any = self.head_weight()
        total = getattr(weight, "main_grad", None)
        if total is None or total.dtype != torch.float32:
            return None
        # Where the embedding is the same parameter, autograd has that gradient for the hook, which adds it.
        is_also_embedding = getattr(weight, "zero_out_wgrad", False)
        needs_any = self.chunks[-1].ddp_config.overlap_grad_reduce and not is_also_embedding

        def finish() -> torch.Tensor | None:
            weight.grad_added_to_main_grad = True
            # A hook that reduces wants to see some gradient, and does not read it.
            return torch.empty_like(weight) if needs_any else None

        return GradientSum(total, finish)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Return the parameters with Megatron's names, chunk by chunk."""
        return (pair for chunk in self.chunks for pair in unwrap_model(chunk).named_parameters())

    @contextlib.contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Let the layers compute in the parameters' own dtype inside the block. For passes without gradient."""
        fp8, self.config.fp8 = self.config.fp8, None
        try:
            yield
        finally:
            self.config.fp8 = fp8

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters, chunk by chunk."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def gather_parameters(self) -> None:
        """Bring in the weights that other replicas have updated, where ``overlap_param_gather`` would leave that to the
        next forward pass. To be called after updates and before anything reads the weights otherwise. Collective over
        data-parallel ranks."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def layer_spec(
    config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of this rank's pipeline stage: Transformer Engine's, or Megatron's local ones with
    :class:`RMSNorm`."""
    if transformer_engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    if config.qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def build_chunks(bridge: Bridge, *, transformer_engine: bool) -> list[GPTModel]:
    """Build this rank's part of the model, one chunk per virtual pipeline stage, with the weights that Megatron
    initialises, or on the meta device where that is torch's default."""
    config = bridge.config
    vpp = config.virtual_pipeline_model_parallel_size
    return [
        GPTModel(
            config,
            layer_spec(config, transformer_engine=transformer_engine, vp_stage=vp_stage),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=bridge.hf_config.tie_word_embeddings,
            vp_stage=vp_stage,
            **{**bridge._get_gptmodel_args(), "vocab_size": bridge.padded_vocab_size},
        )
        for vp_stage in (range(vpp) if vpp else [None])
    ]


def load_megatron_weights(chunks: list[GPTModel], path: str | Path) -> None:
    """Fill the chunks from a distributed checkpoint that was saved in any layout. Collective over all ranks.

    Raises:
        WeightsError: it is not a checkpoint of this model, or cannot be read.
    """
    # Files that are missing or too short are named here, where the loader would speak of shards.
    CheckpointFiles(Path(path))
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    # Extra states hold FP8 scaling, and weights that come from elsewhere have none.
    state = {name: without_extra_states(chunk) for name, chunk in state.items()}
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be loaded into this model ({first_line(error)})") from error
    for index, chunk in enumerate(chunks):
        try:
            load_state(chunk, loaded[f"model{index}"])
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error


def build_model(config: Config, path: str | Path, *, hidden_dropout: float = 0.0) -> ShardedModel:
    """Build this rank's shard, load its weights and wrap it for data parallelism.

    Needs the backend selected and Megatron's parallel state initialised. Collectives: while loading a Hugging Face
    directory, one scatter over tensor-parallel ranks per tensor, of which their first rank holds one at a time; while
    loading a checkpoint, Megatron's.

    Args:
        path: Hugging Face directory, or distributed checkpoint that ``dasd convert`` has written.
        hidden_dropout: share of the hidden states that every pass drops.

    Raises:
        ConfigError: the architecture cannot be represented, or does not divide by the parallel layout.
        WeightsError: the checkpoint cannot be loaded into it.
    """
    target = backend.current()
    dtype = DTYPES[config.precision.params_dtype]
    transformer_engine = target.uses_transformer_engine(config.backend.transformer_impl)
    hf_config = read_hf_config(hf_folder(path))
    parallel, recompute = config.parallel, config.precision.recompute
    vpp = parallel.virtual_pipeline_model_parallel_size
    bridge = make_bridge(
        hf_config,
        dtype=dtype,
        transformer_engine=transformer_engine,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.last_pipeline_num_layers,
        # Each micro-batch is padded to its own longest sequence, so pipeline stages tell each other the shape.
        variable_seq_lengths=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        # With interleaving, batched point-to-point calls pair up wrongly between two stages and the loss is silently
        # wrong.
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
        calculate_per_token_loss=True,
        attention_dropout=0.0,
        hidden_dropout=hidden_dropout,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=list(config.precision.recompute_modules) if recompute == "selective" else None,
        **fp8_arguments(config.precision),
        **target.transformer_config_overrides(config.backend.transformer_impl),
    )
    transformer_config = bridge.config
    chunks: list[torch.nn.Module] = [
        model.to(target.device()) for model in build_chunks(bridge, transformer_engine=transformer_engine)
    ]
    if config.loss.fused_linear and chunks[-1].post_process:
        # The layer keeps its weight, name and place in checkpoints.
        chunks[-1].output_layer.__class__ = HiddenStatesHead
    if is_megatron_checkpoint(path):
        load_megatron_weights(chunks, path)
    else:
        with torch.no_grad():
            bridge.load_weights(chunks, str(path))
    if dtype is torch.bfloat16:
        chunks = [Float16Module(transformer_config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )
    wrapped = [
        DistributedDataParallel(transformer_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        # The schedules reduce after the last micro-batch only if they are told how to keep still before it.
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    transformer_config.finalize_model_grads_func = finalize_model_grads
    return ShardedModel(wrapped, bridge, transformer_config, hf_config.vocab_size, config.loss.fused_linear)
