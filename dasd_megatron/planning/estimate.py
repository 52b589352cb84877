"""Memory and traffic of one rank of a training run, by arithmetic alone: no GPU, no Megatron, no weights.

Parameters, gradients and optimizer state follow Megatron-Core's buffers to the byte, padding included; the tests
compare them with the real ones. Activations are the tensors that autograd keeps in local layers, measured on CPU; for
Transformer Engine's fused layers they are what those keep by their construction, which has not been measured.
Communication counts bytes that one rank sends, by ring algorithms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.config import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    PrecisionConfig,
    stage_layers,
    why_scored_first,
)
from dasd_megatron.models.families import FAMILIES
from dasd_megatron.models.hf_config import padded_vocab_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dasd_megatron.models.sizes import ModelSizes

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
_FP32 = 4
# The fused loss works in so many buffers of one block's logits: the logits of student and teacher, and the gradient.
_LOSS_BUFFERS = 3


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that memory depends on."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def of(cls, hf_config: ModelSizes | PretrainedConfig) -> Architecture:
        """Return the sizes of a Hugging Face config."""
        family = FAMILIES.get(hf_config.model_type)
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        return cls(
            hf_config.hidden_size,
            hf_config.intermediate_size,
            hf_config.num_hidden_layers,
            hf_config.num_attention_heads,
            hf_config.num_key_value_heads,
            head_dim,
            hf_config.vocab_size,
            hf_config.tie_word_embeddings,
            qkv_bias=family is not None and family.qkv_bias,
            qk_norm=family is not None and family.qk_layernorm,
        )

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Return the rows of embedding and head, padding included, that ``tensor_parallel`` ranks share."""
        return padded_vocab_size(self.vocab, tensor_parallel)


def layer_parameters(arch: Architecture, tensor_parallel: int) -> list[int]:
    """Return the elements of each parameter of one layer on one rank, in the order in which local layers register
    them."""
    query, key, ffn = arch.query // tensor_parallel, arch.key // tensor_parallel, arch.ffn // tensor_parallel
    sizes = [arch.hidden, arch.hidden * query, arch.hidden * (query + 2 * key)]
    if arch.qkv_bias:
        sizes.append(query + 2 * key)
    if arch.qk_norm:
        sizes += [arch.head_dim, arch.head_dim]
    return [*sizes, arch.hidden, arch.hidden * 2 * ffn, arch.hidden * ffn]


def chunk_parameters(arch: Architecture, parallel: ParallelConfig, stage: int) -> list[list[tuple[int, bool]]]:
    """Return, for each model chunk of a rank on pipeline ``stage``, (elements, True for the embedding that two stages
    share) of each parameter."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    layers = stage_layers(parallel, arch.layers)[stage] // virtual
    vocabulary = arch.padded_vocab(tensor) // tensor * arch.hidden
    chunks = []
    for chunk in range(virtual):
        sizes = [(size, False) for _ in range(layers) for size in layer_parameters(arch, tensor)]
        first, last = stage == 0 and chunk == 0, stage == pipeline - 1 and chunk == virtual - 1
        if first:
            sizes.insert(0, (vocabulary, arch.tied and pipeline > 1))
        if last:
            sizes.append((arch.hidden, False))
            if not (arch.tied and first):
                sizes.append((vocabulary, arch.tied))
        chunks.append(sizes)
    return chunks


@dataclass(frozen=True)
class State:
    """Bytes that a rank keeps from step to step, and the number of its parameters."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int


def training_state(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    stage: int,
    data_rank: int = 0,
) -> State:
    """Return the weights, float32 gradients and Adam's state of one rank on pipeline ``stage``, as Megatron's DDP and
    optimizer allocate them."""
    # Ranks that share a sequence have the same weights, and count as replicas here.
    replicas = parallel.data_parallel_size * parallel.context_parallel_size
    weight_bytes = DTYPE_BYTES[precision.params_dtype]
    # Adam keeps two moments, and float32 weights where the model's have another type.
    adam_bytes = 2 * _FP32 + (_FP32 if weight_bytes != _FP32 else 0)
    parameters = weights = gradients = adam = 0
    for index, sizes in enumerate(chunk_parameters(arch, parallel, stage)):
        count = sum(size for size, _ in sizes)
        parameters += count
        if not optimizer.distributed:
            weights, gradients = weights + count * weight_bytes, gradients + count * _FP32
            # torch's Adam counts the steps of each parameter.
            adam += count * adam_bytes + len(sizes) * _FP32
            continue
        bucket_size = None
        # Megatron makes one bucket of what it reduces when nothing is left to overlap with.
        if parallel.overlap_grad_reduce and stage == 0 and index == 0:
            bucket_size = parallel.bucket_size or max(40_000_000, 1_000_000 * replicas)
        buckets, places = _place_parameters(sizes, replicas, bucket_size)
        total = buckets[-1][1]
        weights, gradients = weights + total * weight_bytes, gradients + total * _FP32
        for start, end in buckets:
            share = (end - start) // replicas
            low, high = start + data_rank * share, start + (data_rank + 1) * share
            # A parameter may lie in the shares of several ranks.
            parts = [min(high, stop) - max(low, begin) for begin, stop in places if min(high, stop) > max(low, begin)]
            adam += sum(parts) * adam_bytes + len(parts) * _FP32
    return State(parameters, weights, gradients, adam)


def _place_parameters(
    sizes: list[tuple[int, bool]], data_parallel: int, bucket_size: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the (start, end) of buckets and of parameters in the buffer of a distributed optimizer.

    Parameters lie from the last to the first, each at a multiple of 64 elements, and a shared embedding has a bucket of
    its own. A bucket is closed when it has ``bucket_size`` elements, and its end is divisible by 128 and by the number
    of replicas.
    """

    def padded(value: int, divisor: int) -> int:
        return math.ceil(value / divisor) * divisor

    buckets: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    position = bucket_start = 0

    def close(end: int) -> int:
        nonlocal bucket_start
        end = padded(end, math.lcm(data_parallel, 128))
        buckets.append((bucket_start, end))
        bucket_start = end
        return end

    for size, alone in reversed(sizes):
        position = padded(position, 64)
        if alone and position > bucket_start:
            position = close(position)
        places.append((position, position + size))
        position += size
        if alone or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if position > bucket_start:
        close(position)
    return buckets, places


def layer_activation_bytes(
    arch: Architecture, parallel: ParallelConfig, precision: PrecisionConfig, *, transformer_engine: bool
) -> float:
    """Return the bytes per token that autograd keeps of one layer on one rank, without recomputation."""
    tensor = parallel.tensor_model_parallel_size
    width = DTYPE_BYTES[precision.params_dtype]
    # Sequence parallelism shards what lies between the tensor-parallel products; else every rank has all of it.
    hidden = arch.hidden / (tensor if parallel.sequence_parallel else 1)
    query, key, ffn = arch.query / tensor, arch.key / tensor, arch.ffn / tensor
    projected, rotated, context = query + 2 * key, query + key, query
    log_sum_exp = _FP32 * arch.heads / tensor
    if transformer_engine:
        norms = rotated if arch.qk_norm else 0
        return width * (4 * hidden + projected + norms + rotated + context + 3 * ffn) + log_sum_exp
    # A norm keeps its input and its result before the weight in float32, and what goes into the product.
    norms = 2 * hidden * (2 * _FP32 + width)
    head_norms = 0.0
    if arch.qk_norm:
        head_norms = _FP32 * (2 * query + key) + (_FP32 * key if width != _FP32 else 0)
    return norms + head_norms + width * (projected + rotated + context + 5 * ffn) + log_sum_exp


def recomputed_bytes(
    arch: Architecture, parallel: ParallelConfig, precision: PrecisionConfig, *, transformer_engine: bool
) -> float:
    """Return the part of :func:`layer_activation_bytes` that is not kept but computed again in the backward pass."""
    if precision.recompute == "none":
        return 0.0
    tensor = parallel.tensor_model_parallel_size
    width = DTYPE_BYTES[precision.params_dtype]
    hidden = arch.hidden / (tensor if parallel.sequence_parallel else 1)
    if precision.recompute == "full":
        return layer_activation_bytes(arch, parallel, precision, transformer_engine=transformer_engine) - width * hidden
    saved = 0.0
    if "mlp" in precision.recompute_modules:
        saved += width * (hidden + 3 * arch.ffn / tensor if transformer_engine else 5 * arch.ffn / tensor)
    if "core_attn" in precision.recompute_modules:
        saved += _FP32 * arch.heads / tensor
    return saved


def activation_bytes(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    tokens: float,
    stage: int,
    *,
    micro_batches: int,
    transformer_engine: bool,
) -> float:
    """Return the peak bytes of activations of a rank on pipeline ``stage``, for micro-batches of ``tokens`` padded
    tokens.

    Under 1F1B a stage holds as many micro-batches at once as there are stages from it to the last; interleaving holds
    more.
    """
    tokens /= parallel.context_parallel_size
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    width = DTYPE_BYTES[precision.params_dtype]
    hidden = arch.hidden / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    layer = layer_activation_bytes(arch, parallel, precision, transformer_engine=transformer_engine)
    layers = stage_layers(parallel, arch.layers)[stage] / virtual
    # So many chunks of the model are in flight on this stage.
    if virtual == 1:
        in_flight = min(pipeline - stage, micro_batches)
    else:
        in_flight = min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, micro_batches * virtual)
    # Activations that are computed again exist once, for one layer at a time.
    again = recomputed_bytes(arch, parallel, precision, transformer_engine=transformer_engine)
    kept = in_flight * layers * (layer - again) + again
    # These are the last norm and the hidden states that the head reads.
    ends = (2 * _FP32 + width) * hidden + width * hidden if stage == pipeline - 1 else 0.0
    return tokens * (kept + ends)


def loss_bytes(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    loss: PolicyLossConfig,
    tokens: float,
    response_tokens: float,
    block_tokens: int,
    kept_bytes: float = 0.0,
) -> tuple[float, float]:
    """Return the bytes of logits and loss buffers on the last stage: (materialised, fused). The fused ones are of
    blocks of ``block_tokens``, and include the gradient of the hidden states and at most ``kept_bytes`` of logits."""
    tensor = parallel.tensor_model_parallel_size
    width = DTYPE_BYTES[precision.params_dtype]
    columns = arch.padded_vocab(tensor) // tensor
    materialised = tokens * columns * (width + _FP32) + response_tokens * columns * _FP32
    rows = min(block_tokens, response_tokens)
    block = rows * min(loss.block_columns, columns) * _FP32 * _LOSS_BUFFERS
    kept = min(kept_bytes, response_tokens * columns * width)
    return materialised, block + kept + 2 * response_tokens * arch.hidden * _FP32


def scoring_bytes(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    tokens: float,
    *,
    transformer_engine: bool,
) -> float:
    """Return the bytes of activations of a forward pass of ``tokens`` padded tokens that keeps nothing for a backward
    pass: what one layer works in, at most as much as autograd would keep of it, and the hidden states between layers.
    """
    hidden = arch.hidden / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    layer = layer_activation_bytes(arch, parallel, precision, transformer_engine=transformer_engine)
    return tokens / parallel.context_parallel_size * (layer + DTYPE_BYTES[precision.params_dtype] * hidden)


def bubble_fraction(parallel: ParallelConfig, micro_batches: int) -> float:
    """Return the share of a step's forward and backward time that a pipeline stage waits."""
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    return (pipeline - 1) / (virtual * micro_batches + pipeline - 1)


def kv_bytes_per_token(arch: Architecture, rollout_tensor_parallel: int) -> float:
    """Return the bytes of keys and values of one token on one GPU of a rollout engine in bf16."""
    return 2 * arch.layers * arch.key * 2 / min(rollout_tensor_parallel, arch.kv_heads)


def total_parameters(arch: Architecture) -> int:
    """Return the parameters of the model by itself, without padding or copies."""
    vocabulary = arch.vocab * arch.hidden
    return arch.layers * sum(layer_parameters(arch, 1)) + arch.hidden + vocabulary * (1 if arch.tied else 2)


@dataclass(frozen=True)
class Passes:
    """Passes of a step over its sequences. A backward pass comes with each forward pass of the update."""

    scoring: int
    """Forward passes over the student's sequences without a backward pass: of the policy, where the update's do not
    score them, and of the starting model."""
    teacher: int
    """Forward passes over the teacher's sequences, whose prompts may be longer."""
    update: int
    recomputed_layers: float
    """Forward passes of the layers that the backward passes repeat, as a share of their operations."""
    recomputed_sublayers: float
    """The same as a share of attentions and feed-forwards, which have equal traffic each."""


def passes_of(config: Config, arch: Architecture) -> Passes:
    """Return the passes of a step: what :mod:`dasd_megatron.training.step` does."""
    epochs, precision = config.batch.epochs, config.precision
    has_teacher = METHODS[config.algorithm.name].needs_teacher
    teacher = 2 if config.teacher.weights == "trust_region" else 1
    operations = sublayers = 0.0
    if precision.recompute == "full":
        operations = sublayers = 1.0
    elif precision.recompute == "selective" and "mlp" in precision.recompute_modules:
        feed_forward = 3 * arch.hidden * arch.ffn
        operations, sublayers = feed_forward / (feed_forward + _attention_matrices(arch)), 0.5
    scoring = (why_scored_first(config) is not None) + (config.loss.kl_coef > 0)
    return Passes(scoring, teacher * has_teacher, epochs, epochs * operations, epochs * sublayers)


def _attention_matrices(arch: Architecture) -> int:
    return arch.hidden * 2 * (arch.query + arch.key)


def layer_operations(arch: Architecture, tokens: float, squares: float) -> float:
    """Return the floating-point operations of a forward pass through one layer: two for each element of a matrix and
    token, and those of causal attention. ``squares``: the sum of the sequences' squared tokens."""
    matrices = _attention_matrices(arch) + 3 * arch.hidden * arch.ffn
    return 2 * matrices * tokens + 2 * arch.query * squares


def head_operations(arch: Architecture, tokens: float) -> float:
    """Return the floating-point operations of a forward pass through the LM head."""
    return 2.0 * arch.hidden * arch.vocab * tokens


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a training step."""

    tensor: float
    context: float
    pipeline: float
    data: float
    weight_sync: float


def communication(
    arch: Architecture, config: Config, tokens: float, teacher_tokens: float, gradients: float, weights: float
) -> Communication:
    """Return the traffic of one replica in one step, whose sequences have ``tokens`` padded tokens, and the teacher's
    ``teacher_tokens``.

    It counts forward and backward passes of the update, and the forward passes that score student and teacher.
    ``gradients`` and ``weights`` are the bytes of a rank. Weight sync counts the bytes of all weights.
    """
    parallel, batch, passes = config.parallel, config.batch, passes_of(config, arch)
    width = DTYPE_BYTES[config.precision.params_dtype]
    tensor, pipeline, data = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
    )
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    # Tokens of all forward passes, of those that backward passes repeat, and of backward passes.
    share = 1 / parallel.context_parallel_size
    tokens, teacher_tokens = tokens * share, teacher_tokens * share
    forward = tokens * (passes.scoring + passes.update) + teacher_tokens * passes.teacher
    repeated, backward = tokens * passes.recomputed_sublayers, tokens * passes.update
    layers = max(stage_layers(parallel, arch.layers))
    # Each of a layer's two parts has an all-reduce in each direction, which sends what two gathers would. Under
    # sequence parallelism these are an all-gather and a reduce-scatter, and the backward pass gathers the input of the
    # first product again, since its ranks have kept their parts alone.
    gathers = 2 * (forward + repeated) + (3 if parallel.sequence_parallel else 2) * backward
    tensor_bytes = 2 * layers * gathers * arch.hidden * width * (tensor - 1) / tensor
    # Keys and values go round the ranks that share a sequence, and backward they and their gradients.
    ring = parallel.context_parallel_size - 1
    context_bytes = 2 * arch.key / tensor * width * layers * ring * (forward + repeated + 2 * backward)
    hops = 0 if pipeline == 1 else virtual
    # Under sequence parallelism each rank sends its part of the sequence.
    parts = tensor if parallel.sequence_parallel else 1
    pipeline_bytes = arch.hidden * width * hops * (forward + backward) / parts
    # A distributed optimizer reduce-scatters gradients in float32 and all-gathers weights; otherwise there is one
    # all-reduce.
    moved = gradients + (weights if config.optimizer.distributed else gradients)
    data *= parallel.context_parallel_size
    data_bytes = batch.minibatches * batch.epochs * moved * (data - 1) / data
    return Communication(tensor_bytes, context_bytes, pipeline_bytes, data_bytes, total_parameters(arch) * width)
