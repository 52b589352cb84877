"""A Hugging Face directory from others cannot make anything that reads it run code."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.errors import ConfigError
from dasd_megatron.models import gguf
from dasd_megatron.models.hf_config import load_tokenizer, read_hf_config
from dasd_megatron.models.hf_weights import HfWeights, WeightsError
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError, load_model
from dasd_megatron.rollout.embedded.loading import load_tokenizer as load_server_tokenizer

CPU = torch.device("cpu")
TINY = TinyModelConfig(
    hidden_size=32, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)

LOADING = ("dasd_megatron", "tools", "examples", "benchmarks")
PACKAGE = Path(__file__).resolve().parents[3] / "dasd_megatron"


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", TINY, 0)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there once code has run."""
    return tmp_path / "code-has-run"


def read_everything(model: Path) -> None:
    read_hf_config(model)
    load_tokenizer(model)
    load_server_tokenizer(str(model))
    load_model(str(model), torch.float32, CPU)
    with HfWeights(model):
        pass


def test_the_planted_pickle_would_run_code(mark: Path, tmp_path: Path) -> None:
    torch.save(Evil(mark), tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert mark.exists()


def test_weights_that_are_pickles_are_refused(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Evil(mark), model / "pytorch_model.bin")
    with pytest.raises(ModelDirectoryError, match="model.safetensors"):
        load_model(str(model), torch.float32, CPU)
    with pytest.raises(WeightsError, match="safetensors"):
        HfWeights(model).__enter__()
    assert not mark.exists()


def test_weights_that_are_sound_pickles_are_refused_too(model: Path) -> None:
    weights = load_model(str(model), torch.float32, CPU).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ModelDirectoryError, match="model.safetensors"):
        load_model(str(model), torch.float32, CPU)


def test_pickles_beside_the_model_are_left_alone(model: Path, mark: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "tokenizer.pkl",
        "vocab.pkl",
    ):
        torch.save(Evil(mark), model / name)
    read_everything(model)
    assert not mark.exists()


def test_code_of_a_model_is_not_imported(model: Path, mark: Path) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.Tokenizer", "evil.FastTokenizer"],
        }
        (model / name).write_text(json.dumps(content))
    read_everything(model)
    assert not mark.exists()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Return every call of a module with the text of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_loader_of_the_package_runs_what_it_reads() -> None:
    """Pickles are read where nothing that they name is called, or where this process wrote them; and a state dict goes
    into a module by ``load_state`` alone, since a layer may unpickle its extra state."""
    own_pickles = {"training/checkpoint_writer.py"}
    state_dicts = {"models/extra_state.py", "training/optimizer.py"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for function, call in calls(ast.parse(path.read_text())):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            last = function.rpartition(".")[2]
            if function == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{name}:{call.lineno} torch.load without weights_only=True")
            if function in ("pickle.load", "pickle.loads", "pickle.Unpickler") and name not in own_pickles:
                found.append(f"{name}:{call.lineno} {function}")
            if (
                last == "load_state_dict"
                and name not in state_dicts
                and function not in ("optimizer.load_state_dict", "self.optimizer.load_state_dict")
            ):
                found.append(f"{name}:{call.lineno} {function}")
            if last in ("unsafe_load", "full_load") or function in ("yaml.load", "marshal.loads", "shelve.open"):
                found.append(f"{name}:{call.lineno} {function}")
            if keywords.get("allow_pickle") == "True":
                found.append(f"{name}:{call.lineno} allow_pickle")
    assert not found, found


def test_every_loader_says_that_no_code_is_run() -> None:
    """transformers asks at the terminal whether to run a model's code where the argument is left out."""
    root, found, sound = PACKAGE.parent, [], 0
    for path in (path for folder in LOADING for path in sorted((root / folder).rglob("*.py"))):
        for function, call in calls(ast.parse(path.read_text())):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            loads = function.rpartition(".")[2] in ("from_pretrained", "from_config")
            if (loads or "trust_remote_code" in keywords) and keywords.get("trust_remote_code") != "False":
                found.append(f"{path.relative_to(root)}:{call.lineno} {function} without trust_remote_code=False")
            sound += loads
    assert not found, "\n".join(found)
    assert sound >= 10


def test_a_gguf_file_runs_no_code_beside_it(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Neither where somebody would say yes when asked."""
    pytest.importorskip("gguf")
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.F"]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": names}))
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    # The model is not what is tested: its config is in the file, and the tokenizer's beside it.
    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="cannot be read as a language model in GGUF"):
        gguf.gguf_to_hf(tmp_path / "model.gguf", tmp_path / "out")
    assert not mark.exists() and "[y/N]" not in capfd.readouterr().out


def write_gguf(path: Path) -> None:
    """Write a GGUF file of an architecture, with nothing in it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
