"""A Hugging Face directory from others cannot make anything that reads it run code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.hf_config import load_tokenizer, read_hf_config
from dasd_megatron.models.hf_weights import HfWeights, WeightsError
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError, load_model
from dasd_megatron.rollout.embedded.loading import load_tokenizer as load_server_tokenizer

TINY = TinyModelConfig(
    hidden_size=32, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)


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
    load_model(str(model), torch.float32)
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
        load_model(str(model), torch.float32)
    with pytest.raises(WeightsError, match="safetensors"):
        HfWeights(model).__enter__()
    assert not mark.exists()


def test_weights_that_are_sound_pickles_are_refused_too(model: Path) -> None:
    weights = load_model(str(model), torch.float32).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ModelDirectoryError, match="model.safetensors"):
        load_model(str(model), torch.float32)


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
