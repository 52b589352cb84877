"""Models of every family equal transformers' in every parallel layout, from Hugging Face directories and from converted
checkpoints, and come back bit for bit."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from launch import run_alone, torchrun
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dasd_megatron.models.tiny import character_tokenizer

pytestmark = pytest.mark.distributed

# Vocabularies that are padded: to 512, or to 576 at TP=3.
SIZES = dict(
    vocab_size=500,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=256,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GROUPED = SIZES | dict(num_key_value_heads=6)
MODELS = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, tie_word_embeddings=True, **GROUPED)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=False, **GROUPED)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **GROUPED)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **GROUPED)),
    "llama2-untied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES)),
    "llama3-untied": lambda: LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=False, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, **GROUPED)
    ),
    "llama3-tied": lambda: LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, **GROUPED)
    ),
}


def save_model(name: str, path: Path) -> int:
    """Write one of :data:`MODELS` with random weights and a tokenizer of characters; returns the seed."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    MODELS[name]().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return seed


TP, PP, VPP, SP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.virtual_pipeline_model_parallel_size=",
    "parallel.sequence_parallel=",
)
LAYOUTS = {
    "single": (1, [TP + "1"]),
    "tp2-sp": (2, [TP + "2", SP + "true"]),
    "tp3": (3, [TP + "3"]),
    "pp2": (2, [TP + "1", PP + "2"]),
    "tp2-pp2": (4, [TP + "2", PP + "2"]),
    "pp4-vpp2": (4, [TP + "1", PP + "4", VPP + "2"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each family, and a checkpoint made of each, in chunks for two tensor-parallel
    ranks."""
    folder = tmp_path_factory.mktemp("models")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    for name, make in MODELS.items():
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights of exactly one would hide a norm that is loaded from the wrong place.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    jobs = [
        ("hf_to_megatron", str(folder / name), str(folder / f"{name}.megatron"), {"tensor_parallel": 1 + index % 3})
        for index, name in enumerate(MODELS)
    ]
    run_alone("convert_models", jobs)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_matches_transformers_and_comes_back(layout: str, models: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    nproc, overrides = LAYOUTS[layout]
    entries = []
    for index, name in enumerate(MODELS):
        # Both sources for each family, in one layout or another.
        source = models / (name if (index + len(layout)) % 2 else f"{name}.megatron")
        paths = {"export": str(tmp_path / f"{name}.export"), "save": str(tmp_path / f"{name}.saved")}
        entries.append({"path": str(models / name), "load": str(source), **paths})
    torchrun("model_matches_hf", nproc, {"models": entries, "seed": seed, "overrides": overrides, "tolerance": 2e-5})
    run_alone("convert_models", [("megatron_to_hf", entry["save"], entry["save"] + ".hf", {}) for entry in entries])
    for entry in entries:
        before, after = (
            load_file(Path(entry["path"]) / "model.safetensors"),
            load_file(Path(entry["save"] + ".hf") / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
