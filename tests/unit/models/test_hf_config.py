"""Reading of a Hugging Face config: rotary embedding, vocabulary, dtype and names of weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import (
    declared_dtype,
    expected_tensors,
    hf_folder,
    is_megatron_checkpoint,
    padded_vocab_size,
    read_hf_config,
    rotary_arguments,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {}),
        ({"rope_type": "default"}, {}),
        # The name of the field in older files.
        ({"type": "linear", "factor": 2.0}, {"seq_len_interpolation_factor": 2.0}),
        (LLAMA3, {"rope_scaling": True, "rope_scaling_factor": 8.0}),
    ],
    ids=str,
)
def test_rotary_arguments_are_megatrons(scaling: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    config = SimpleNamespace(model_type="llama", rope_theta=5e5, rope_scaling=scaling)
    assert rotary_arguments(config) == {"rotary_base": 5e5, **expected}


@pytest.mark.parametrize(
    ("scaling", "named"),
    [({"rope_type": "yarn"}, "'yarn'"), ({**LLAMA3, "high_freq_factor": 3.0}, "high_freq_factor=3.0")],
    ids=str,
)
def test_scalings_that_megatron_lacks_are_refused(scaling: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        rotary_arguments(SimpleNamespace(model_type="llama", rope_theta=1e4, rope_scaling=scaling))


@pytest.mark.parametrize(
    ("vocabulary", "tensor_parallel", "rows"), [(64, 1, 64), (65, 1, 128), (500, 3, 576), (151936, 8, 152064)]
)
def test_every_rank_gets_a_multiple_of_64_rows(vocabulary: int, tensor_parallel: int, rows: int) -> None:
    assert padded_vocab_size(vocabulary, tensor_parallel) == rows


def test_a_checkpoint_keeps_its_hugging_face_files_apart(tmp_path: Path) -> None:
    assert not is_megatron_checkpoint(tmp_path) and hf_folder(tmp_path) == tmp_path
    (tmp_path / ".metadata").touch()
    assert is_megatron_checkpoint(tmp_path) and hf_folder(str(tmp_path)) == tmp_path / "hf"


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, None),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
    ],
    ids=str,
)
def test_the_dtype_that_a_config_declares(fields: dict[str, Any], dtype: str | None) -> None:
    assert declared_dtype(SimpleNamespace(to_dict=lambda: fields)) == dtype


def test_a_tied_head_is_no_weight_of_its_own() -> None:
    from transformers import LlamaConfig

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    tied, untied = (expected_tensors(LlamaConfig(tie_word_embeddings=tie, **sizes)) for tie in (True, False))
    assert untied == {**tied, "lm_head.weight": (50, 16)}
    assert tied["model.layers.0.mlp.down_proj.weight"] == (16, 24)


def test_refusals_name_the_callers_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--input=.*: no config\.json there"):
        read_hf_config(tmp_path, "--input")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^--input=.*config\.json is damaged \(not JSON"):
        read_hf_config(tmp_path, "--input")
