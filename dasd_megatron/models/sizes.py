"""The sizes of a model, by their names in config.json, without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dasd_megatron.models.families import FAMILIES


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that memory, traffic and the layout of a model depend on, as config.json names them."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int


def read_sizes(architecture: Mapping[str, Any]) -> ModelSizes | None:
    """Return the sizes in the fields of a config.json, or None where a field is missing or has another type.

    The caller then asks transformers, which knows the value of a field that is missing and what is wrong with another.
    """
    values = dict(architecture)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return None
    if FAMILIES[model_type].heads_divide_width and values.get("head_dim") is None:
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if type(hidden) is int and type(heads) is int and heads > 0:
            values["head_dim"] = hidden // heads
    kinds = {"model_type": str, "tie_word_embeddings": bool}
    names = [field.name for field in fields(ModelSizes)]
    if any(type(values.get(name)) is not kinds.get(name, int) for name in names):
        return None
    return ModelSizes(**{name: values[name] for name in names})
