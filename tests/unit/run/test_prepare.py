"""A run that cannot work is refused before any process starts, with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save_file

from dasd_megatron.config import load_config
from dasd_megatron.data.prompts import DataError
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.models.hf_config import read_hf_config
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.run.prepare import prepare_run
from tests.support.chat_templates import tokenizer_with
from tests.support.small_configs import GOOD, SMALL, configure, refusal

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}<|user|><|end|>{% endfor %}", "chat template does not show the problem"),
        ("<|new|>{% for m in messages %}{{ m.content }}{% endfor %}", r"the token '<\|new\|>' \(id \d+\)"),
    ],
)
def test_prompts_are_checked_without_a_teacher_too(
    files: list[str], model: Callable[..., Path], tmp_path: Path, template: str, said: str
) -> None:
    path = model()
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    with pytest.raises((TemplateError, DataError), match=said):
        prepare_run(configure(*files, f"model.path={path}", "algorithm=grpo"), tmp_path / "run")


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


@pytest.mark.parametrize(("readers", "mode"), [("owner", 0o700), ("group", 0o750), ("all", 0o755)])
def test_a_directory_that_was_made_before_is_opened_to_its_readers(
    files: list[str], tmp_path: Path, readers: str, mode: int
) -> None:
    root = tmp_path / "run"
    root.mkdir(mode=0o700)
    prepare_run(load_config([*SMALL, *files, f"run.readable_by={readers}"]), root)
    assert root.stat().st_mode & 0o777 == mode
