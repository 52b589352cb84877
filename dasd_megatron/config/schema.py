"""The typed configuration, and the one place where it is checked.

Every value that a run reads stands in :class:`Config` below with its unit. ``conf/`` holds Hydra groups that fill it;
:func:`load_config` composes them with command-line overrides, and :func:`validate` and :func:`check_paths` refuse
contradictions and missing files before any process starts. Every refusal is a :class:`ConfigError` whose message is one
line: the field, what is wrong with it, and what to write instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from dasd_megatron.errors import ConfigError, first_line
from dasd_megatron.files import atomic_file

FUNCTION_PATH = re.compile(r"[\w.]+:\w+")
"""``module:function``, the form in which fields name Python functions; see
:func:`dasd_megatron.plugins.load_function`."""


def _doc(default: Any, text: str) -> Any:
    """A dataclass field with its documentation; lists and nested configs get a factory."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": text})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


@dataclass
class RunConfig:
    name: str = _doc(MISSING, "name of the run; also the folder under runs/")
    dir: str | None = _doc(
        None, "run directory; null: runs/<name>/<date-time>, or with resume=auto the newest run of that name"
    )
    seed: int = _doc(1, "seed of weights, data order, rollouts and dropout")
    steps: int = _doc(MISSING, "training steps; one step is one batch of rollouts")
    readable_by: str = _doc(
        "owner", "owner, group or all: who may read what the run writes; only the owner may change it"
    )


@dataclass
class BackendConfig:
    kind: str = _doc("cpu", "cpu (gloo, local layers) or cuda (NCCL); cuda without a GPU is refused")
    transformer_impl: str = _doc(
        "auto", "auto, transformer_engine or local; auto takes Transformer Engine where it is installed"
    )
    threads: int = _doc(1, "CPU threads of each training process")
    timeout_seconds: float = _doc(
        1800.0,
        "limit of every collective, of the process group's start-up and of nodes waiting for one another, seconds; "
        "more than rollout.step_timeout_seconds",
    )


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = _doc(1, "TP: ranks that share each layer")
    pipeline_model_parallel_size: int = _doc(1, "PP: ranks that share the stack of layers")
    virtual_pipeline_model_parallel_size: int | None = _doc(
        None, "VPP: model chunks on each pipeline rank; null: 1F1B without interleaving"
    )
    data_parallel_size: int = _doc(1, "DP: replicas; the number of processes is TP x CP x PP x DP")
    sequence_parallel: bool = _doc(
        False, "shard activations between tensor-parallel regions along the sequence; needs TP > 1"
    )
    context_parallel_size: int = _doc(
        1, "CP: ranks that share each sequence; above 1 it needs a GPU and Transformer Engine"
    )
    first_pipeline_num_layers: int | None = _doc(
        None, "layers of the first pipeline stage, over all its chunks; null: as many as the stages in the middle"
    )
    last_pipeline_num_layers: int | None = _doc(
        None,
        "layers of the last pipeline stage, which also has the LM head and the loss; null: as many as the stages "
        "in the middle",
    )
    overlap_grad_reduce: bool = _doc(
        False, "reduce gradients over replicas bucket by bucket during the last backward pass"
    )
    overlap_param_gather: bool = _doc(
        False,
        "gather updated weights from the replicas bucket by bucket during the next minibatch's forward pass; needs "
        "optimizer.distributed and overlap_grad_reduce",
    )
    bucket_size: int | None = _doc(
        None, "overlap only: parameters that are reduced and gathered at once; null: Megatron's max(40e6, 1e6 x DP)"
    )

    @property
    def replica_size(self) -> int:
        """Processes of one replica."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def world_size(self) -> int:
        return self.replica_size * self.data_parallel_size


@dataclass
class TinyModelConfig:
    hidden_size: int = _doc(192, "width")
    num_layers: int = _doc(2, "transformer layers")
    num_attention_heads: int = _doc(4, "query heads")
    num_key_value_heads: int = _doc(2, "key/value heads")
    head_dim: int = _doc(48, "width of one head")
    intermediate_size: int = _doc(704, "width of the SwiGLU feed-forward")
    max_position_embeddings: int = _doc(256, "longest sequence, tokens")


@dataclass
class ModelConfig:
    path: str | None = _doc(
        None,
        "Hugging Face directory (config.json, tokenizer, safetensors) or checkpoint from `dasd convert`; null: make "
        "a tiny Qwen3 with random weights from model.tiny",
    )
    architecture: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "sizes of a preset, named as in config.json: `dasd plan` reads them where model.path is null, and "
            "config.json of model.path must agree"
        },
    )
    tiny: TinyModelConfig = _doc(TinyModelConfig, "architecture of the model made in code when model.path is null")


@dataclass
class PrecisionConfig:
    params_dtype: str = _doc(
        "fp32", "fp32 or bf16: weights and activations in training; statistics, optimizer state and gradients stay fp32"
    )
    recompute: str = _doc(
        "none",
        "activations computed again in the backward pass: none, selective (those of recompute_modules) or full "
        "(whole layers)",
    )
    recompute_modules: list[str] = _doc(
        ["mlp"],
        "recompute=selective, of each layer: mlp (most of its activations) and core_attn (little to gain, since it "
        "is fused)",
    )
    fp8: str = _doc(
        "none",
        "none, or Transformer Engine's recipe for the matrix products of the layers: delayed, tensorwise, blockwise "
        "(from Hopper on) or mxfp8 (from Blackwell on). The LM head, the loss and its statistics stay in bf16 and "
        "float32",
    )
    fp8_format: str = _doc("hybrid", "hybrid (E4M3 forward, E5M2 backward) or e4m3")
    bf16_first_layers: int = _doc(0, "under fp8, layers at the bottom of the model that stay in bf16")
    bf16_last_layers: int = _doc(0, "under fp8, layers at the top of the model that stay in bf16")
    fp8_check_every: int = _doc(
        20,
        "under fp8, steps between comparisons of its log-probs with those of bf16, on the first micro-batch of a "
        "step; 0: none",
    )
    fp8_max_diff: float = _doc(0.1, "mean difference in that comparison, nats a token, above which the run warns")


@dataclass
class AlgorithmConfig:
    name: str = _doc("dasd", "dasd, grpo, opsd, reversed or rlsd")
    verifier_weight: float = _doc(1.0, "weight of the group-relative verifier advantage; 0 trains on the teacher alone")
    normalize_std: bool = _doc(True, "divide a group's centred rewards by their standard deviation")
    beta: float = _doc(MISSING, "weight of the teacher term; our choice, no public value")
    rho: float = _doc(0.2, "share of a rollout's tokens on the far side of the entropy threshold")
    quantile_side: str = _doc(
        "upper",
        "upper: tau is the (1-rho)-quantile, so the most uncertain rho are pushed away (our choice); lower: tau is "
        "the rho-quantile",
    )
    scale_floor: float = _doc(
        MISSING, "least scale of the log-evidence gap in one rollout, nats; our choice, no public value"
    )
    gate: bool = _doc(True, "multiply the direction by the reliability gate sigmoid(|delta_bar| - 1)")
    rlsd_clip: float = _doc(0.2, "rlsd only: the teacher scales the verifier advantage by at most 1 +/- this")
    objective: str = _doc(
        "sampled",
        "sampled: the teacher acts through the advantage of the sampled token; distributional: through a divergence "
        "over the full vocabulary, weighted by omega, beside the verifier's surrogate",
    )
    divergence: str = _doc("reverse_kl", "distributional only: reverse_kl, KL(student || teacher); forward_kl; or jsd")
    divergence_weight: float = _doc(
        0.1, "distributional only: weight of the divergence term; our choice, no public value"
    )
    divergence_cap: float = _doc(
        2.0, "distributional only: a token is not pushed away from the teacher beyond this divergence, nats; our choice"
    )
    jsd_weight: float = _doc(0.5, "divergence=jsd only: weight of the student in the mixture")


@dataclass
class TeacherConfig:
    weights: str = _doc("live", "live (the current student), frozen (the student at step 0) or ema")
    ema_decay: float = _doc(0.99, "teacher.weights=ema: decay per training step")
    privileged: str = _doc(
        "solution",
        "what the teacher sees beside the problem: solution, hint (its first part) or answer (the final answer only)",
    )
    hint_fraction: float = _doc(
        0.5, "teacher.privileged=hint: share of the reference solution's characters that is shown"
    )
    template: str | None = _doc(
        None,
        "Jinja file or name of a shipped one for the teacher's message, with {{ problem }} and {{ privileged }}; or "
        "module:function, which gets the Problem and the privileged text; null: teacher.jinja",
    )


@dataclass
class PolicyLossConfig:
    clip_low: float = _doc(0.2, "PPO clip below: ratio >= 1 - clip_low")
    clip_high: float = _doc(0.28, "PPO clip above: ratio <= 1 + clip_high")
    dual_clip: float | None = _doc(None, "bound on the surrogate at negative advantages, > 1; null: none")
    importance_sampling: str = _doc(
        "none",
        "correct for the rollout engine's probabilities being others than the trainer's: none, token (each token's "
        "ratio) or sequence (the response's), truncated, on the surrogate alone",
    )
    importance_cap: float = _doc(2.0, "importance_sampling: largest ratio")
    kl_coef: float = _doc(
        0.0, "weight of the KL penalty to the starting model (k3 estimator), per token; 0: the model is not kept"
    )
    fused_linear: bool = _doc(
        True,
        "token statistics straight from hidden states and LM head, block by block; false materialises all logits "
        "of a micro-batch",
    )
    block_tokens: int = _doc(1024, "fused_linear only: tokens of one block of logits")
    block_columns: int = _doc(8192, "fused_linear only: vocabulary columns of one block of logits")
    max_skipped_steps: int = _doc(
        3,
        "steps in a row with updates skipped, because logits or gradients are not finite, before the run goes back "
        "to the last good checkpoint, with problems that come after theirs",
    )
    max_rollbacks: int = _doc(1, "times that a run goes back in this way; then it stops")


@dataclass
class BatchConfig:
    groups: int = _doc(16, "prompts of one step")
    samples_per_group: int = _doc(8, "rollouts of each prompt")
    minibatches: int = _doc(1, "optimizer steps over one batch of rollouts")
    epochs: int = _doc(1, "passes over one batch of rollouts")
    micro_batch_size: int = _doc(16, "most sequences of one forward pass")
    micro_batch_tokens: int | None = _doc(
        32768,
        "most tokens of one forward pass, padding included, so that long rollouts go in smaller groups, at least "
        "one; null: no limit",
    )
    packing: bool = _doc(
        False,
        "lay the sequences of a micro-batch end to end instead of padding them to the longest; each attends to "
        "itself alone. Micro-batches then hold nearly equal numbers of tokens",
    )


@dataclass
class OptimizerConfig:
    lr: float = _doc(MISSING, "peak learning rate")
    min_lr: float = _doc(0.0, "learning rate at the end of the decay")
    warmup_steps: int = _doc(0, "steps of linear warm-up")
    decay_style: str = _doc("constant", "constant, linear or cosine")
    weight_decay: float = _doc(0.0, "decoupled weight decay")
    adam_beta1: float = _doc(0.9, "Adam's first-moment decay")
    adam_beta2: float = _doc(0.95, "Adam's second-moment decay")
    adam_eps: float = _doc(1e-8, "Adam's epsilon")
    clip_grad: float = _doc(1.0, "gradients are scaled to at most this global L2 norm")
    distributed: bool = _doc(True, "shard optimizer state over data-parallel ranks")


@dataclass
class SGLangConfig:
    backend: str = _doc("cuda", "cuda or cpu")
    python: str | None = _doc(
        None,
        "Python interpreter of the environment that SGLang is installed in, like .venv-sglang/bin/python; null: "
        "this one",
    )
    tensor_parallel_size: int = _doc(1, "GPUs that share each replica of the model")
    data_parallel_size: int = _doc(1, "replicas behind the server's one address")
    mem_fraction_static: float | None = _doc(
        None, "share of GPU memory for weights and key-value cache; null: SGLang's choice"
    )
    max_total_tokens: int | None = _doc(None, "tokens in the key-value cache; null: SGLang's choice")
    context_length: int | None = _doc(None, "longest prompt and response together, tokens; null: the model's")
    quantization: str | None = _doc(None, "quantisation of the served weights, like fp8; null: none")
    arguments: list[str] = _doc([], "further arguments of sglang.launch_server, like [--enable-metrics]")


@dataclass
class RolloutConfig:
    engine: str = _doc(
        "embedded",
        "embedded or sglang (the trainer starts one server on this machine), or external (those that "
        "rollout.servers, rollout.nodes or rollout.router name)",
    )
    sglang: SGLangConfig = _doc(SGLangConfig, "rollout.engine=sglang only")
    servers: list[str] = _doc(
        [], "addresses of SGLang-compatible servers for rollout.engine=external, like http://10.0.0.1:30000"
    )
    nodes: str | None = _doc(
        None,
        "instead of rollout.servers, the Slurm host list of the nodes that they run on, like gpu[01-04,07] or "
        "${oc.env:SLURM_JOB_NODELIST_HET_GROUP_1}; scontrol expands it",
    )
    servers_per_node: int = _doc(
        1, "rollout.nodes only: servers on each node, at consecutive ports from rollout.port on"
    )
    router: str | None = _doc(
        None,
        "instead of rollout.servers, the address of an sglang-router, like http://10.0.0.1:30000: it gets the "
        "sampling requests, one row each, and the servers that it lists get the weights",
    )
    host: str = _doc("127.0.0.1", "address that the trainer's own server listens on")
    port: int = _doc(
        0, "port of the trainer's own server, 0: any free one; with rollout.nodes the first port on each node"
    )
    threads: int = _doc(2, "CPU threads of the trainer's own server")
    dtype: str = _doc("float32", "float32 or bfloat16: the weights of the trainer's own server")
    max_batch_size: int = _doc(256, "sequences that the trainer's own server decodes at once")
    deterministic: bool = _doc(
        True,
        "equal seeds give equal rollouts. embedded: one request is one decoding batch, so concurrent requests are "
        "not merged; sglang: --enable-deterministic-inference, without which it heeds no seed and is faster",
    )
    groups_per_request: int = _doc(16, "prompts in one HTTP request")
    temperature: float = _doc(1.0, "sampling temperature; training scores at the same one")
    top_p: float = _doc(1.0, "nucleus sampling; values under 1 bias the importance ratio")
    top_k: int = _doc(-1, "top-k sampling; -1: off")
    max_new_tokens: int = _doc(MISSING, "longest response, tokens")
    max_prompt_tokens: int = _doc(
        MISSING, "longest prompt, the privileged one included, tokens; longer prompts are refused before the run starts"
    )
    max_staleness: int = _doc(
        0,
        "training steps that the weights behind a rollout may be older than those that it trains. 0: on-policy, "
        "rollouts and updates take turns; 1: the next step's rollouts are sampled while this one trains; "
        "loss.importance_sampling corrects for it",
    )
    unfinished: str = _doc(
        "finish",
        "what becomes of rollouts in flight when their step is complete or the weights change. finish: they are "
        "waited for; abort: they are broken off, and their prompts come first in the next step; retract: they go on "
        "under the new weights (needs max_staleness>0)",
    )
    over_sampling: float = _doc(
        1.0, "prompts that are started, as a multiple of those that are missing from a step; at least 1"
    )
    filter: str | None = _doc(
        None,
        "module:function that says of a group (a list of dasd_megatron.samples.Sample) whether it is trained "
        "on; other prompts take the place of those refused. dasd_megatron.rollout.filters:rewards_differ drops "
        "groups without advantage; null: all",
    )
    filter_limit: float = _doc(
        4.0, "groups that the filter may refuse in a step, in multiples of batch.groups, before these are used"
    )
    function: str | None = _doc(
        None,
        "module:function, async, that samples the responses to one prompt in its own way, by requests to the "
        "servers; gets a dasd_megatron.rollout.collector.RolloutRequest and a function to generate with; null: one "
        "completion each",
    )
    weight_sync: str = _doc(
        "disk",
        "disk: a Hugging Face directory that trainer and servers share; distributed: broadcast over a process group "
        "of trainer and servers; tensor: memory that trainer and servers share, on one machine",
    )
    weight_bucket_bytes: int = _doc(
        512 * 2**20,
        "weight_sync=distributed and tensor: bytes sent at once; two buckets are in memory, one travels while the "
        "next is gathered",
    )
    weight_sync_timeout_seconds: float = _doc(
        300.0, "limit of each request of a weight sync, of each broadcast and of the start of the group"
    )
    verify_weights: int = _doc(
        0,
        "parameters, other ones each time, whose checksums on the servers are compared with the trainer's after "
        "every weight sync; 0: none",
    )
    release_memory: bool = _doc(
        False,
        "servers on the trainer's machine give the memory of weights and key-value cache back while the trainer "
        "computes; external ones have to run with --enable-memory-saver",
    )
    max_log_prob_diff: float | None = _doc(
        1.0,
        "mean difference between the servers' log-probs and the trainer's of one step, nats a token, above which the "
        "run stops before it trains on them: another model, or weights that did not arrive; null: no limit",
    )
    connect_timeout_seconds: float = _doc(5.0, "limit for opening a connection")
    request_timeout_seconds: float = _doc(120.0, "limit for one request's answer")
    step_timeout_seconds: float = _doc(
        900.0, "limit for all rollouts of one step, or of one evaluation within training, retries included"
    )
    startup_timeout_seconds: float = _doc(120.0, "limit for a server to become healthy")
    max_retries: int = _doc(3, "further tries of a failed request")
    backoff_seconds: float = _doc(0.5, "wait before the first retry; doubles each time")
    max_in_flight: int = _doc(64, "requests under way at once")
    max_restarts: int = _doc(
        3,
        "times in one run that a failed step is tried again: the trainer's own server is started anew, or others "
        "are back by then",
    )
    replay: str | None = _doc(
        None, "folder of saved rollouts (<run>/rollouts); the trainer reads them instead of asking a server"
    )


@dataclass
class DataSourceConfig:
    path: str | None = _doc(None, "JSONL file, one problem a line")
    generator: str | None = _doc(
        None, "instead of a path, a reasoning-gym dataset with worked solutions: chain_sum, countdown or gsm_symbolic"
    )
    generator_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"doc": "arguments of the reasoning-gym dataset, like {min_terms: 2, max_digits: 1}"},
    )
    size: int | None = _doc(None, "problems to take from the head of the file, or to generate; null: the whole file")
    seed: int = _doc(0, "seed of the generator")
    problem_field: str = _doc("problem", "JSON field of the problem's text")
    answer_field: str = _doc("expected_answer", "JSON field of the final answer")
    solution_field: str = _doc(
        "reference_solution",
        "JSON field of the worked solution; a GSM8K-style '#### 72' at its end gives the answer where answer_field "
        "is absent",
    )


@dataclass
class DataConfig:
    train: DataSourceConfig = _doc(DataSourceConfig, "problems to train on")
    heldout: DataSourceConfig = _doc(
        DataSourceConfig, "problems to evaluate on; any that also stand in the training set are refused"
    )
    template: str | None = _doc(
        None,
        "Jinja file or name of a shipped one for the student's user message, with {{ problem }}; or module:function, "
        "which gets the dasd_megatron.data.prompts.Problem without its answer and solution and returns the message "
        "as text or chat messages; null: the problem as it is",
    )
    shuffle: bool = _doc(True, "a new order of the training problems each epoch")


@dataclass
class VerifyConfig:
    workers: int = _doc(2, "processes that grade answers math-verify's way; 0 grades by the integer fast path alone")
    timeout_seconds: float = _doc(2.5, "limit for one answer; beyond it the grader is killed and the reward is 0")
    max_answer_chars: int = _doc(512, "longer answers get reward 0 ungraded")
    reward: str | None = _doc(
        None,
        "module:function that gives the reward of a dasd_megatron.samples.Sample, whose own is 1 or 0; above "
        "0 counts as right in evaluation; null: 1 or 0",
    )
    truncated_is_wrong: bool = _doc(
        False,
        "responses that rollout.max_new_tokens cut short get reward 0 ungraded, so that going on behind the "
        "answer does not pay",
    )


@dataclass
class EvaluationConfig:
    before: bool = _doc(True, "evaluate before the first step")
    after: bool = _doc(True, "evaluate after the last step")
    every: int = _doc(0, "evaluate every so many steps; 0: never")
    samples: int = _doc(16, "responses per problem (the 16 of Avg@16)")
    ks: list[int] = _doc([1, 2, 4, 8, 16], "the k of Pass@k")
    temperature: float = _doc(1.0, "sampling temperature of evaluation")
    top_p: float = _doc(1.0, "nucleus sampling of evaluation")
    benchmarks: list[str] = _doc(
        [],
        "dasd evaluate only: names of benchmarks, like [gsm8k,math-500], and paths of JSONL files, one problem a "
        "line; []: data.heldout",
    )
    data_dir: str = _doc("data", "dasd evaluate only: folder of the benchmarks, as <name>/test.jsonl")
    size: int | None = _doc(None, "dasd evaluate only: problems to take from the head of each benchmark; null: all")
    samples_per_request: int | None = _doc(
        None,
        "dasd evaluate only: samples in one HTTP request, which come back and are saved together; null: as many as "
        "in training",
    )
    confidence: float = _doc(0.95, "dasd evaluate only: level of the confidence intervals")
    bootstrap_resamples: int = _doc(1000, "dasd evaluate only: drawings of problems behind the confidence intervals")
    nemo_skills: str = _doc(
        "none",
        "dasd evaluate only: none; grade (NeMo-Skills grades the same responses, and differences are listed); eval "
        "(NeMo-Skills' own `ns eval` also asks the servers, by its own prompts)",
    )
    nemo_skills_python: str | None = _doc(
        None, "Python interpreter of the environment that NeMo-Skills is installed in"
    )
    nemo_skills_timeout_seconds: float = _doc(3600.0, "limit for each command of NeMo-Skills")


@dataclass
class WarmStartConfig:
    steps: int = _doc(0, "steps of supervised fine-tuning before reinforcement; 0: none")
    batch_size: int = _doc(64, "examples of one step")
    micro_batch_size: int | None = _doc(None, "sequences of one forward pass; null: batch.micro_batch_size")
    lr: float = _doc(1e-3, "peak learning rate, after a linear warm-up")
    decay_style: str = _doc("cosine", "constant, linear or cosine; the last two end at a tenth of the peak")
    warmup_steps: int = _doc(20, "steps of linear warm-up")
    hidden_dropout: float = _doc(0.0, "share of the hidden states that is dropped; reinforcement drops none")
    privileged_share: float = _doc(
        0.5, "share of examples whose prompt shows the reference solution, so that the self-teacher can use it"
    )


@dataclass
class CheckpointConfig:
    every: int = _doc(10, "steps between checkpoints; 0: only at the end and on failure")
    keep_last: int = _doc(2, "checkpoints to keep")
    keep_every: int = _doc(
        0, "checkpoints whose step is a multiple of this are kept for good, beside keep_last; 0: none"
    )
    async_save: bool = _doc(True, "a process of its own writes and hashes the files while training goes on")
    export_every: int = _doc(
        0,
        "beside checkpoints whose step is a multiple of this, the model as a Hugging Face directory step_<n>.hf, "
        "kept for good; 0: none",
    )
    grace_seconds: float = _doc(
        300.0,
        "limit for saving and ending after SIGTERM or SIGUSR1, seconds; then the processes are killed, and the "
        "last checkpoint holds",
    )


@dataclass
class LoggingConfig:
    tensorboard: bool = _doc(True, "write TensorBoard events beside metrics.jsonl")
    save_rollouts_every: int = _doc(1, "save all rollouts of every so many steps, for replay and the report; 0: never")
    inspect_rollouts: int = _doc(4, "rollouts of each saved step whose per-token statistics are kept for the report")
    wandb: str = _doc(
        "none",
        "none, offline (files in the run directory, for `wandb sync`) or online (WANDB_API_KEY): numbers for W&B",
    )
    wandb_project: str = _doc("dasd", "project of the run in W&B")
    mlflow: bool = _doc(False, "send the numbers to MLflow too")
    mlflow_uri: str | None = _doc(
        None, "MLflow's tracking server, or a store of its own as file:/...; null: mlruns/ in the run directory"
    )
    mlflow_experiment: str = _doc("dasd", "experiment of the run in MLflow")


@dataclass
class HealthConfig:
    every: int = _doc(
        1, "training steps between measurements of reasoning health, health/... in the metrics; 0: in evaluations only"
    )
    epistemic_words: list[str] = _doc(
        ["wait", "hmm", "perhaps", "maybe", "possibly", "actually", "alternatively", "probably", "likely", "unlikely", "i think",
         "not sure", "unsure", "seems", "suppose", "let me check", "let me verify", "double check"],
        "words and phrases of doubt, counted in health/epistemic_per_100; a phrase counts once. Case does not matter",
    )  # fmt: skip
    correction_phrases: list[str] = _doc(
        ["wait", "actually", "no that's", "that's wrong", "that is wrong", "that's not right", "that is not right", "not correct",
         "incorrect", "mistake", "i was wrong", "on second thought", "let me redo", "let me recompute", "let me recalculate",
         "let me try again"],
        "words and phrases that a response corrects itself with, for health/correction_phrase_share and "
        "health/self_correction_share",
    )  # fmt: skip
    repetition_ngram: int = _doc(8, "tokens of an n-gram in health/repetition and health/repeated_run_...")
    position_bins: list[int] = _doc(
        [16, 64, 256, 1024, 4096, 16384],
        "positions in the response at which a new bin of health/entropy_from_... begins, tokens; the first bin "
        "begins at 0",
    )


WATCH_CONDITIONS = (
    "entropy_low", "entropy_high", "accuracy_drop", "length", "mismatch", "rewards_all_right", "rewards_all_wrong", "groups_filtered",
    "teacher_equals_student", "pushed_diverge", "non_finite",
)  # fmt: skip
"""What :class:`dasd_megatron.observability.watch.Watch` looks for."""


@dataclass
class WatchConfig:
    action: str = _doc(
        "warn",
        "warn; pause: save a checkpoint and wait until the file watch.continue appears in the run directory; or "
        "stop: save a checkpoint and end with exit status 76",
    )
    act_on: list[str] = _doc(
        ["entropy_low", "entropy_high", "accuracy_drop", "length", "mismatch", "pushed_diverge", "non_finite"],
        "conditions for which watch.action is taken; the others only warn. Known: " + ", ".join(WATCH_CONDITIONS),
    )
    ignore: list[str] = _doc([], "conditions that are not looked for")
    patience: int = _doc(5, "steps in a row in which a condition must hold; non_finite warns at once")
    cooldown: int = _doc(50, "steps after a warning in which the same condition does not warn again")
    baseline_steps: int = _doc(10, "steps whose mean is a level of a metric, with which later steps are compared")
    pause_timeout_seconds: float = _doc(3600.0, "watch.action=pause: longest wait; then the run ends as with stop")
    entropy_low: float = _doc(0.1, "entropy_low: share of its highest level so far that mean entropy is under")
    entropy_high: float = _doc(
        3.0, "entropy_high: multiple of its first level that mean entropy is over, and by 0.5 nat at least"
    )
    accuracy_drop: float = _doc(
        0.3, "accuracy_drop: share of its highest level so far that accuracy has lost, and 10 points at least"
    )
    length_growth: float = _doc(
        2.0, "length: multiple of its level before the last patience steps that the mean response length is over"
    )
    truncated_share: float = _doc(
        0.5, "length: or this share of responses, or more, ends at rollout.max_new_tokens; 0: that does not count"
    )
    mismatch_growth: float = _doc(
        3.0,
        "mismatch: multiple of its lowest level so far that the mean difference between servers' and trainer's "
        "log-probs is over",
    )
    mismatch_floor: float = _doc(0.03, "mismatch: differences up to this are left alone, nats a token")
    saturated_share: float = _doc(0.9, "rewards_all_right, rewards_all_wrong: share of groups, at least; above 0")
    filtered_share: float = _doc(
        0.9, "groups_filtered: share of the groups drawn that rollout.filter refuses, at least; above 0"
    )
    teacher_gap: float = _doc(1e-3, "teacher_equals_student: mean |delta| of a token, at most, nats")
    pushed_drop: float = _doc(
        2.0,
        "pushed_diverge: the mean log-prob of tokens pushed away from the teacher is under its highest level by "
        "more than this, nats",
    )


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    resume: str = field(
        default="none",
        metadata={
            "doc": "none, auto (the newest checkpoint of the run directory, or a fresh start), or the path of a "
            "checkpoint"
        },
    )


def load_config(overrides: list[str], config_dir: str | Path | None = None, *, needs_files: bool = True) -> Config:
    """Compose ``conf/config.yaml`` with Hydra overrides (``experiment=quickstart optimizer.lr=1e-4``), type-check and
    validate it.

    Args:
        config_dir: a directory of further groups: ``experiment=mine`` is then also looked for in
        ``config_dir/experiment/mine.yaml``. needs_files: False for a look at a configuration elsewhere than where it is
        to run: its files need not exist, and its data need not
            be named.

    Raises:
        ConfigError: an unknown field or group, a value of the wrong type, a required field left out, a contradiction,
            or a path that
            does not exist.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is not an override: write field=value, like optimizer.lr=1e-4")
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(
                f"--config-dir {config_dir} is no directory: give one that holds groups, like "
                f"{config_dir}/experiment/mine.yaml"
            )
        quoted = str(Path(config_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
        overrides = [f"hydra.searchpath=['file://{quoted}']", *overrides]
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_module("dasd_megatron.conf", version_base="1.3"):
            composed = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_hydra(error)) from error
    if not needs_files:
        for name in ("train", "heldout"):
            if composed.data[name].path is None and composed.data[name].generator is None:
                composed.data[name].path = f"{name}.jsonl"
        return _typed(composed)
    config = _typed(composed)
    check_paths(config)
    _check_trackers(config.logging)
    return config


def read_config(path: str | Path) -> Config:
    """The resolved configuration that a run saved (``<run>/config.yaml``), validated again, but for its paths: what a
    run was resumed
    from, replayed or read may be gone by now."""
    return _typed(OmegaConf.load(path))


def save_config(config: Config, path: str | Path) -> None:
    """Write ``config`` for :func:`read_config`; replaces ``path`` in one step."""
    with atomic_file(Path(path)) as partial:
        OmegaConf.save(OmegaConf.structured(config), partial)


def known_fields(schema: type = Config, prefix: str = "") -> dict[str, str]:
    """Every field of the configuration by its dotted name, with its documentation."""
    fields = {}
    for one in dataclasses.fields(schema):
        default = one.default_factory if one.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            fields.update(known_fields(default, f"{prefix}{one.name}."))
        else:
            fields[prefix + one.name] = one.metadata["doc"]
    return fields


def field_limits() -> dict[str, str]:
    """What the fields that have limits accept, for people."""
    limits = {name: ", ".join(choices) for name, choices in _CHOICES.items()}
    for name, (low, high) in _RANGES.items():
        limits[name] = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
    return limits


def _typed(values: Any) -> Config:
    try:
        # Plain values first: a composed config that an override has opened with "+" would accept unknown fields.
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(values, resolve=True))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{missing[0]} is required ({known_fields()[missing[0]]}): write {missing[0]}=..., or start from "
                "experiment=quickstart"
            )
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown_field(str(error.full_key))) from error
    except (OmegaConfBaseException, MissingMandatoryValue) as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    validate(config)
    return config


def _unknown_field(name: str) -> str:
    close = difflib.get_close_matches(name, known_fields(), n=1, cutoff=0.5)
    return f"{name} is not a field of the configuration" + (
        f"; did you mean {close[0]}?" if close else "; `dasd train --help` lists them"
    )


def _explain_hydra(error: Exception) -> str:
    text = str(error)
    override = re.fullmatch(r"Error merging override (\S+?)=.*", text, re.DOTALL)
    if override and error.__cause__ is not None:
        return f"{override.group(1)}: {first_line(error.__cause__)}"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        return _unknown_field(unknown.group(1))
    group = re.search(
        r"Could not find '([^']+)/([^'/]+)'.*?Available options in '[^']*':\n((?:\t[^\n]*\n)*)", text, re.DOTALL
    )
    if group:
        options = ", ".join(group.group(3).split())
        return f"{group.group(1)}={group.group(2)} does not exist; choose one of: {options}"
    return " ".join(text.split())


UMASKS = {"owner": 0o077, "group": 0o027, "all": 0o022}
"""What ``run.readable_by`` takes away from the permissions of new files."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "run.readable_by": tuple(UMASKS),
    "backend.kind": ("cpu", "cuda"),
    "backend.transformer_impl": ("auto", "transformer_engine", "local"),
    "precision.params_dtype": ("fp32", "bf16"),
    "precision.recompute": ("none", "selective", "full"),
    "precision.fp8": ("none", "delayed", "tensorwise", "blockwise", "mxfp8"),
    "precision.fp8_format": ("hybrid", "e4m3"),
    "algorithm.name": ("dasd", "grpo", "opsd", "reversed", "rlsd"),
    "algorithm.quantile_side": ("upper", "lower"),
    "algorithm.objective": ("sampled", "distributional"),
    "algorithm.divergence": ("reverse_kl", "forward_kl", "jsd"),
    "teacher.weights": ("live", "frozen", "ema"),
    "teacher.privileged": ("solution", "hint", "answer"),
    "optimizer.decay_style": ("constant", "linear", "cosine"),
    "warm_start.decay_style": ("constant", "linear", "cosine"),
    "loss.importance_sampling": ("none", "token", "sequence"),
    "rollout.engine": ("embedded", "sglang", "external"),
    "rollout.sglang.backend": ("cuda", "cpu"),
    "rollout.unfinished": ("finish", "abort", "retract"),
    "rollout.weight_sync": ("disk", "distributed", "tensor"),
    "rollout.dtype": ("float32", "bfloat16"),
    "evaluation.nemo_skills": ("none", "grade", "eval"),
    "logging.wandb": ("none", "offline", "online"),
    "watch.action": ("warn", "pause", "stop"),
}

# Inclusive bounds; a bound of None is open.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "run.seed": (0, 2**31 - 1),
    "run.steps": (0, None),
    "backend.threads": (1, None),
    "backend.timeout_seconds": (1, None),
    "parallel.tensor_model_parallel_size": (1, None),
    "parallel.pipeline_model_parallel_size": (1, None),
    "parallel.virtual_pipeline_model_parallel_size": (2, None),
    "parallel.data_parallel_size": (1, None),
    "parallel.context_parallel_size": (1, None),
    "parallel.first_pipeline_num_layers": (1, None),
    "parallel.last_pipeline_num_layers": (1, None),
    "parallel.bucket_size": (1, None),
    "model.tiny.hidden_size": (1, None),
    "model.tiny.num_layers": (1, None),
    "model.tiny.num_attention_heads": (1, None),
    "model.tiny.num_key_value_heads": (1, None),
    "model.tiny.head_dim": (1, None),
    "model.tiny.intermediate_size": (1, None),
    "model.tiny.max_position_embeddings": (1, None),
    "precision.bf16_first_layers": (0, None),
    "precision.bf16_last_layers": (0, None),
    "precision.fp8_check_every": (0, None),
    "precision.fp8_max_diff": (0, None),
    "algorithm.verifier_weight": (0, None),
    "algorithm.beta": (0, None),
    "algorithm.rho": (0, 1),
    "algorithm.scale_floor": (0, None),
    "algorithm.rlsd_clip": (0, None),
    "algorithm.divergence_weight": (0, None),
    "algorithm.divergence_cap": (0, None),
    "teacher.ema_decay": (0, 1),
    "teacher.hint_fraction": (None, 1),
    "loss.clip_low": (0, 1),
    "loss.clip_high": (0, None),
    "loss.kl_coef": (0, None),
    "loss.block_tokens": (1, None),
    "loss.block_columns": (1, None),
    "loss.max_skipped_steps": (0, None),
    "loss.max_rollbacks": (0, None),
    "batch.groups": (1, None),
    "batch.samples_per_group": (1, None),
    "batch.minibatches": (1, None),
    "batch.epochs": (1, None),
    "batch.micro_batch_size": (1, None),
    "batch.micro_batch_tokens": (1, None),
    "optimizer.lr": (0, None),
    "optimizer.min_lr": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.adam_beta1": (0, None),
    "optimizer.adam_beta2": (0, None),
    "optimizer.adam_eps": (0, None),
    "optimizer.clip_grad": (0, None),
    "rollout.port": (0, 65535),
    "rollout.servers_per_node": (1, None),
    "rollout.sglang.tensor_parallel_size": (1, None),
    "rollout.sglang.data_parallel_size": (1, None),
    "rollout.sglang.mem_fraction_static": (0.01, 0.99),
    "rollout.sglang.max_total_tokens": (1, None),
    "rollout.sglang.context_length": (1, None),
    "rollout.threads": (1, None),
    "rollout.max_batch_size": (1, None),
    "rollout.groups_per_request": (1, None),
    "rollout.temperature": (1e-3, None),
    "rollout.top_p": (1e-6, 1),
    "rollout.top_k": (-1, None),
    "rollout.max_new_tokens": (1, None),
    "rollout.max_prompt_tokens": (1, None),
    "rollout.max_staleness": (0, None),
    "rollout.over_sampling": (1, 100),
    "rollout.filter_limit": (0, None),
    "rollout.weight_bucket_bytes": (1, None),
    "rollout.max_log_prob_diff": (0, None),
    "rollout.weight_sync_timeout_seconds": (0.1, None),
    "rollout.verify_weights": (0, None),
    "rollout.connect_timeout_seconds": (0.1, None),
    "rollout.request_timeout_seconds": (0.1, None),
    "rollout.step_timeout_seconds": (1, None),
    "rollout.startup_timeout_seconds": (1, None),
    "rollout.max_retries": (0, None),
    "rollout.backoff_seconds": (0, None),
    "rollout.max_in_flight": (1, None),
    "rollout.max_restarts": (0, None),
    "verify.workers": (0, None),
    "verify.timeout_seconds": (0.1, None),
    "verify.max_answer_chars": (1, None),
    "evaluation.every": (0, None),
    "evaluation.samples": (1, None),
    "evaluation.temperature": (0, None),
    "evaluation.top_p": (1e-6, 1),
    "evaluation.size": (1, None),
    "evaluation.samples_per_request": (1, None),
    "evaluation.confidence": (0.5, 0.9999),
    "evaluation.bootstrap_resamples": (1, 1_000_000),
    "evaluation.nemo_skills_timeout_seconds": (1, None),
    "warm_start.steps": (0, None),
    "warm_start.batch_size": (1, None),
    "warm_start.micro_batch_size": (1, None),
    "warm_start.lr": (0, None),
    "warm_start.warmup_steps": (0, None),
    "warm_start.privileged_share": (0, 1),
    "warm_start.hidden_dropout": (0, 1),
    "checkpoint.every": (0, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_every": (0, None),
    "checkpoint.export_every": (0, None),
    "checkpoint.grace_seconds": (1, None),
    "logging.save_rollouts_every": (0, None),
    "logging.inspect_rollouts": (0, None),
    "health.every": (0, None),
    "health.repetition_ngram": (1, None),
    "watch.patience": (1, None),
    "watch.cooldown": (0, None),
    "watch.baseline_steps": (1, None),
    "watch.pause_timeout_seconds": (1, None),
    "watch.entropy_low": (0, 1),
    "watch.entropy_high": (1, None),
    "watch.accuracy_drop": (0, 1),
    "watch.length_growth": (1, None),
    "watch.truncated_share": (0, 1),
    "watch.mismatch_growth": (1, None),
    "watch.mismatch_floor": (0, None),
    "watch.saturated_share": (None, 1),
    "watch.filtered_share": (None, 1),
    "watch.teacher_gap": (0, None),
    "watch.pushed_drop": (0, None),
}

# Bounds that the value itself may not reach.
_ABOVE = {
    "watch.saturated_share": 0,
    "watch.filtered_share": 0,
    "teacher.hint_fraction": 0,
    "loss.importance_cap": 0,
    "loss.dual_clip": 1,
    "algorithm.jsd_weight": 0,
}
_BELOW = {
    "algorithm.rlsd_clip": 1,
    "warm_start.hidden_dropout": 1,
    "algorithm.jsd_weight": 1,
    "optimizer.adam_beta1": 1,
    "optimizer.adam_beta2": 1,
}


def _value(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def validate(config: Config) -> None:
    """Refuse values out of range and fields that contradict each other, without a look at the disk; see
    :class:`ConfigError`."""
    if config.model.path == "":
        raise ConfigError(
            "model.path is required with model=hf: give a Hugging Face directory or a Megatron checkpoint"
        )
    for name, choices in _CHOICES.items():
        if _value(config, name) not in choices:
            raise ConfigError(f"{name}={_value(config, name)}: write one of {', '.join(choices)}")
    for name in known_fields():
        value = _value(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value}: must be a finite number")
    for name, (low, high) in _RANGES.items():
        value = _value(config, name)
        if value is None:
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = (
                f"at least {low:g}"
                if high is None
                else f"at most {high:g}"
                if low is None
                else f"between {low:g} and {high:g}"
            )
            raise ConfigError(f"{name}={value}: must be {bounds}")
    for name, bound in _ABOVE.items():
        value = _value(config, name)
        if value is not None and value <= bound:
            raise ConfigError(f"{name}={value}: must be above {bound}")
    for name, bound in _BELOW.items():
        value = _value(config, name)
        if value is not None and value >= bound:
            raise ConfigError(f"{name}={value}: must be below {bound}")
    parallel, batch, rollout = config.parallel, config.batch, config.rollout
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", config.run.name):
        raise ConfigError(
            f"run.name={config.run.name!r}: use letters, digits, '.', '_' and '-' only, and no '.' in front, since it "
            "names a folder"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1: raise it, or write false"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1: raise "
            "it, or write null"
        )
    if config.backend.kind == "cpu" and config.backend.transformer_impl == "transformer_engine":
        raise ConfigError(
            "backend.transformer_impl=transformer_engine needs a GPU: set backend.kind=cuda, or write auto"
        )
    _check_fp8(config)
    _check_parallel(config)
    _check_health(config)
    share = parallel.data_parallel_size * batch.minibatches
    if batch.groups % share:
        raise ConfigError(
            f"batch.groups={batch.groups} does not divide into {parallel.data_parallel_size} replicas x "
            f"{batch.minibatches} minibatches: write a multiple of {share}"
        )
    sequences = batch.groups // share * batch.samples_per_group
    if parallel.virtual_pipeline_model_parallel_size is not None and sequences < parallel.pipeline_model_parallel_size:
        raise ConfigError(
            "batch.groups: interleaved pipelining needs at least as many sequences in a minibatch as pipeline stages"
        )
    if batch.samples_per_group == 1 and config.algorithm.verifier_weight > 0:
        raise ConfigError(
            "batch.samples_per_group=1 leaves the verifier advantage always 0: write 2 or more, or "
            "algorithm.verifier_weight=0"
        )
    algorithm = config.algorithm
    if algorithm.verifier_weight == 0 and algorithm.name in ("grpo", "rlsd"):
        raise ConfigError(
            f"algorithm.name={algorithm.name} with algorithm.verifier_weight=0 trains on nothing: write "
            "algorithm.verifier_weight=1"
        )
    distributional = algorithm.objective == "distributional"
    teacher_weight = "divergence_weight" if distributional else "beta"
    if algorithm.verifier_weight == 0 and getattr(algorithm, teacher_weight) == 0:
        raise ConfigError(
            f"algorithm.name={algorithm.name} with algorithm.verifier_weight=0 and algorithm.{teacher_weight}=0 "
            "trains on nothing: raise one of them"
        )
    if distributional and algorithm.name in ("grpo", "rlsd"):
        raise ConfigError(
            f"algorithm.objective=distributional has no direction under algorithm.name={algorithm.name}: "
            "write dasd, opsd or reversed, or objective=sampled"
        )
    if distributional and not config.loss.fused_linear:
        raise ConfigError(
            "algorithm.objective=distributional re-projects the teacher's hidden states: write "
            "loss.fused_linear=true, or objective=sampled"
        )
    if config.warm_start.steps and config.warm_start.batch_size % parallel.data_parallel_size:
        raise ConfigError(
            f"warm_start.batch_size={config.warm_start.batch_size}: write a multiple of parallel.data_parallel_size"
        )
    warm_start_sequences = config.warm_start.batch_size // parallel.data_parallel_size
    if (
        config.warm_start.steps
        and parallel.virtual_pipeline_model_parallel_size is not None
        and warm_start_sequences < parallel.pipeline_model_parallel_size
    ):
        least = parallel.data_parallel_size * parallel.pipeline_model_parallel_size
        raise ConfigError(
            f"warm_start.batch_size={config.warm_start.batch_size}: interleaved pipelining needs at least as many "
            f"examples on each replica as pipeline stages: write at least {least}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}: lower it"
        )
    check_servers(rollout)
    if any(re.match(r"--(admin-)?api-key\b", argument) for argument in rollout.sglang.arguments):
        raise ConfigError(
            "rollout.sglang.arguments: a key there would stand in config.yaml and in the list of processes: set "
            "DASD_API_KEY instead"
        )
    for name in ("verify.reward", "rollout.filter", "rollout.function"):
        path = _value(config, name)
        if path is not None and not FUNCTION_PATH.fullmatch(path):
            raise ConfigError(f"{name}={path}: write module:function, like my_package.my_module:my_function")
    if rollout.unfinished == "retract" and not rollout.max_staleness:
        raise ConfigError(
            "rollout.unfinished=retract lets rollouts go on under newer weights than they began with: write "
            "rollout.max_staleness=1 or more, or unfinished=abort"
        )
    on_policy = rollout.max_staleness == 0
    if rollout.over_sampling > 1 and on_policy and rollout.unfinished == "finish" and rollout.filter is None:
        raise ConfigError(
            f"rollout.over_sampling={rollout.over_sampling:g} waits for more rollouts than a step uses: write "
            "rollout.unfinished=abort, name a rollout.filter, or write 1"
        )
    if rollout.unfinished == "abort" and on_policy and rollout.over_sampling == 1:
        raise ConfigError(
            "rollout.unfinished=abort has nothing to break off when a step waits for every prompt it starts: write "
            "rollout.over_sampling above 1, or unfinished=finish"
        )
    if rollout.release_memory and rollout.unfinished != "finish":
        raise ConfigError(
            f"rollout.release_memory=true needs servers that are idle, and rollout.unfinished={rollout.unfinished} "
            "leaves them at work: write finish"
        )
    if rollout.release_memory and rollout.max_staleness:
        raise ConfigError(
            "rollout.release_memory=true leaves nothing to sample ahead with, as rollout.max_staleness="
            f"{rollout.max_staleness} wants: write 0"
        )
    if rollout.top_k == 0:
        raise ConfigError("rollout.top_k=0: write -1 for off, or at least 1")
    if config.backend.timeout_seconds <= rollout.step_timeout_seconds + rollout.startup_timeout_seconds:
        raise ConfigError(
            "backend.timeout_seconds must exceed rollout.step_timeout_seconds + rollout.startup_timeout_seconds "
            f"({rollout.step_timeout_seconds + rollout.startup_timeout_seconds:g}), since other ranks wait meanwhile: "
            "raise it"
        )
    if rollout.replay is None:
        _check_weight_sync(config)
    evaluation = config.evaluation
    if rollout.replay is not None and (evaluation.before or evaluation.after or evaluation.every):
        raise ConfigError(
            "rollout.replay starts no server to evaluate with: write evaluation.before=false evaluation.after=false "
            "evaluation.every=0"
        )
    for k in config.evaluation.ks:
        if not 1 <= k <= config.evaluation.samples:
            raise ConfigError(
                f"evaluation.ks: Pass@{k} needs 1 <= k <= evaluation.samples={config.evaluation.samples}: raise "
                "samples or drop it"
            )
    if (
        config.model.path is None
        and not config.model.architecture
        and config.model.tiny.max_position_embeddings < rollout.max_prompt_tokens + rollout.max_new_tokens
    ):
        raise ConfigError(
            "rollout.max_prompt_tokens + rollout.max_new_tokens = "
            f"{rollout.max_prompt_tokens + rollout.max_new_tokens} exceed "
            f"model.tiny.max_position_embeddings={config.model.tiny.max_position_embeddings}: lower them or raise it"
        )
    if evaluation.nemo_skills != "none" and evaluation.nemo_skills_python is None:
        raise ConfigError(
            f"evaluation.nemo_skills={evaluation.nemo_skills} runs in an environment of its own: name its interpreter "
            "in evaluation.nemo_skills_python"
        )
    for name in ("train", "heldout"):
        source = getattr(config.data, name)
        if evaluation.benchmarks and source.path is None and source.generator is None:
            continue  # they are what is evaluated; whoever wants to train without data is told when it is read
        if (source.path is None) == (source.generator is None):
            raise ConfigError(
                f"data.{name}: give either data.{name}.path or data.{name}.generator, and not both; dasd evaluate "
                "needs neither with evaluation.benchmarks=[...]"
            )
        if source.size is not None and source.size < 1:
            raise ConfigError(f"data.{name}.size={source.size}: must be at least 1")
        if source.generator is not None and source.size is None:
            raise ConfigError(
                f"data.{name}.size is required with data.{name}.generator: write how many problems to generate"
            )


def _check_fp8(config: Config) -> None:
    """Cross-checks of FP8; whether the GPU can do it, the backend says. See :class:`ConfigError`."""
    precision, name = config.precision, f"precision.fp8={config.precision.fp8}"
    ends = precision.bf16_first_layers + precision.bf16_last_layers
    if precision.fp8 == "none":
        if ends:
            raise ConfigError(
                "precision.bf16_first_layers and bf16_last_layers say which layers FP8 leaves out, and "
                "precision.fp8=none uses none: choose a recipe, or leave them out"
            )
        return
    if config.backend.kind != "cuda" or config.backend.transformer_impl == "local":
        raise ConfigError(
            f"{name} needs a GPU and Transformer Engine: write backend.kind=cuda "
            "backend.transformer_impl=transformer_engine, or precision.fp8=none"
        )
    if precision.params_dtype != "bf16":
        raise ConfigError(
            f"{name} needs precision.params_dtype=bf16 for all that is not FP8: write it, or precision.fp8=none"
        )
    if precision.fp8 == "delayed" and ends:
        raise ConfigError(
            f"{name} scales all layers together: write 0 for precision.bf16_first_layers and "
            "precision.bf16_last_layers, or tensorwise"
        )


def _check_parallel(config: Config) -> None:
    """Cross-checks of how the model is spread; see :class:`ConfigError`."""
    parallel = config.parallel
    if parallel.context_parallel_size > 1 and (
        config.backend.kind == "cpu" or config.backend.transformer_impl == "local"
    ):
        raise ConfigError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} needs Transformer Engine's attention on "
            "GPUs: set backend.kind=cuda and backend.transformer_impl=transformer_engine, or write 1"
        )
    for name in ("first_pipeline_num_layers", "last_pipeline_num_layers"):
        if getattr(parallel, name) is not None and parallel.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"parallel.{name} needs parallel.pipeline_model_parallel_size > 1: raise it, or write null"
            )
    if parallel.overlap_param_gather and not (config.optimizer.distributed and parallel.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs optimizer.distributed=true and "
            "parallel.overlap_grad_reduce=true: set them, or write false"
        )
    if parallel.bucket_size is not None and not parallel.overlap_grad_reduce:
        raise ConfigError(
            f"parallel.bucket_size={parallel.bucket_size} is for parallel.overlap_grad_reduce=true: set that, or "
            "write null"
        )
    modules = config.precision.recompute_modules
    if not modules or set(modules) - {"core_attn", "mlp"}:
        raise ConfigError(f"precision.recompute_modules={modules}: write [mlp], [core_attn] or [mlp,core_attn]")


def _check_health(config: Config) -> None:
    """Cross-checks of reasoning health and of the watch; see :class:`ConfigError`."""
    for name in ("health.epistemic_words", "health.correction_phrases"):
        for phrase in _value(config, name):
            if not re.search(r"\w", phrase):
                raise ConfigError(f"{name}: {phrase!r} holds no word: leave it out")
    bins = config.health.position_bins
    if bins != sorted(set(bins)) or any(edge < 1 for edge in bins):
        raise ConfigError(f"health.position_bins={bins}: write ascending positions of at least 1, like [16,64,256]")
    for name in ("watch.act_on", "watch.ignore"):
        for condition in _value(config, name):
            if condition not in WATCH_CONDITIONS:
                raise ConfigError(
                    f"{name}: {condition!r} is not watched for: write some of {', '.join(WATCH_CONDITIONS)}"
                )


def stage_layers(parallel: ParallelConfig, num_layers: int, source: str = "num_hidden_layers") -> list[int]:
    """Layers of each pipeline stage, over all its chunks; :class:`ConfigError` where they do not come out whole.

    ``source``: what says the number of layers, for the message.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.first_pipeline_num_layers, parallel.last_pipeline_num_layers
    if first is None and last is None and num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size = {stages} does not divide {source}: write a divisor of it, or "
            "give the first or last stage another number by parallel.first_pipeline_num_layers or "
            "last_pipeline_num_layers"
        )
    middle = stages - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    if left < middle or (left % middle if middle else left):
        raise ConfigError(
            f"parallel.first_pipeline_num_layers={first} and last_pipeline_num_layers={last} leave {left} layers of "
            f"{source} to {middle} other pipeline stages: each needs the same number of them, and at least one"
        )
    layers = [left // middle if middle else 0] * stages
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    for count in layers:
        if count % chunks:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size={chunks} does not divide the {count} layers of a "
                f"stage ({source}): write a divisor of them"
            )
    return layers


def check_servers(rollout: RolloutConfig) -> None:
    """Refuse external servers that are named in no way or in two, or in a way that cannot be meant; see
    :class:`ConfigError`."""
    named = {"rollout.servers": rollout.servers, "rollout.nodes": rollout.nodes, "rollout.router": rollout.router}
    given = [name for name, value in named.items() if value]
    if rollout.engine == "external" and not given and rollout.replay is None:
        raise ConfigError(
            "rollout.engine=external needs rollout.servers=[http://host:port,...], rollout.nodes or rollout.router, "
            "or write rollout.engine=embedded"
        )
    if rollout.engine != "external" and given:
        raise ConfigError(
            f"{given[0]} is set but rollout.engine={rollout.engine} starts its own: write rollout.engine=external, or "
            "leave it out"
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are set: name the servers in one way, and leave the others out")
    for name, addresses in {
        "rollout.servers": rollout.servers,
        "rollout.router": [rollout.router] if rollout.router else [],
    }.items():
        for address in addresses:
            if "@" in address:
                raise ConfigError(
                    f"{name}: an address with a user or password would stand in config.yaml and in logs: leave that out"
                )
            if not re.fullmatch(r"https?://[^/\s]+", address):
                raise ConfigError(
                    f"{name}: {address!r} is not an address: write it like http://10.0.0.1:30000, without a path"
                )
    if len(set(rollout.servers)) < len(rollout.servers):
        raise ConfigError("rollout.servers names one server twice: name each once")
    if rollout.nodes and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*", rollout.nodes):
        raise ConfigError(f"rollout.nodes={rollout.nodes!r} is not a Slurm host list: write it like gpu[01-04,07]")
    if rollout.nodes and not 1 <= rollout.port <= 65536 - rollout.servers_per_node:
        raise ConfigError(
            f"rollout.nodes: rollout.port={rollout.port} is not the first of "
            f"rollout.servers_per_node={rollout.servers_per_node} ports: write the first one that the servers of a "
            "node listen on, like rollout.port=30000"
        )
    if rollout.servers_per_node > 1 and not rollout.nodes:
        raise ConfigError(
            f"rollout.servers_per_node={rollout.servers_per_node} is for rollout.nodes: set these, or leave it out"
        )


def _check_weight_sync(config: Config) -> None:
    """Cross-checks of how servers get their weights; see :class:`ConfigError`."""
    rollout, way = config.rollout, config.rollout.weight_sync
    others = [server for server in rollout.servers if not is_loopback(urlsplit(server).hostname or "")]
    far = others + [one for one in (rollout.nodes, rollout.router) if one]
    if way == "tensor" and far:
        raise ConfigError(
            f"rollout.weight_sync=tensor needs servers on the trainer's machine, not {far[0]}: give rollout.servers "
            "like http://127.0.0.1:30000, or write distributed"
        )
    if rollout.release_memory and far:
        raise ConfigError(
            f"rollout.release_memory=true is for servers on the trainer's machine, not {far[0]}: write false"
        )
    on_gpu = config.backend.kind == "cuda"
    if way != "disk":
        if rollout.engine == "embedded" and on_gpu:
            what = "over NCCL" if way == "distributed" else "out of GPU memory"
            raise ConfigError(
                f"rollout.weight_sync={way} {what} needs servers on GPUs: write rollout.engine=sglang or external, or "
                "disk"
            )
        if way == "tensor" and rollout.engine == "sglang" and on_gpu != (rollout.sglang.backend == "cuda"):
            raise ConfigError(
                f"rollout.weight_sync=tensor shares memory of one kind: backend.kind={config.backend.kind} needs "
                f"rollout.sglang.backend={config.backend.kind}, or write disk"
            )
        if rollout.engine == "sglang" and rollout.sglang.data_parallel_size > 1:
            raise ConfigError(
                f"rollout.weight_sync={way} does not reach the replicas behind rollout.sglang.data_parallel_size="
                f"{rollout.sglang.data_parallel_size}: write 1 and start more servers, or weight_sync=disk"
            )
    if config.backend.timeout_seconds <= 4 * rollout.weight_sync_timeout_seconds:
        raise ConfigError(
            "backend.timeout_seconds must exceed four times "
            f"rollout.weight_sync_timeout_seconds={rollout.weight_sync_timeout_seconds:g}, since other ranks wait "
            "while a group is made and a server found to be gone: raise the one or lower the other"
        )
    sglang = rollout.sglang
    if (
        rollout.verify_weights
        and rollout.engine == "sglang"
        and (sglang.quantization or sglang.tensor_parallel_size > 1)
    ):
        raise ConfigError(
            "rollout.verify_weights compares whole tensors of the trainer's own values: write 0, or "
            "rollout.sglang.quantization=null and rollout.sglang.tensor_parallel_size=1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from its own machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_trackers(logging: LoggingConfig) -> None:
    """Refuse loggers whose library is not installed here."""
    for wanted, field_value, module, extra in (
        (logging.wandb != "none", f"logging.wandb={logging.wandb}", "wandb", "wandb"),
        (logging.mlflow, "logging.mlflow=true", "mlflow", "mlflow"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f'{field_value}, but {module} is not installed: pip install "dasd-megatron[{extra}]", or leave it out'
            )
    if logging.mlflow_uri is not None and urlsplit(logging.mlflow_uri).password is not None:
        raise ConfigError(
            "logging.mlflow_uri holds a password, which would be saved with the run: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )


def check_paths(config: Config) -> None:
    """Refuse files and directories that do not exist; see :class:`ConfigError`. Templates may be shipped ones: their
    renderer looks."""
    for name in (
        "model.path",
        "data.train.path",
        "data.heldout.path",
        "rollout.replay",
        "evaluation.nemo_skills_python",
    ):
        path = _value(config, name)
        if path is not None and not os.path.exists(path):
            raise ConfigError(f"{name}={path}: no such file or directory")
    if config.resume not in ("none", "auto") and not os.path.isdir(config.resume):
        raise ConfigError(f"resume={config.resume}: write none, auto or the path of a checkpoint directory")
