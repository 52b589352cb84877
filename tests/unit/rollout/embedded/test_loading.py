"""Models of the embedded server and the directories that they come from."""

from __future__ import annotations

import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.loading import load_model

TINY = TinyModelConfig(
    hidden_size=32, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)


def test_loaded_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    path = make_tiny_model(tmp_path / "model", TINY, 0)
    model = load_model(str(path), torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
