"""Sections of the configuration that the trainer reads: layout, model, method, loss, batch and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dasd_megatron.algorithms.gates import PUSH_GATES
from dasd_megatron.algorithms.methods import (
    DISTRIBUTIONAL,
    ENTROPY_FLOOR,
    METHODS,
    NO_GATE,
    OBJECTIVES,
    QUANTILE_SIDES,
    MethodSettings,
)
from dasd_megatron.config.fields import REQUIRED, setting
from dasd_megatron.config.schedules import ScheduleConfig
from dasd_megatron.errors import enumerate_names
from dasd_megatron.losses.divergences import DIVERGENCES
from dasd_megatron.losses.surrogates import AGGREGATIONS, REJECTIONS, SURROGATES, Aggregation, Surrogate

DECAY_STYLES = ("constant", "linear", "cosine")
"""Courses of the learning rate after the warm-up."""

SCHEDULED_SETTINGS = ("beta", "rho", "divergence_weight", "rlsd_lambda")
"""Settings of algorithm that may change over training, each by the schedule of its name."""

PRIVILEGED_SOURCES = ("solution", "hint", "answer", "peer", "feedback", "unpaired")
"""Sources of the text that the teacher is shown beside the problem."""
ARISING_SOURCES = frozenset({"peer", "feedback"})
"""Those whose texts arise in the run, and are not known before it."""


def _describe_divergences() -> str:
    notes = [f"{name}, {divergence.note}" if divergence.note else name for name, divergence in DIVERGENCES.items()]
    return _join_choices(notes)


def _describe_formulas(table: Mapping[str, Surrogate] | Mapping[str, Aggregation]) -> str:
    return _join_choices([f"{name}, {record.formula}" for name, record in table.items()])


def _join_choices(choices: list[str]) -> str:
    return "; ".join([*choices[:-1], f"or {choices[-1]}"])


def _describe_defaults(field: str) -> str:
    return ", ".join(f"{getattr(surrogate, field):g} under {name}" for name, surrogate in SURROGATES.items())


def _describe_bounds(side: str) -> str:
    return ", ".join(f"{getattr(level.bounds, side):g} under {name}" for name, level in REJECTIONS.items())


@dataclass
class ParallelConfig:
    """The spread of the model and the batch over processes."""

    tensor_model_parallel_size: int = setting(1, "TP: ranks that share each layer", low=1)
    pipeline_model_parallel_size: int = setting(1, "PP: ranks that share the stack of layers", low=1)
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "VPP: model chunks on each pipeline rank; null: 1F1B without interleaving", low=2
    )
    data_parallel_size: int = setting(1, "DP: replicas; the number of processes is TP x CP x PP x DP", low=1)
    sequence_parallel: bool = setting(
        False, "shard activations between tensor-parallel regions along the sequence; needs TP > 1"
    )
    context_parallel_size: int = setting(
        1, "CP: ranks that share each sequence; above 1 it needs a GPU and Transformer Engine", low=1
    )
    first_pipeline_num_layers: int | None = setting(
        None,
        "layers of the first pipeline stage, over all its chunks; null: as many as the stages in the middle",
        low=1,
    )
    last_pipeline_num_layers: int | None = setting(
        None,
        "layers of the last pipeline stage, which also has the LM head and the loss; null: as many as the stages "
        "in the middle",
        low=1,
    )
    overlap_grad_reduce: bool = setting(
        False, "reduce gradients over replicas bucket by bucket during the last backward pass"
    )
    overlap_param_gather: bool = setting(
        False,
        "gather updated weights from the replicas bucket by bucket during the next minibatch's forward pass; needs "
        "optimizer.distributed and overlap_grad_reduce",
    )
    bucket_size: int | None = setting(
        None,
        "overlap only: parameters that are reduced and gathered at once; null: Megatron's max(40e6, 1e6 x DP)",
        low=1,
    )

    @property
    def replica_size(self) -> int:
        """Processes of one replica."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def world_size(self) -> int:
        """Processes of all replicas."""
        return self.replica_size * self.data_parallel_size


@dataclass
class TinyModelConfig:
    """Sizes of the model that is made in code."""

    hidden_size: int = setting(192, "width", low=1)
    num_layers: int = setting(2, "transformer layers", low=1)
    num_attention_heads: int = setting(4, "query heads", low=1)
    num_key_value_heads: int = setting(2, "key/value heads", low=1)
    head_dim: int = setting(48, "width of one head", low=1)
    intermediate_size: int = setting(704, "width of the SwiGLU feed-forward", low=1)
    max_position_embeddings: int = setting(256, "longest sequence, tokens", low=1)


@dataclass
class ModelConfig:
    """The model that the run begins from."""

    path: str | None = setting(
        None,
        "Hugging Face directory (config.json, tokenizer, safetensors) or checkpoint from `dasd convert`; null: make "
        "a tiny Qwen3 with random weights from model.tiny",
    )
    architecture: dict[str, Any] = setting(
        {},
        "sizes of a preset, named as in config.json: `dasd plan` reads them where model.path is null, and "
        "config.json of model.path must agree",
    )
    tiny: TinyModelConfig = setting(TinyModelConfig, "architecture of the model made in code when model.path is null")


@dataclass
class PrecisionConfig:
    """Number formats and recomputation in training."""

    params_dtype: str = setting(
        "fp32",
        "fp32 or bf16: weights and activations in training; statistics, optimizer state and gradients stay fp32",
        choices=("fp32", "bf16"),
    )
    recompute: str = setting(
        "none",
        "activations computed again in the backward pass: none, selective (those of recompute_modules) or full "
        "(whole layers)",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = setting(
        ["mlp"],
        "recompute=selective, of each layer: mlp (most of its activations) and core_attn (little to gain, since it "
        "is fused)",
    )
    fp8: str = setting(
        "none",
        "none, or Transformer Engine's recipe for the matrix products of the layers: delayed, tensorwise, blockwise "
        "(from Hopper on) or mxfp8 (from Blackwell on). The LM head, the loss and its statistics stay in bf16 and "
        "float32",
        choices=("none", "delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_format: str = setting("hybrid", "hybrid (E4M3 forward, E5M2 backward) or e4m3", choices=("hybrid", "e4m3"))
    bf16_first_layers: int = setting(0, "under fp8, layers at the bottom of the model that stay in bf16", low=0)
    bf16_last_layers: int = setting(0, "under fp8, layers at the top of the model that stay in bf16", low=0)
    fp8_check_every: int = setting(
        20,
        "under fp8, steps between comparisons of its log-probs with those of bf16, on the first micro-batch of a "
        "step; 0: none",
        low=0,
    )
    fp8_max_diff: float = setting(
        0.1, "mean difference in that comparison, nats a token, above which the run warns", low=0
    )


@dataclass
class AlgorithmConfig:
    """The method that makes an advantage of each token from rewards and the teacher."""

    name: str = setting("dasd", enumerate_names(METHODS, "or"), choices=tuple(METHODS))
    verifier_weight: float = setting(
        1.0, "weight of the group-relative verifier advantage; 0 trains on the teacher alone", low=0
    )
    normalize_std: bool = setting(True, "divide a group's centred rewards by their standard deviation")
    beta: float = setting(REQUIRED, "weight of the teacher term; our choice, no public value", low=0)
    rho: float = setting(0.2, "share of a rollout's tokens on the far side of the entropy threshold", low=0, high=1)
    quantile_side: str = setting(
        "upper",
        "upper: tau is the (1-rho)-quantile, so the most uncertain rho are pushed away (our choice); lower: tau is "
        "the rho-quantile",
        choices=QUANTILE_SIDES,
    )
    scale_floor: float = setting(
        REQUIRED, "least scale of the log-evidence gap in one rollout, nats; our choice, no public value", low=0
    )
    entropy_floor: float = setting(
        ENTROPY_FLOOR,
        "least entropy threshold tau, nats: a token of less entropy is never pushed away; our choice",
        low=0,
    )
    term_clip: float | None = setting(
        None,
        "sampled only: most that the teacher adds to or takes from the advantage of a token; null: no bound; our "
        "choice",
        above=0,
    )
    push_gate: str = setting(
        NO_GATE,
        "what scales the pushes away from the teacher, to tell a choice from ignorance: none, or "
        + "; ".join(f"{gate.name} ({gate.description})" for gate in PUSH_GATES.values()),
        choices=(NO_GATE, *PUSH_GATES),
    )
    push_gate_pulls: bool = setting(
        False, "with a push_gate: a push that it is against becomes a pull, by 2 g - 1 in place of its factor g"
    )
    gate: bool = setting(True, "multiply the direction by the reliability gate sigmoid(|delta_bar| - 1)")
    rlsd_lambda: float = setting(
        0.5,
        "rlsd and rlrt only: share of the verifier advantage that the teacher scales; the rest stays as it is",
        low=0,
        high=1,
    )
    rlsd_clip: float = setting(
        0.2, "rlsd and rlrt only: the teacher scales that share by at most 1 +/- this", low=0, high=1
    )
    srpo_beta: float = setting(
        1.0, "srpo only: a token's weight falls by exp(-this) with each nat of the teacher's entropy", low=0
    )
    antisd_warmup_steps: int = setting(
        5,
        "antisd only: first steps, in which the teacher does not act and its entropy is measured, to compare with",
        low=1,
    )
    antisd_off_share: float = setting(
        0.93,
        "antisd only: the teacher stops to act when its entropy falls below this share of that, and goes on when it "
        "is back there",
        low=0,
        high=1,
    )
    position_w_min: float = setting(0.25, "pw_opsd only: weight that the earliest tokens come close to", low=0, high=1)
    position_tau: float = setting(
        0.3, "pw_opsd only: place in the response, from 0 to 1, at which half of the rise is done", low=0, high=1
    )
    position_s: float = setting(0.1, "pw_opsd only: width of the rise, in shares of the response", above=0)
    objective: str = setting(
        "sampled",
        "sampled: the teacher acts through the advantage of the sampled token; distributional: through a divergence "
        "over the full vocabulary, weighted by omega, beside the verifier's surrogate",
        choices=OBJECTIVES,
    )
    divergence: str = setting(
        "reverse_kl",
        f"distributional only: {_describe_divergences()}",
        choices=tuple(DIVERGENCES),
    )
    divergence_weight: float = setting(
        0.1, "distributional only: weight of the divergence term; our choice, no public value", low=0
    )
    divergence_cap: float = setting(
        2.0,
        "distributional only: a token is not pushed away from the teacher beyond this divergence, nats; our choice",
        low=0,
    )
    divergence_pull_cap: float | None = setting(
        None,
        "distributional only: a token is not pulled toward the teacher while its divergence is beyond this, nats; "
        "null: no cap; our choice",
        above=0,
    )
    divergence_entry_clip: float | None = setting(
        None,
        "distributional only: most that one entry of the vocabulary adds to a token's divergence, nats; beyond it the "
        "entry has no gradient of its own; null: no bound. OPSD calls it jsd_token_clip and takes 0.05",
        above=0,
    )
    divergence_top_k: int | None = setting(
        None,
        "distributional only: compare the distributions on this many most probable entries of the vocabulary, and keep "
        "the teacher's log-probs of these instead of its states; null: the full vocabulary. SDPO takes 100",
        low=1,
    )
    divergence_top_k_of: str = setting(
        "teacher",
        "divergence_top_k only: whose most probable entries: teacher (as OPSD) or student (as SDPO), the policy that "
        "the step scores",
        choices=("teacher", "student"),
    )
    divergence_tail: bool = setting(
        True,
        "divergence_top_k only: the rest of the vocabulary is one more entry (as SDPO); false: both distributions are "
        "divided by their sum over the entries (as OPSD)",
    )
    jsd_weight: float = setting(0.5, "divergence=jsd only: weight of the student in the mixture", above=0, below=1)
    beta_schedule: ScheduleConfig = setting(ScheduleConfig, "course of beta over training")
    rho_schedule: ScheduleConfig = setting(ScheduleConfig, "course of rho over training")
    divergence_weight_schedule: ScheduleConfig = setting(ScheduleConfig, "course of divergence_weight over training")
    rlsd_lambda_schedule: ScheduleConfig = setting(ScheduleConfig, "course of rlsd_lambda over training")

    @property
    def schedules(self) -> dict[str, ScheduleConfig]:
        """The schedules of the settings that change over training, by the setting's name."""
        schedules = {name: getattr(self, f"{name}_schedule") for name in SCHEDULED_SETTINGS}
        return {name: schedule for name, schedule in schedules.items() if schedule.changes}

    def at(self, step: int, run_steps: int) -> AlgorithmConfig:
        """Return the section with the values that its scheduled settings have at a step, counted from 1, of a run of
        ``run_steps``."""
        values: dict[str, Any] = {
            name: schedule.value(getattr(self, name), step, run_steps) for name, schedule in self.schedules.items()
        }
        return dataclasses.replace(self, **values)

    def top_k_of(self, owner: str) -> int | None:
        """Return the number of ``owner``'s most probable entries that the divergence compares, None for none."""
        return self.divergence_top_k if self.divergence_top_k_of == owner else None

    @property
    def is_distributional(self) -> bool:
        """True where the teacher acts through a divergence, and not through the advantage."""
        return self.objective == DISTRIBUTIONAL

    @property
    def method_settings(self) -> MethodSettings:
        """The fields that the methods read."""
        return MethodSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MethodSettings)})


@dataclass
class TeacherConfig:
    """The self-teacher: its weights and what it is shown."""

    weights: str = setting(
        "live",
        "live (the current student), frozen (the student at step 0), ema (an average over the steps), snapshot (the "
        "student of some steps ago) or trust_region (a mixture of frozen and live)",
        choices=("live", "frozen", "ema", "snapshot", "trust_region"),
    )
    ema_decay: float = setting(
        0.99, "teacher.weights=ema: decay per training step, 1 minus the rate of an update", low=0, high=1
    )
    snapshot_every: int = setting(
        10, "teacher.weights=snapshot: the teacher takes the student's weights every this many steps", low=1
    )
    trust_region_mix: float = setting(
        0.05,
        "teacher.weights=trust_region: share of the live student's logits, the rest being those of the student at "
        "step 0",
        above=0,
        below=1,
    )
    # A list of names. One name stands for a list of it, and OmegaConf takes both for no narrower type.
    privileged: Any = setting(
        ["solution"],
        "what the teacher sees beside the problem, a list of which a sample gets the first that it has: solution, "
        "hint (its first part), answer (the final answer only), peer (a right response of the same group), feedback "
        "(what verify.reward says of the response, with the response), unpaired (another problem with its solution, "
        "as a control)",
    )
    hint_fraction: float = setting(
        0.5, "hint: share of the reference solution's characters that is shown", above=0, high=1
    )
    success_reward: float = setting(
        0.5, "reward from which a response counts as right: it can be a peer, and needs no feedback"
    )
    peer: str = setting(
        "shortest",
        "peer: the right response that is shown, of those that are not the sample itself: shortest (in tokens) or "
        "random (by the run's seed)",
        choices=("shortest", "random"),
    )
    remove_thinking: bool = setting(
        True,
        "peer and feedback: show of a response what is behind its last </think> alone, and nothing from a <think> on",
    )
    max_privileged_tokens: int = setting(
        10240,
        "peer and feedback: longest text, tokens. A longer peer is not shown; an attempt with feedback loses its "
        "beginning",
        low=1,
    )
    template: str | None = setting(
        None,
        "Jinja file or name of a shipped one for the teacher's message, with {{ problem }}, {{ privileged }} and, "
        "if wanted, {{ source }} (the name of the text's source); or module:function, which gets the Problem and the "
        "privileged text, and the source as source= if it has such a parameter; null: teacher.jinja",
    )

    def __post_init__(self) -> None:
        if isinstance(self.privileged, str):
            self.privileged = [self.privileged]

    def is_right(self, reward: float) -> bool:
        """Return whether a response of this reward counts as right."""
        return reward >= self.success_reward

    @property
    def has_arising_texts(self) -> bool:
        """True where the teacher may be shown a text that arises in the run."""
        return not ARISING_SOURCES.isdisjoint(self.privileged)


@dataclass
class PolicyLossConfig:
    """The policy loss and what happens when it is not finite."""

    surrogate: str = setting(
        "ppo",
        f"{_describe_formulas(SURROGATES)}; r is the ratio of the policy's probabilities, A the advantage",
        choices=tuple(SURROGATES),
    )
    clip_low: float | None = setting(
        None, f"clip below, ratio >= 1 - clip_low; null: {_describe_defaults('clip_low')}", low=0, high=1
    )
    clip_high: float | None = setting(
        None, f"clip above, ratio <= 1 + clip_high; null: {_describe_defaults('clip_high')}", low=0
    )
    dual_clip: float | None = setting(
        None, "surrogate=ppo only: bound on the surrogate at negative advantages, > 1; null: none", above=1
    )
    aggregation: str = setting(
        "token_mean",
        f"loss of a minibatch: {_describe_formulas(AGGREGATIONS)}",
        choices=tuple(AGGREGATIONS),
    )
    importance_sampling: str = setting(
        "none",
        "correct for the rollout engine's probabilities being others than the trainer's: none, token (each token's "
        "ratio) or sequence (the response's), truncated, on the surrogate alone",
        choices=("none", "token", "sequence"),
    )
    importance_cap: float = setting(2.0, "importance_sampling: largest ratio", above=0)
    rejection: str = setting(
        "none",
        "leave out what the rollout engine's probabilities differ too much for, from the whole loss and its means: "
        "none; token, by each token's ratio; or whole responses: sequence, by the product of their ratios, geometric, "
        "by their geometric mean",
        choices=("none", *REJECTIONS),
    )
    rejection_low: float | None = setting(
        None, f"rejection: least ratio that is kept; null: {_describe_bounds('low')}", low=0, high=1
    )
    rejection_high: float | None = setting(
        None, f"rejection: largest ratio that is kept; null: {_describe_bounds('high')}", low=1
    )
    rejection_veto: float | None = setting(
        None,
        "leave out every response with a token whose ratio is below this, like 1e-4, whatever rejection says; null: "
        "none",
        above=0,
        below=1,
    )
    kl_coef: float = setting(
        0.0, "weight of the KL penalty to the starting model (k3 estimator), per token; 0: the model is not kept", low=0
    )
    fused_linear: bool = setting(
        True,
        "token statistics straight from hidden states and LM head, block by block; false materialises all logits "
        "of a micro-batch",
    )
    block_tokens: int | None = setting(
        None, "fused_linear only: tokens of one block of logits; null: 1024 on a CPU, on a GPU by its memory", low=1
    )
    block_columns: int = setting(8192, "fused_linear only: vocabulary columns of one block of logits", low=1)
    keep_logits: bool = setting(
        True,
        "fused_linear only: a GPU keeps logits for the backward pass, up to 1/64 of its memory, in the model's dtype; "
        "false: project all of them again",
    )
    share_pass: str = setting(
        "auto",
        "auto: the update's own forward pass scores the rollouts where it can; never: a pass of its own before it does",
        choices=("auto", "never"),
    )
    max_skipped_steps: int = setting(
        3,
        "steps in a row with updates skipped, because logits or gradients are not finite, before the run goes back "
        "to the last good checkpoint, with problems that come after theirs",
        low=0,
    )
    max_rollbacks: int = setting(1, "times that a run goes back in this way; then it stops", low=0)

    @property
    def rejects(self) -> bool:
        """True where tokens or responses may be left out."""
        return self.rejection in REJECTIONS or self.rejection_veto is not None


@dataclass
class BatchConfig:
    """Rollouts of one step and their division into forward passes."""

    groups: int = setting(16, "prompts of one step", low=1)
    samples_per_group: int = setting(8, "rollouts of each prompt", low=1)
    minibatches: int = setting(1, "optimizer steps over one batch of rollouts", low=1)
    epochs: int = setting(1, "passes over one batch of rollouts", low=1)
    micro_batch_size: int = setting(16, "most sequences of one forward pass", low=1)
    micro_batch_tokens: int | None = setting(
        32768,
        "most tokens of one forward pass, padding included, so that long rollouts go in smaller groups, at least "
        "one; null: no limit",
        low=1,
    )
    packing: bool = setting(
        False,
        "lay the sequences of a micro-batch end to end instead of padding them to the longest; each attends to "
        "itself alone. Micro-batches then hold nearly equal numbers of tokens",
    )


@dataclass
class OptimizerConfig:
    """Adam and the learning rate."""

    # Adam moves every weight by about the rate in a step. At 1 nothing of a model is left after one.
    lr: float = setting(REQUIRED, "peak learning rate", low=0, high=1)
    min_lr: float = setting(0.0, "learning rate at the end of the decay", low=0, high=1)
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0)
    decay_style: str = setting("constant", "constant, linear or cosine", choices=DECAY_STYLES)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0)
    adam_beta1: float = setting(0.9, "Adam's first-moment decay", low=0, below=1)
    adam_beta2: float = setting(0.95, "Adam's second-moment decay", low=0, below=1)
    adam_eps: float = setting(1e-8, "Adam's epsilon", low=0)
    clip_grad: float = setting(1.0, "gradients are scaled to at most this global L2 norm", low=0)
    distributed: bool = setting(True, "shard optimizer state over data-parallel ranks")


@dataclass
class WarmStartConfig:
    """Supervised fine-tuning before reinforcement."""

    steps: int = setting(0, "steps of supervised fine-tuning before reinforcement; 0: none", low=0)
    path: str | None = setting(
        None,
        "file of examples, each with a response and its prompt, in place of the training problems and their reference "
        "solutions; see docs/running.md",
    )
    batch_size: int = setting(64, "examples of one step", low=1)
    micro_batch_size: int | None = setting(None, "sequences of one forward pass; null: batch.micro_batch_size", low=1)
    lr: float = setting(1e-3, "peak learning rate, after a linear warm-up", low=0, high=1)
    decay_style: str = setting(
        "cosine", "constant, linear or cosine; the last two end at a tenth of the peak", choices=DECAY_STYLES
    )
    warmup_steps: int = setting(20, "steps of linear warm-up", low=0)
    hidden_dropout: float = setting(
        0.0, "share of the hidden states that is dropped; reinforcement drops none", low=0, high=1, below=1
    )
    privileged_share: float | None = setting(
        None,
        "share of examples whose prompt shows the reference solution, so that the self-teacher can use it; null: 0.5. "
        "Not with warm_start.path, whose rows have prompts of their own",
        low=0,
        high=1,
    )


@dataclass
class CheckpointConfig:
    """Times at which checkpoints and exports are written, and how long they are kept."""

    every: int = setting(10, "steps between checkpoints; 0: only at the end and on failure", low=0)
    keep_last: int = setting(2, "checkpoints to keep", low=1)
    keep_every: int = setting(
        0, "checkpoints whose step is a multiple of this are kept for good, beside keep_last; 0: none", low=0
    )
    async_save: bool = setting(True, "a process of its own writes and hashes the files while training goes on")
    export_every: int = setting(
        0,
        "beside checkpoints whose step is a multiple of this, the model as a Hugging Face directory step_<n>.hf, "
        "kept for good; 0: none",
        low=0,
    )
    grace_seconds: float = setting(
        300.0,
        "limit for saving and ending after SIGTERM or SIGUSR1, seconds; then the processes are killed, and the "
        "last checkpoint holds",
        low=1,
    )
