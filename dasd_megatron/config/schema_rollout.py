"""Sections of the configuration for rollouts, problems, grading and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dasd_megatron.config.fields import REQUIRED, setting
from dasd_megatron.weight_ways import WEIGHT_FORMAT_NAMES, WEIGHT_WAYS


@dataclass
class SGLangConfig:
    """The SGLang server that the trainer starts."""

    backend: str = setting("cuda", "cuda or cpu", choices=("cuda", "cpu"))
    python: str | None = setting(
        None,
        "Python interpreter of the environment that SGLang is installed in, like .venv-sglang/bin/python; null: "
        "this one",
    )
    tensor_parallel_size: int = setting(1, "GPUs that share each replica of the model", low=1)
    data_parallel_size: int = setting(1, "replicas behind the server's one address", low=1)
    mem_fraction_static: float | None = setting(
        None, "share of GPU memory for weights and key-value cache; null: SGLang's choice", low=0.01, high=0.99
    )
    max_total_tokens: int | None = setting(None, "tokens in the key-value cache; null: SGLang's choice", low=1)
    context_length: int | None = setting(None, "longest prompt and response together, tokens; null: the model's", low=1)
    quantization: str | None = setting(None, "quantisation of the served weights, like fp8; null: none")
    arguments: list[str] = setting([], "further arguments of sglang.launch_server, like [--enable-metrics]")


@dataclass
class RolloutConfig:
    """Rollout servers, sampling, and how the servers get their weights."""

    engine: str = setting(
        "embedded",
        "embedded or sglang (the trainer starts one server on this machine), or external (those that "
        "rollout.servers, rollout.nodes or rollout.router name)",
        choices=("embedded", "sglang", "external"),
    )
    sglang: SGLangConfig = setting(SGLangConfig, "rollout.engine=sglang only")
    servers: list[str] = setting(
        [], "addresses of SGLang-compatible servers for rollout.engine=external, like http://10.0.0.1:30000"
    )
    nodes: str | None = setting(
        None,
        "instead of rollout.servers, the Slurm host list of the nodes that they run on, like gpu[01-04,07] or "
        "${oc.env:SLURM_JOB_NODELIST_HET_GROUP_1}; scontrol expands it",
    )
    servers_per_node: int = setting(
        1, "rollout.nodes only: servers on each node, at consecutive ports from rollout.port on", low=1
    )
    router: str | None = setting(
        None,
        "instead of rollout.servers, the address of an sglang-router, like http://10.0.0.1:30000: it gets the "
        "sampling requests, one row each, and the servers that it lists get the weights",
    )
    host: str = setting("127.0.0.1", "address that the trainer's own server listens on")
    port: int = setting(
        0,
        "port of the trainer's own server, 0: any free one; with rollout.nodes the first port on each node",
        low=0,
        high=65535,
    )
    threads: int = setting(2, "CPU threads of the trainer's own server", low=1)
    device: str = setting(
        "auto",
        "device of the embedded server. auto: that of backend.kind; cuda: a GPU that no training process has, or else "
        "the first one, shared with the trainer; cpu",
        choices=("auto", "cpu", "cuda"),
    )
    cache_gib: float | None = setting(
        None,
        "memory of the embedded server for keys and values, GiB; null: half of what its device has free at its start",
        low=1e-3,
        high=1 << 20,
    )
    dtype: str = setting(
        "float32", "float32 or bfloat16: the weights of the trainer's own server", choices=("float32", "bfloat16")
    )
    weight_format: str = setting(
        "plain",
        "form in which servers get the weights. plain: the trainer's own values; fp8_blockwise: linear layers in FP8 "
        "(e4m3), with a scale for each block of 128 x 128, as in SGLang's FP8 checkpoints; needs SGLang on GPUs",
        choices=WEIGHT_FORMAT_NAMES,
    )
    max_batch_size: int = setting(256, "sequences that the trainer's own server decodes at once", low=1)
    deterministic: bool = setting(
        True,
        "equal seeds give equal rollouts. embedded: one request is one decoding batch, so concurrent requests are "
        "not merged; sglang: --enable-deterministic-inference, without which it heeds no seed and is faster",
    )
    groups_per_request: int = setting(16, "prompts in one HTTP request", low=1)
    temperature: float = setting(1.0, "sampling temperature; training scores at the same one", low=1e-3)
    top_p: float = setting(1.0, "nucleus sampling; values under 1 bias the importance ratio", low=1e-6, high=1)
    top_k: int = setting(-1, "top-k sampling; -1: off", low=-1)
    max_new_tokens: int = setting(REQUIRED, "longest response, tokens", low=1)
    max_prompt_tokens: int = setting(
        REQUIRED,
        "longest prompt, the privileged one included, tokens; longer prompts are refused before the run starts",
        low=1,
    )
    max_staleness: int = setting(
        0,
        "training steps that the weights behind a rollout may be older than those that it trains. 0: on-policy, "
        "rollouts and updates take turns; 1: the next step's rollouts are sampled while this one trains; "
        "loss.importance_sampling corrects for it",
        low=0,
    )
    unfinished: str = setting(
        "finish",
        "what becomes of rollouts in flight when their step is complete or the weights change. finish: they are "
        "waited for; abort: they are broken off, and their prompts come first in the next step; retract: they go on "
        "under the new weights (needs max_staleness>0)",
        choices=("finish", "abort", "retract"),
    )
    over_sampling: float = setting(
        1.0,
        "prompts that are started, as a multiple of those that are missing from a step; at least 1",
        low=1,
        high=100,
    )
    filter: str | None = setting(
        None,
        "module:function that says of a group (a list of dasd_megatron.samples.Sample) whether it is trained "
        "on; other prompts take the place of those refused. dasd_megatron.rollout.filters:rewards_differ drops "
        "groups without advantage; null: all",
    )
    filter_limit: float = setting(
        4.0, "groups that the filter may refuse in a step, in multiples of batch.groups, before these are used", low=0
    )
    function: str | None = setting(
        None,
        "module:function, async, that samples the responses to one prompt in its own way, by requests to the "
        "servers; gets a dasd_megatron.rollout.collector.RolloutRequest and a function to generate with; null: one "
        "completion each",
    )
    weight_sync: str = setting(
        "disk",
        "; ".join(f"{way.name}: {way.description}" for way in WEIGHT_WAYS.values()),
        choices=tuple(WEIGHT_WAYS),
    )
    weight_bucket_bytes: int = setting(
        512 * 2**20,
        "weight_sync=distributed and tensor: bytes sent at once; a sending rank has two buckets in memory, one travels "
        "while the next is gathered",
        low=1,
    )
    weight_sync_timeout_seconds: float = setting(
        300.0,
        "limit of each request of a weight sync; of the start of the groups, and of the broadcasts that follow one "
        "another, twice that",
        low=0.1,
    )
    verify_weights: int = setting(
        0,
        "parameters, other ones each time, whose checksums on the servers are compared with the trainer's after "
        "every weight sync; 0: none",
        low=0,
    )
    release_memory: bool = setting(
        False,
        "servers on the trainer's devices, of one machine or of several, give the memory of weights and key-value "
        "cache back while the trainer computes; external ones have to run with --enable-memory-saver. What the trainer "
        "gives them while they sample is backend.offload",
    )
    max_log_prob_diff: float | None = setting(
        1.0,
        "mean difference between the servers' log-probs and the trainer's of one step, nats a token, above which the "
        "run stops before it trains on them: another model, or weights that did not arrive; null: no limit",
        low=0,
    )
    connect_timeout_seconds: float = setting(5.0, "limit for opening a connection", low=0.1)
    request_timeout_seconds: float = setting(120.0, "limit for one request's answer", low=0.1)
    step_timeout_seconds: float = setting(
        900.0,
        "limit for all rollouts of one step, retries included; an evaluation within training ends where no request has "
        "been answered for so long",
        low=1,
    )
    startup_timeout_seconds: float = setting(120.0, "limit for a server to become healthy", low=1)
    max_retries: int = setting(3, "further tries of a failed request", low=0)
    backoff_seconds: float = setting(0.5, "wait before the first retry; doubles each time", low=0)
    max_in_flight: int = setting(64, "requests under way at once", low=1)
    max_restarts: int = setting(
        3,
        "times in one run that a failed step is tried again: the trainer's own server is started anew, or others "
        "are back by then",
        low=0,
    )
    replay: str | None = setting(
        None, "folder of saved rollouts (<run>/rollouts); the trainer reads them instead of asking a server"
    )


@dataclass
class DataSourceConfig:
    """One set of problems: a file or a generator."""

    path: str | None = setting(
        None,
        "problem file: JSON lines, a JSON array or Parquet, also gzipped; or a folder of such, or a pattern like "
        "data/train-*.parquet",
    )
    generator: str | None = setting(
        None, "instead of a path, a reasoning-gym dataset with worked solutions: chain_sum, countdown or gsm_symbolic"
    )
    generator_args: dict[str, Any] = setting(
        {}, "arguments of the reasoning-gym dataset, like {min_terms: 2, max_digits: 1}"
    )
    size: int | None = setting(None, "problems to take from the head of the file, or to generate; null: the whole file")
    seed: int = setting(0, "seed of the generator")
    problem_field: str | None = setting(
        None,
        "field of the problem's text, or of chat messages; a point leads into an object, like extra_info.question; "
        "null: the usual names",
    )
    answer_field: str | None = setting(
        None,
        "field of the final answer, or of a list of several; null: the usual names; where it is absent, the solution's "
        "'#### 72' or box gives the answer",
    )
    solution_field: str | None = setting(None, "field of the worked solution; null: the usual names")
    no_answer: list[str] = setting(
        ["proof", "notfound", "not found", "n/a", "none", "null", "nan"],
        "words that stand for a missing answer, in any case; such a problem is refused",
    )


@dataclass
class DataConfig:
    """Problems to train on and to evaluate on, and the student's prompt."""

    train: DataSourceConfig = setting(DataSourceConfig, "problems to train on")
    heldout: DataSourceConfig = setting(
        DataSourceConfig, "problems to evaluate on; any that also stand in the training set are refused"
    )
    template: str | None = setting(
        None,
        "Jinja file or name of a shipped one for the student's user message, with {{ problem }}; or module:function, "
        "which gets the dasd_megatron.data.prompts.Problem without its answer and solution and returns the message "
        "as text or chat messages; null: the problem as it is",
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {},
        "further variables of the tokenizer's chat template, for student and teacher, like {enable_thinking: false} "
        "for Qwen3; values as in JSON",
    )
    date: str | None = setting(
        None,
        "the day that a chat template with strftime_now shows as today's, like 2026-11-29; null: the day on which the "
        "run began, which stays the same when it goes on",
    )
    shuffle: bool = setting(True, "a new order of the training problems each epoch")


@dataclass
class VerifyConfig:
    """Grading of responses."""

    workers: int = setting(2, "processes that grade answers by algebra; 0 grades by text and numbers alone", low=0)
    timeout_seconds: float = setting(
        2.5, "limit for one answer; beyond it the grader is killed and the reward is 0", low=0.1
    )
    max_answer_chars: int = setting(512, "longer answers get reward 0 ungraded", low=1)
    reward: str | None = setting(
        None,
        "module:function that gives the reward of a dasd_megatron.samples.Sample, whose own is 1 or 0; above "
        "0 counts as right in evaluation; null: 1 or 0",
    )
    measures: str | None = setting(
        None,
        "module:function that gets a graded dasd_megatron.samples.Sample and returns named numbers, like "
        "{'thinks': 1}; their means over the responses that have them are measure/... in the metrics; null: none",
    )
    truncated_is_wrong: bool = setting(
        False,
        "responses that rollout.max_new_tokens cut short get reward 0 ungraded, so that going on behind the "
        "answer does not pay",
    )


@dataclass
class EvaluationConfig:
    """Evaluation within training and by `dasd evaluate`."""

    before: bool = setting(True, "evaluate before the first step")
    after: bool = setting(True, "evaluate after the last step")
    every: int = setting(0, "evaluate every so many steps; 0: never", low=0)
    samples: int = setting(16, "responses per problem (the 16 of Avg@16)", low=1)
    ks: list[int] = setting([1, 2, 4, 8, 16], "the k of Pass@k")
    temperature: float = setting(1.0, "sampling temperature of evaluation", low=0)
    top_p: float = setting(1.0, "nucleus sampling of evaluation", low=1e-6, high=1)
    benchmarks: list[str] = setting(
        [],
        "dasd evaluate only: names of benchmarks, like [gsm8k,math-500], and paths of problem files, one problem a "
        "line; []: data.heldout",
    )
    data_dir: str = setting("data", "dasd evaluate only: folder of the benchmarks, as <name>/test.jsonl")
    size: int | None = setting(
        None, "dasd evaluate only: problems to take from the head of each benchmark; null: all", low=1
    )
    samples_per_request: int | None = setting(
        None,
        "dasd evaluate only: samples in one HTTP request, which come back and are saved together; null: as many as "
        "in training",
        low=1,
    )
    confidence: float = setting(0.95, "dasd evaluate only: level of the confidence intervals", low=0.5, high=0.9999)
    bootstrap_resamples: int = setting(
        1000, "dasd evaluate only: drawings of problems behind the confidence intervals", low=1, high=1_000_000
    )
    nemo_skills: str = setting(
        "none",
        "dasd evaluate only: none; grade (NeMo-Skills grades the same responses, and differences are listed); eval "
        "(NeMo-Skills' own `ns eval` also asks the servers, by its own prompts)",
        choices=("none", "grade", "eval"),
    )
    nemo_skills_python: str | None = setting(
        None, "Python interpreter of the environment that NeMo-Skills is installed in"
    )
    nemo_skills_timeout_seconds: float = setting(3600.0, "limit for each command of NeMo-Skills", low=1)
