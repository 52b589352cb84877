"""Small random models of every family, and the parallel layouts in which the tests split them."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dasd_megatron.models.tiny import character_tokenizer

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


def save_qwen3(path: Path, **sizes: object) -> None:
    """Write a Hugging Face directory of four layers, with the weights that torch's generator gives and a tokenizer of
    characters."""
    Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=4, **sizes)).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
