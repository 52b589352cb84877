"""Small random models for the tests on a GPU."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

from dasd_megatron.models.tiny import character_tokenizer


def save_qwen3(path: Path, **sizes: object) -> None:
    """A Hugging Face directory of four layers, with the weights that torch's generator gives and a tokenizer of
    characters."""
    Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=4, **sizes)).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
