"""The table of families: what it says of an architecture is what transformers makes of it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import dasd_megatron
from dasd_megatron.models.families import FAMILIES, Family
from dasd_megatron.models.hf_config import expected_tensors
from dasd_megatron.models.sizes import read_sizes
from dasd_megatron.planning.estimate import Architecture, total_parameters

PRESETS = sorted((Path(dasd_megatron.__file__).parent / "conf/model").glob("*.yaml"))
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
BIASES = ("attention_bias", "mlp_bias")


def hf_config(family: Family, **fields: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family.model_type, **SIZES | fields)


def biases(family: Family, **fields: Any) -> set[str]:
    return {name for name in expected_tensors(hf_config(family, **fields)) if name.endswith(".bias")}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_class_is_the_one_of_transformers(family: Family) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM._model_mapping[type(hf_config(family))].__name__ == family.architecture


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_biases_and_norms_are_those_of_transformers(family: Family) -> None:
    attention = "model.layers.0.self_attn"
    tensors = expected_tensors(hf_config(family))
    names = {name for name in tensors if name.endswith(".bias") and name.startswith("model.layers.0.")}
    assert names == ({f"{attention}.{part}_proj.bias" for part in "qkv"} if family.qkv_bias else set())
    norms = {name for name in tensors if name.startswith(attention) and name.endswith("norm.weight")}
    assert norms == ({f"{attention}.{part}_norm.weight" for part in "qk"} if family.qk_layernorm else set())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_refused_switches_are_those_that_add_biases(family: Family) -> None:
    added = {name for name in BIASES if biases(family, **{name: True}) != biases(family)}
    assert added == set(family.refused_biases)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_heads_divide_the_width_where_config_json_says_nothing(family: Family) -> None:
    config = hf_config(family)
    found = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (found == 12) is family.heads_divide_width
    assert (read_sizes({"model_type": family.model_type, "max_position_embeddings": 64, **SIZES}) is not None) is (
        family.heads_divide_width
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_planned_parameters_are_those_of_transformers(family: Family, tied: bool) -> None:
    config = hf_config(family, tie_word_embeddings=tied)
    elements = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert total_parameters(Architecture.of(config)) == elements


def test_presets_are_of_families_of_the_table() -> None:
    presets = [yaml.safe_load(path.read_text()) for path in PRESETS]
    # A preset with fields of other sections has them beside its own.
    architectures = [preset.get("model", preset).get("architecture") or {} for preset in presets]
    found = {architecture["model_type"] for architecture in architectures if architecture}
    assert found == set(FAMILIES)
    assert all(family.model_type == name for name, family in FAMILIES.items())


def test_the_table_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; import dasd_megatron.models.families; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
