"""A run that cannot work is refused before any process starts, with one line; a run that goes on does so with its own
model and data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save_file

import dasd_megatron
from dasd_megatron.config import Config, TinyModelConfig, load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import read_hf_config
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.run import prepare
from dasd_megatron.run.prepare import prepare_run

SMALL = [
    "experiment=quickstart",
    "parallel=single",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.head_dim=8",
    "model.tiny.num_layers=4",
    "batch.groups=2",
    "warm_start.steps=0",
]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GOOD = {"problem": "1 + 1 =", "expected_answer": "2", "reference_solution": "1 + 1 = 2\n#### 2"}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides that read small problem files instead of generating problems."""
    for name, first in (("train", 1), ("heldout", 5)):
        lines = [json.dumps({**GOOD, "problem": f"{number} + 1 ="}) + "\n" for number in range(first, first + 3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [f"data.{name}.path={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    return [
        "data=jsonl",
        *sources,
        *(f"data.{name}.{field}=null" for name in ("train", "heldout") for field in ("generator", "size")),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = TinyModelConfig(hidden_size=32, num_layers=4, head_dim=8, intermediate_size=48)
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", sizes, 1)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model with changed fields in config.json."""

    def make(**fields: Any) -> Path:
        path = tmp_path / "hf"
        shutil.copytree(tiny, path)
        values = json.loads((path / "config.json").read_text())
        # One entry a layer, which transformers derives again where it is absent.
        values.pop("layer_types")
        (path / "config.json").write_text(json.dumps({**values, **fields}))
        return path

    return make


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configure(*overrides: str) -> Config:
    return load_config([*SMALL, *overrides])


@pytest.mark.parametrize(
    ("fields", "overrides", "named"),
    [
        (
            {"num_attention_heads": 5, "num_key_value_heads": 1},
            ["parallel=tp2"],
            ["tensor_model_parallel_size=2", "num_attention_heads=5"],
        ),
        (
            {"num_key_value_heads": 1},
            ["parallel=tp2"],
            ["parallel.tensor_model_parallel_size=2", "num_key_value_heads=1"],
        ),
        (
            {"intermediate_size": 47},
            ["parallel=tp2"],
            ["parallel.tensor_model_parallel_size=2", "intermediate_size=47"],
        ),
        ({"hidden_size": 33}, ["parallel=tp2"], ["parallel.tensor_model_parallel_size=2", "hidden_size=33"]),
        ({"num_key_value_heads": 3}, [], ["num_key_value_heads=3", "num_attention_heads=4"]),
        (
            {"num_hidden_layers": 3},
            ["parallel=pp2"],
            ["parallel.pipeline_model_parallel_size = 2", "num_hidden_layers=3"],
        ),
        (
            {"num_hidden_layers": 6},
            ["parallel=pp2", "parallel.virtual_pipeline_model_parallel_size=2"],
            ["parallel.virtual_pipeline_model_parallel_size=2", "3 layers", "num_hidden_layers=6"],
        ),
        (
            {"num_hidden_layers": 3},
            ["parallel=pp2", "parallel.first_pipeline_num_layers=3"],
            ["first_pipeline_num_layers=3", "0 layers", "num_hidden_layers=3"],
        ),
        ({"max_position_embeddings": 111}, [], ["rollout.max_prompt_tokens", "= 112", "max_position_embeddings=111"]),
        ({"attention_bias": True}, [], ["attention_bias=true"]),
        ({"model_type": "llama", "attention_bias": True}, [], ["attention_bias=true"]),
        ({"model_type": "llama", "mlp_bias": True}, [], ["mlp_bias=true"]),
        ({"model_type": "gpt2"}, [], ["gpt2"]),
        ({"model_type": "no-such"}, [], ["no-such"]),
        ({"rope_scaling": {"rope_type": "linear"}}, [], ["config.json", "factor"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, [], ["rope_scaling", "dynamic"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, [], ["rope_scaling.low_freq_factor=2.0"]),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
            [],
            ["original_max_position_embeddings=4096"],
        ),
        ({"use_sliding_window": True}, [], ["use_sliding_window"]),
        ({"model_type": "qwen3_moe", "num_experts": 8}, [], ["num_experts=8", "expert parallelism"]),
        ({"model_type": "mixtral", "num_local_experts": 8}, [], ["num_local_experts=8", "expert parallelism"]),
        ({"num_experts": 4}, [], ["num_experts=4", "dense"]),
        ({"hidden_act": "gelu"}, [], ["hidden_act='gelu'"]),
        ({"rms_norm_eps": None}, [], ["rms_norm_eps=None"]),
        ({"partial_rotary_factor": 0.5}, [], ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, [], ["quantization_config"]),
        ({}, ["+model.architecture={hidden_size:64}"], ["hidden_size=32", "64", "preset"]),
    ],
    ids=str,
)
def test_architectures_that_cannot_run_are_refused(
    model: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], overrides: list[str], named: list[str]
) -> None:
    config = configure(f"model.path={model(**fields)}", *overrides)
    message = refusal(lambda: prepare_run(config, tmp_path / "run"))
    for part in ["model.path", *named]:
        assert part in message


def test_layouts_of_the_model_made_in_code_are_checked(tmp_path: Path) -> None:
    message = refusal(lambda: prepare_run(configure("parallel=pp2", "model.tiny.num_layers=3"), tmp_path / "run"))
    assert "num_layers=3 (model.tiny)" in message


def test_a_preset_needs_the_weights(tmp_path: Path) -> None:
    config = configure("model=qwen3_0.6b")
    assert "model.path is required" in refusal(lambda: prepare_run(config, tmp_path / "run"))


def test_weights_that_are_incomplete_are_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    path = model()
    config = configure(f"model.path={path}")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(WeightsError, match="model.safetensors is truncated"):
        prepare_run(config, tmp_path / "run")
    tensors = load(weights)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WeightsError, match="model.layers.1.mlp.up_proj.weight"):
        prepare_run(config, tmp_path / "run")


@pytest.mark.parametrize(("model_type", "name"), [("qwen2", "attention_bias"), ("qwen3", "mlp_bias")])
def test_biases_that_an_architecture_does_not_have_are_no_reason(
    model: Callable[..., Path], model_type: str, name: str
) -> None:
    assert read_hf_config(model(model_type=model_type, **{name: True})).model_type == model_type


@pytest.mark.parametrize("content", [None, "{broken", '{"version": "1.0"}'])
def test_tokenizers_that_do_not_load_are_refused(
    model: Callable[..., Path], tmp_path: Path, content: str | None
) -> None:
    path = model()
    (path / "tokenizer.json").unlink()
    if content is None:
        (path / "tokenizer_config.json").unlink()
    else:
        (path / "tokenizer.json").write_text(content)
    message = refusal(lambda: prepare_run(configure(f"model.path={path}"), tmp_path / "run"))
    assert f"model.path={path}" in message and "tokenizer" in message


def test_config_is_complained_about_before_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type 'gpt2'" in refusal(
        lambda: prepare_run(configure(f"model.path={tmp_path / 'gpt2'}"), tmp_path / "run")
    )


@pytest.mark.parametrize(("positions", "fits"), [(219, True), (218, False)])
def test_warm_start_examples_must_fit(
    model: Callable[..., Path], files: list[str], tmp_path: Path, positions: int, fits: bool
) -> None:
    """12 tokens of privileged prompt, 206 of solution and the end; rollouts ask for 112 positions only."""
    long = {**GOOD, "problem": "7 + 7 =", "reference_solution": "x" * 200 + "#### 2"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (GOOD, long)))
    shown = ["teacher.privileged=answer", f"model.path={model(max_position_embeddings=positions)}", *files]
    if fits:
        prepare_run(configure(*shown, "warm_start.steps=1"), tmp_path / "run")
        return
    prepare_run(configure(*shown), tmp_path / "without")
    message = refusal(lambda: prepare_run(configure(*shown, "warm_start.steps=1"), tmp_path / "run"))
    assert "warm_start.steps" in message and "'train-1'" in message and "max_position_embeddings=218" in message


def test_launcher_does_not_import_megatron() -> None:
    script = (
        "import sys, dasd_megatron.run.prepare; print(sorted(name for name in sys.modules if name.split('.')[0] "
        "== 'megatron'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_resuming_keeps_the_problems(files: list[str], tmp_path: Path) -> None:
    root = tmp_path / "run"
    paths = prepare_run(configure(*files), root)
    saved = {name: paths.problems(name).stat().st_ino for name in ("train", "heldout")}
    prepare_run(configure(*files, "resume=auto"), root)
    assert {name: paths.problems(name).stat().st_ino for name in saved} == saved


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_resuming_with_changed_problems_is_refused(files: list[str], tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    paths = prepare_run(configure(*files), root)
    before = paths.problems(name).read_bytes()
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**GOOD, "problem": "8 + 8 ="}) + "\n")
    message = refusal(lambda: prepare_run(configure(*files, "resume=auto"), root))
    assert message.startswith(f"data.{name}: ") and "changed since the run began" in message
    assert paths.problems(name).read_bytes() == before


def test_checkpoint_of_another_run_fixes_the_same_fields(files: list[str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step_000001"
    prepare_run(configure(*files), tmp_path / "first")
    checkpoint.mkdir(parents=True)
    resumed = [*files, f"resume={checkpoint}"]
    message = refusal(lambda: prepare_run(configure(*resumed, "run.seed=7"), tmp_path / "second"))
    assert "run.seed=7" in message and "run.seed=1" in message
    prepare_run(configure(*resumed, "optimizer.lr=2e-5"), tmp_path / "second")


def _checkout(top: Path, package: Path) -> None:
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", top, *arguments], check=True, timeout=20)


def test_revision_is_recorded_of_this_project_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own" / "dasd_megatron"
    _checkout(tmp_path / "own", own)
    monkeypatch.setattr(dasd_megatron, "__file__", str(own / "__init__.py"))
    head = subprocess.run(
        ["git", "-C", own, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    assert prepare._git_revision() == head
    installed = tmp_path / "other" / "site-packages" / "dasd_megatron"
    _checkout(tmp_path / "other", installed)
    monkeypatch.setattr(dasd_megatron, "__file__", str(installed / "__init__.py"))
    assert prepare._git_revision() is None


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)], ids=["missing", "hangs"]
)
def test_git_that_does_not_work_is_no_reason_to_stop(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    config = configure(*files)
    monkeypatch.setattr(subprocess, "run", fail)
    prepare_run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git_revision"] is None


@pytest.mark.parametrize("job", [None, "77"])
def test_a_run_directory_in_use_is_refused(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    """At once; a requeued job waits until its former self is gone."""
    root = tmp_path / "run"
    root.mkdir()
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write(sys.argv[2]); file.flush()"
    )
    owner = '{"host": "node1", "pid": 12, "slurm_job": "77"}'
    command = [
        sys.executable,
        "-c",
        f"{hold}; print('held', flush=True); time.sleep(float(sys.argv[3]))",
        str(root / "owner.json"),
        owner,
    ]
    with subprocess.Popen([*command, "2" if job else "60"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        config = load_config([*SMALL, *files, f"run.dir={root}"])
        if job is None:
            with pytest.raises(ConfigError, match=r'is in use by another process \(\{"host": "node1"'):
                prepare_run(config, root)
            holder.kill()
        else:
            monkeypatch.setenv("SLURM_JOB_ID", job)
            prepare_run(config, root)
            assert holder.wait() == 0
            assert json.loads((root / "owner.json").read_text())["slurm_job"] == "77"


@pytest.mark.parametrize(("readers", "mode"), [("owner", 0o700), ("group", 0o750), ("all", 0o755)])
def test_a_directory_that_was_made_before_is_opened_to_its_readers(
    files: list[str], tmp_path: Path, readers: str, mode: int
) -> None:
    root = tmp_path / "run"
    root.mkdir(mode=0o700)
    prepare_run(load_config([*SMALL, *files, f"run.readable_by={readers}"]), root)
    assert root.stat().st_mode & 0o777 == mode
