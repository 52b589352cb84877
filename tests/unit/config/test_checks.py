"""Every wrong configuration is refused with one line that names the field and the fix."""

from __future__ import annotations

import importlib.util

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError

QUICK = "experiment=quickstart"
GPU = ["backend.kind=cuda", "precision=bf16"]

REFUSED = [
    (["optimizer.rl=3"], ["optimizer.rl", "optimizer.lr"]),
    (["optimzer.lr=3"], ["optimzer.lr", "optimizer.lr"]),
    (["+run.b=3"], ["run.b"]),
    (["logging.wandb=on"], ["logging.wandb=on", "none, offline, online"]),
    (["logging.mlflow_uri=https://me:word@host"], ["logging.mlflow_uri", "MLFLOW_TRACKING_PASSWORD"]),
    (["algorithm=foo"], ["algorithm=foo", "dasd", "grpo", "rlsd"]),
    (["experiment=quick"], ["experiment=quick", "quickstart"]),
    (["optimizer.lr=abc"], ["optimizer.lr", "abc"]),
    (["optimizer.lr=null"], ["optimizer.lr"]),
    (["optimizer.lr=nan"], ["optimizer.lr=nan"]),
    (["optimizer.lr=1e30"], ["optimizer.lr=1e+30", "between 0 and 1"]),
    (["warm_start.lr=2"], ["warm_start.lr=2", "between 0 and 1"]),
    (["optimizer.lr"], ["'optimizer.lr'", "field=value"]),
    (["run.steps=1.5"], ["run.steps"]),
    (["algorithm.name=ppo"], ["algorithm.name=ppo", "dasd"]),
    (["algorithm.rho=1.5"], ["algorithm.rho", "between 0 and 1"]),
    (["parallel=single", "parallel.sequence_parallel=true"], ["sequence_parallel", "tensor_model_parallel_size"]),
    (["parallel.virtual_pipeline_model_parallel_size=2"], ["virtual_pipeline", "pipeline_model_parallel_size"]),
    (["parallel.context_parallel_size=2"], ["parallel.context_parallel_size=2", "Transformer Engine", "write 1"]),
    (
        ["backend.kind=cuda", "backend.transformer_impl=local", "parallel.context_parallel_size=2"],
        ["parallel.context_parallel_size=2", "transformer_impl=transformer_engine"],
    ),
    (["parallel.first_pipeline_num_layers=1"], ["parallel.first_pipeline_num_layers", "pipeline_model_parallel_size"]),
    (["parallel.overlap_param_gather=true"], ["parallel.overlap_param_gather", "parallel.overlap_grad_reduce=true"]),
    (
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true", "optimizer.distributed=false"],
        ["parallel.overlap_param_gather", "optimizer.distributed=true"],
    ),
    (["parallel.bucket_size=7"], ["parallel.bucket_size=7", "parallel.overlap_grad_reduce"]),
    (["precision.recompute_modules=[moe]"], ["precision.recompute_modules", "[mlp]"]),
    (["precision.recompute=half"], ["precision.recompute=half", "selective"]),
    (["batch.groups=7", "batch.minibatches=2"], ["batch.groups=7", "multiple of 2"]),
    (["batch.groups=8", "parallel.data_parallel_size=3"], ["batch.groups=8", "multiple of 3"]),
    (["data.date=29.11.2026"], ["data.date=29.11.2026", "YYYY-MM-DD"]),
    (["data.date=20261129"], ["data.date=20261129", "YYYY-MM-DD"]),
    (["data.date=2026-02-30"], ["data.date=2026-02-30"]),
    (["data.chat_template_kwargs={messages: 1}"], ["data.chat_template_kwargs.messages", "leave it out"]),
    (["data.chat_template_kwargs={tokenize: false}"], ["data.chat_template_kwargs.tokenize", "leave it out"]),
    (["data.chat_template_kwargs={eos_token: x}"], ["data.chat_template_kwargs.eos_token"]),
    (["data.chat_template_kwargs={enable-thinking: false}"], ["data.chat_template_kwargs.enable-thinking", "name"]),
    (["data.chat_template_kwargs={a: inf}"], ["data.chat_template_kwargs.a=", "finite"]),
    (["data.chat_template_kwargs={a: {b: [nan]}}"], ["data.chat_template_kwargs.a=", "finite"]),
    (["data.chat_template_kwargs={a: {1: 2}}"], ["data.chat_template_kwargs.a=", "mappings"]),
    (["data.chat_template_kwargs=5"], ["data.chat_template_kwargs"]),
    (["batch.samples_per_group=1"], ["batch.samples_per_group", "verifier_weight"]),
    (["algorithm=grpo", "algorithm.verifier_weight=0"], ["algorithm.verifier_weight"]),
    (["optimizer.min_lr=1"], ["optimizer.min_lr", "optimizer.lr"]),
    (["rollout.engine=external"], ["rollout.servers"]),
    (["verify.reward=rewards.brief"], ["verify.reward", "module:function"]),
    (["health.epistemic_words=[wait,...]"], ["health.epistemic_words", "'...'"]),
    (["health.position_bins=[16,8]"], ["health.position_bins=[16, 8]", "ascending"]),
    (["watch.action=halt"], ["watch.action=halt", "warn, pause, stop"]),
    (["watch.act_on=[entropy]"], ["watch.act_on", "entropy_low"]),
    (["watch.ignore=[entropy]"], ["watch.ignore", "entropy_low"]),
    (["watch.saturated_share=0"], ["watch.saturated_share=0"]),
    (["rollout.filter=filters.keep"], ["rollout.filter", "module:function"]),
    (["rollout.unfinished=retract"], ["rollout.unfinished=retract", "rollout.max_staleness=1"]),
    (["rollout.unfinished=abort"], ["rollout.unfinished=abort", "rollout.over_sampling"]),
    (["rollout.over_sampling=1.5"], ["rollout.over_sampling=1.5", "rollout.unfinished=abort"]),
    (["rollout.over_sampling=0.5"], ["rollout.over_sampling=0.5"]),
    (["rollout.release_memory=true", "rollout.max_staleness=1"], ["rollout.release_memory", "rollout.max_staleness=1"]),
    (["loss.importance_sampling=sentence"], ["loss.importance_sampling", "sequence"]),
    (["loss.importance_cap=0"], ["loss.importance_cap"]),
    (["loss.surrogate=grpo"], ["loss.surrogate=grpo", "ppo, gspo, cispo"]),
    (["loss.aggregation=mean"], ["loss.aggregation=mean", "token_mean, seq_mean_token_mean"]),
    (["loss.surrogate=gspo", "loss.dual_clip=3"], ["loss.dual_clip=3", "surrogate=gspo", "surrogate=ppo"]),
    (["loss.rejection=word"], ["loss.rejection=word", "none, token, sequence, geometric"]),
    (["loss.rejection_high=2"], ["loss.rejection_high=2", "loss.rejection=token, sequence or geometric"]),
    (["loss.rejection=token", "loss.rejection_low=1.5"], ["loss.rejection_low=1.5", "between 0 and 1"]),
    (["loss.rejection=token", "loss.rejection_high=0.5"], ["loss.rejection_high=0.5", "at least 1"]),
    (
        ["loss.rejection=geometric", "loss.rejection_low=1", "loss.rejection_high=1"],
        ["loss.rejection_low=1", "loss.rejection_high=1", "raise the other"],
    ),
    (["loss.rejection_veto=1"], ["loss.rejection_veto=1", "below 1"]),
    (["loss.rejection=token", "loss.rejection_veto=0.6"], ["loss.rejection_veto=0.6", "rejection_low=0.5"]),
    (
        ["rollout.weight_sync=distributed", "rollout.weight_sync_timeout_seconds=450"],
        ["backend.timeout_seconds", "450"],
    ),
    (["rollout.engine=external", "rollout.servers=[http://a:1,http://a:1]"], ["rollout.servers", "twice"]),
    (["rollout.weight_sync=distributed", "backend.kind=cuda"], ["rollout.weight_sync", "NCCL"]),
    (
        ["rollout.engine=sglang", "rollout.weight_sync=distributed", "rollout.sglang.data_parallel_size=2"],
        ["rollout.sglang.data_parallel_size=2"],
    ),
    (["rollout.weight_sync=tensor", "rollout.weight_sync_timeout_seconds=450"], ["backend.timeout_seconds", "450"]),
    (["rollout.weight_sync=tensor", "backend.kind=cuda"], ["rollout.weight_sync=tensor", "rollout.engine=sglang"]),
    (
        ["rollout=sglang_cpu", "rollout.weight_sync=tensor", "backend.kind=cuda"],
        ["rollout.weight_sync=tensor", "rollout.sglang.backend=cuda"],
    ),
    (
        [
            "rollout.engine=sglang",
            "rollout.weight_sync=tensor",
            "rollout.sglang.backend=cpu",
            "rollout.sglang.data_parallel_size=2",
        ],
        ["rollout.sglang.data_parallel_size=2"],
    ),
    (
        [
            "rollout.engine=external",
            "rollout.weight_sync=tensor",
            "rollout.servers=[http://127.0.0.1:1,http://10.0.0.1:1]",
        ],
        ["rollout.weight_sync=tensor", "http://10.0.0.1:1", "distributed"],
    ),
    (
        ["backend.offload=state", "rollout.max_staleness=1", "loss.importance_sampling=token"],
        ["backend.offload=state", "rollout.max_staleness=1", "max_staleness=0"],
    ),
    (["backend.offload=all"], ["backend.offload=all", "rollout.release_memory=true"]),
    (
        ["backend.offload=all", "rollout.replay=.", "evaluation=none"],
        ["backend.offload=all", "rollout.replay", "backend.offload=none"],
    ),
    (
        [
            "backend.kind=cuda",
            "rollout.engine=external",
            "rollout.servers=[http://a:1]",
            "rollout.release_memory=true",
            "rollout.weight_sync=distributed",
        ],
        ["rollout.weight_sync=distributed over NCCL", "write disk, on one machine tensor"],
    ),
    (["backend.offload=gpu"], ["backend.offload=gpu", "none, state, all"]),
    (["rollout.weight_format=fp8_blockwise"], ["rollout.weight_format=fp8_blockwise", "rollout.engine=embedded"]),
    (
        ["rollout=sglang_cpu", "rollout.weight_format=fp8_blockwise"],
        ["rollout.weight_format=fp8_blockwise", "rollout.sglang.backend=cpu"],
    ),
    (
        ["rollout.engine=sglang", "rollout.weight_format=fp8_blockwise", "rollout.sglang.quantization=fp8"],
        ["rollout.weight_format=fp8_blockwise", "rollout.sglang.quantization=fp8 out"],
    ),
    (
        ["rollout.engine=sglang", "rollout.weight_format=fp8_blockwise", "rollout.dtype=float32"],
        ["rollout.weight_format=fp8_blockwise", "rollout.dtype=bfloat16"],
    ),
    (["rollout.verify_weights=-1"], ["rollout.verify_weights=-1", "at least 0"]),
    (
        ["rollout=sglang_cpu", "rollout.verify_weights=1", "rollout.sglang.tensor_parallel_size=2"],
        ["rollout.verify_weights", "write 0"],
    ),
    (
        ["rollout=sglang_cpu", "rollout.verify_weights=1", "rollout.sglang.quantization=fp8"],
        ["rollout.verify_weights", "quantization"],
    ),
    (["rollout.servers=[http://a:1]"], ["rollout.servers", "external"]),
    (
        ["rollout=external", "rollout.servers=[http://a:1]", "rollout.device=cuda"],
        ["rollout.device=cuda", "embedded"],
    ),
    (["rollout=sglang_cpu", "rollout.cache_gib=2"], ["rollout.cache_gib=2", "embedded"]),
    (["rollout.device=tpu"], ["rollout.device=tpu", "auto, cpu, cuda"]),
    (["rollout=external", "rollout.servers=[http://me:secret@a:1]"], ["rollout.servers", "config.yaml"]),
    (["rollout=external", "rollout.servers=['http://[::1']"], ["rollout.servers", "is not an address"]),
    (["rollout=external", "rollout.servers=['http://a:99999']"], ["rollout.servers", "is not an address"]),
    (["rollout=external", "rollout.servers=['http://:80']"], ["rollout.servers", "is not an address"]),
    (
        ["rollout=sglang_cpu", "rollout.sglang.arguments=[--api-key,secret]"],
        ["rollout.sglang.arguments", "DASD_API_KEY"],
    ),
    (
        ["rollout=sglang_cpu", "rollout.sglang.arguments=['--trust-remote-code']"],
        ["rollout.sglang.arguments", "--trust-remote-code", "leave it out"],
    ),
    (
        ["rollout=sglang_cpu", "rollout.sglang.arguments=[--tp-size,2,'--trust-rem']"],
        ["rollout.sglang.arguments", "--trust-remote-code", "leave it out"],
    ),
    (
        ["rollout=sglang_cpu", "rollout.sglang.arguments=['--api-k=secret']"],
        ["rollout.sglang.arguments", "DASD_API_KEY"],
    ),
    (
        ["rollout=sglang_cpu", "rollout.sglang.arguments=['--admin-api-key=secret']"],
        ["rollout.sglang.arguments", "DASD_API_KEY"],
    ),
    (["run.readable_by=everybody"], ["run.readable_by", "owner"]),
    (["model=hf"], ["model.path is required"]),
    (["rollout.engine=external", "rollout.servers=[a:1]"], ["a:1", "http://"]),
    (["rollout=external", "rollout.nodes=a"], ["rollout.port=0", "rollout.port=30000"]),
    (
        ["rollout=external", "rollout.nodes=a", "rollout.port=65530", "rollout.servers_per_node=7"],
        ["rollout.port=65530", "7 ports"],
    ),
    (["rollout=external", "rollout.nodes='-v'", "rollout.port=30000"], ["rollout.nodes='-v'", "gpu[01-04,07]"]),
    (["rollout=external", "rollout.nodes=''"], ["rollout.nodes"]),
    (["rollout=external", "rollout.nodes=${oc.env:NOT_SET}", "rollout.port=30000"], ["rollout.nodes", "NOT_SET"]),
    (
        ["rollout=external", "rollout.servers=[http://a:1]", "rollout.servers_per_node=2"],
        ["rollout.servers_per_node=2", "rollout.nodes"],
    ),
    (["rollout=external", "rollout.router=a:1"], ["rollout.router", "a:1", "http://"]),
    (
        ["rollout=external", "rollout.router=http://a:1", "rollout.servers=[http://b:1]"],
        ["rollout.servers and rollout.router"],
    ),
    (["rollout.router=http://a:1"], ["rollout.router", "rollout.engine=external"]),
    (["rollout.top_k=0"], ["rollout.top_k=0", "-1"]),
    (["backend.timeout_seconds=10"], ["backend.timeout_seconds", "rollout.step_timeout_seconds"]),
    (["backend.transformer_impl=transformer_engine"], ["transformer_impl", "cuda"]),
    (["precision.fp8=tensorwise"], ["precision.fp8=tensorwise", "backend.kind=cuda"]),
    ([*GPU, "backend.transformer_impl=local", "precision.fp8=delayed"], ["precision.fp8=delayed", "transformer_impl"]),
    ([*GPU, "precision=fp32", "precision.fp8=delayed"], ["precision.fp8=delayed", "params_dtype=bf16"]),
    (["precision.bf16_last_layers=1"], ["bf16_last_layers", "precision.fp8=none"]),
    (
        [*GPU, "precision.fp8=delayed", "precision.bf16_first_layers=1"],
        ["precision.fp8=delayed", "bf16_first_layers", "tensorwise"],
    ),
    (["evaluation.ks=[1,32]"], ["evaluation.ks", "32", "evaluation.samples=16"]),
    (["rollout.max_new_tokens=500"], ["rollout.max_new_tokens", "max_position_embeddings"]),
    (["model.path=/nowhere"], ["model.path=/nowhere"]),
    (["resume=/nowhere"], ["resume=/nowhere"]),
    (["data.train.path=/tmp"], ["data.train.path", "data.train.generator"]),
    (["data.train.size=null"], ["data.train.size"]),
    (["rollout.replay=/tmp"], ["rollout.replay", "evaluation.before=false"]),
    (["run.name=a/b"], ["run.name"]),
    (["run.name=.hidden"], ["run.name", "'.'"]),
    (
        ["teacher.weights=trust_region", "loss.fused_linear=false"],
        ["teacher.weights=trust_region", "fused_linear=true"],
    ),
    (["algorithm.divergence_pull_cap=0.5"], ["algorithm.divergence_pull_cap", "objective=distributional"]),
    (["algorithm.rlsd_clip=1.1"], ["algorithm.rlsd_clip=1.1", "between 0 and 1"]),
    (["algorithm.divergence_entry_clip=0.5"], ["algorithm.divergence_entry_clip", "objective=distributional"]),
    (["algorithm.beta_schedule.final=0.5"], ["algorithm.beta_schedule.final=0.5", "style=linear or cosine"]),
    (["algorithm.divergence_top_k=9"], ["algorithm.divergence_top_k", "objective=distributional"]),
    # A preset may have set it, so the message says what to write over it.
    (["algorithm=sdpo", "algorithm.objective=sampled"], ["algorithm.divergence_top_k", "write null"]),
    (["algorithm.divergence_top_k_of=both"], ["algorithm.divergence_top_k_of=both", "teacher", "student"]),
    (["algorithm.divergence_entry_clip=0"], ["algorithm.divergence_entry_clip=0", "above 0"]),
    (["loss.dual_clip=1"], ["loss.dual_clip=1", "above 1"]),
    (["teacher.privileged=solutions"], ["teacher.privileged", "'solutions'", "solution, hint, answer, peer, feedback"]),
    (["teacher.privileged=[peer,nothing]"], ["teacher.privileged", "'nothing'", "unpaired"]),
    (["teacher.privileged=[peer,answer,peer]"], ["teacher.privileged", "peer twice"]),
    (["teacher.privileged=[]"], ["teacher.privileged=[]", "like [solution]"]),
    (["teacher.privileged=null"], ["teacher.privileged=None", "like [solution]"]),
    (["teacher.privileged=3"], ["teacher.privileged=3", "like [solution]"]),
    (["teacher.privileged={peer:1}"], ["teacher.privileged"]),
    (["teacher.privileged=[[peer]]"], ["teacher.privileged", "['peer']"]),
    (["teacher.privileged=[peer,feedback]"], ["teacher.privileged", "verify.reward", "(number, text)"]),
    (
        ["teacher.privileged=peer", "batch.samples_per_group=1", "algorithm.verifier_weight=0"],
        ["teacher.privileged=[peer]", "batch.samples_per_group=1"],
    ),
    (["teacher.peer=longest"], ["teacher.peer=longest", "shortest, random"]),
    (["teacher.max_privileged_tokens=0"], ["teacher.max_privileged_tokens=0", "at least 1"]),
    (["teacher.hint_fraction=0"], ["teacher.hint_fraction=0", "above 0"]),
    (["teacher.hint_fraction=1.1"], ["teacher.hint_fraction=1.1", "at most 1"]),
    (["optimizer.adam_beta1=1"], ["optimizer.adam_beta1=1", "below 1"]),
    (["optimizer.adam_beta2=1"], ["optimizer.adam_beta2=1", "below 1"]),
    (["optimizer.clip_grad=inf"], ["optimizer.clip_grad=inf", "finite"]),
    (["algorithm.beta=-inf"], ["algorithm.beta=-inf", "finite"]),
    (["model.tiny.num_layers=0"], ["model.tiny.num_layers=0", "at least 1"]),
    (["algorithm=rlsd", "algorithm.verifier_weight=0"], ["rlsd", "algorithm.verifier_weight"]),
    (["algorithm.push_gate=no_such"], ["algorithm.push_gate", "none, group"]),
    (["algorithm=opsd", "algorithm.push_gate=group"], ["push_gate=group", "opsd", "dasd, reversed"]),
    (["algorithm.term_clip=0"], ["algorithm.term_clip", "above 0"]),
    *(
        (
            [f"algorithm={name}", "algorithm.verifier_weight=0", "algorithm.beta=0"],
            [name, "algorithm.verifier_weight", "algorithm.beta"],
        )
        for name in ("opsd", "dasd", "reversed")
    ),
    (
        [
            "parallel=pp2",
            "parallel.pipeline_model_parallel_size=4",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.data_parallel_size=2",
            "warm_start.batch_size=6",
        ],
        ["warm_start.batch_size=6", "at least 8"],
    ),
    (["warm_start.steps=0", "warm_start.path=sft.jsonl"], ["warm_start.path=sft.jsonl", "warm_start.steps=0"]),
    (
        ["warm_start.path=sft.jsonl", "warm_start.privileged_share=0.5"],
        ["warm_start.privileged_share=0.5", "warm_start.path"],
    ),
    (["verify.measures=measures"], ["verify.measures=measures", "module:function"]),
]


@pytest.mark.parametrize(("overrides", "named"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_refusals_name_the_field_and_the_fix(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([QUICK, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("override", "module"), [("logging.wandb=offline", "wandb"), ("logging.mlflow=true", "mlflow")]
)
def test_loggers_that_are_not_installed_are_refused(
    override: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    with pytest.raises(ConfigError, match=rf"{override}, but {module} is not installed: pip install .*\[{module}\]"):
        load_config([QUICK, override])
    load_config([QUICK, override], needs_files=False)


@pytest.mark.parametrize("server", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_servers_of_this_machine_can_share_memory(server: str) -> None:
    overrides = [
        "rollout.engine=external",
        "rollout.weight_sync=tensor",
        "rollout.release_memory=true",
        f"rollout.servers=['{server}']",
    ]
    assert load_config([QUICK, *overrides]).rollout.servers == [server]


def test_servers_of_several_machines_can_take_turns_with_the_trainer() -> None:
    overrides = ["rollout.engine=external", "rollout.release_memory=true", "backend.offload=all"]
    servers = ["http://node01:30000", "http://node02:30001"]
    config = load_config([QUICK, *overrides, f"rollout.servers=[{','.join(servers)}]"])
    assert config.rollout.servers == servers and config.backend.offload == "all"


def test_dr_grpo_has_neither_the_deviation_nor_the_lengths_in_its_loss() -> None:
    config = load_config([QUICK, "algorithm=dr_grpo"])
    assert (config.algorithm.name, config.algorithm.normalize_std) == ("grpo", False)
    assert config.loss.aggregation == "seq_mean_token_sum_norm"
