"""Sizes that are read without transformers are those that transformers reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dasd_megatron.models.sizes import ModelSizes, read_sizes

FIELDS = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": True,
    "max_position_embeddings": 640,
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}, {"head_dim": 24}], ids=str)
def test_sizes_are_those_of_transformers(model_type: str, head_dim: dict[str, Any]) -> None:
    from transformers import AutoConfig

    architecture = {"model_type": model_type, **FIELDS, **head_dim}
    sizes = read_sizes(architecture)
    if model_type == "qwen3" and not head_dim.get("head_dim"):
        assert sizes is None
        return
    hf_config = AutoConfig.for_model(**architecture)
    for field in dataclasses.fields(ModelSizes):
        expected = getattr(hf_config, field.name, None)
        if field.name == "head_dim":
            expected = expected or hf_config.hidden_size // hf_config.num_attention_heads
        assert getattr(sizes, field.name) == expected, field.name


@pytest.mark.parametrize("name", [*FIELDS, "model_type"])
@pytest.mark.parametrize("value", [None, "64", 2.0])
def test_what_is_missing_or_of_another_type_is_left_to_transformers(name: str, value: Any) -> None:
    whole = {"model_type": "llama", **FIELDS}
    assert read_sizes(whole) is not None
    assert read_sizes({**whole, name: value}) is None
    assert read_sizes({key: whole[key] for key in whole if key != name}) is None


def test_other_architectures_are_left_to_transformers() -> None:
    assert read_sizes({"model_type": "gpt2", **FIELDS, "head_dim": 16}) is None
