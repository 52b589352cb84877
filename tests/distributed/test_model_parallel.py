"""The sharded Megatron model equals transformers' on the same Hugging Face directory, in every parallel layout."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from launch import torchrun
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dasd_megatron.models.tiny import character_tokenizer

pytestmark = pytest.mark.distributed

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256
)
MODELS = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=100, head_dim=32, tie_word_embeddings=True, **SIZES)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=101, tie_word_embeddings=False, **SIZES)),
    "llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            tie_word_embeddings=False,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            **SIZES,
        )
    ),
}
TP, PP, VPP, DP, SP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.virtual_pipeline_model_parallel_size=",
    "parallel.data_parallel_size=",
    "parallel.sequence_parallel=",
)
LAYOUTS = {
    "single": (1, [TP + "1"]),
    "tp2-sp": (2, [TP + "2", SP + "true"]),
    "pp2": (2, [TP + "1", PP + "2"]),
    "pp2-vpp2": (2, [TP + "1", PP + "2", VPP + "2"]),
    "tp2-pp2": (4, [TP + "2", PP + "2"]),
}
CASES = [("qwen3-tied", layout) for layout in LAYOUTS] + [("qwen2-untied", "tp2-pp2"), ("llama3-rope", "tp2-sp")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_log_probs_and_export_match_transformers(name: str, layout: str, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights of exactly one would hide a norm that is loaded from the wrong place.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    nproc, overrides = LAYOUTS[layout]
    torchrun(
        "model_matches_hf",
        nproc,
        {"path": str(tmp_path / "model"), "export": str(tmp_path / "export"), "seed": seed, "overrides": overrides},
    )
