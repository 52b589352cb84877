"""Models of the embedded server and the directories that they come from."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError, load_model, load_update

CPU = torch.device("cpu")
TINY = TinyModelConfig(
    hidden_size=32, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)


def test_loaded_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    path = make_tiny_model(tmp_path / "model", TINY, 0)
    model = load_model(str(path), torch.float32, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def config_with(**changes):
    """Return a damage that changes fields of config.json."""

    def damage(path):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def text_in(name, text):
    """Return a damage that replaces a file by this text."""
    return lambda path: (path / name).write_text(text)


def pipe_at(name):
    """Return a damage that puts a named pipe in a file's place, which would be waited for without end."""

    def damage(path):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return damage


def index_of(name):
    """Return a damage that makes an index whose tensors are all in the file ``name``."""

    def damage(path):
        (path / "model.safetensors").rename(path / "weights.safetensors")
        text_in("model.safetensors.index.json", json.dumps({"weight_map": {"model.norm.weight": name}}))(path)

    return damage


ODD_DIRECTORIES = {
    "null": text_in("config.json", "null"),
    "a list": text_in("config.json", "[]"),
    "a string": text_in("config.json", '"qwen3"'),
    "a number": text_in("config.json", "1e400"),
    "no JSON": text_in("config.json", "{"),
    "empty": text_in("config.json", ""),
    "deep": text_in("config.json", "[" * 10000 + "]" * 10000),
    "deep object": text_in("config.json", '{"a":' * 900 + "1" + "}" * 900),
    "many digits": text_in("config.json", '{"hidden_size": ' + "9" * 5000 + "}"),
    "no model type": text_in("config.json", "{}"),
    "model type of another kind": config_with(model_type=["qwen3"]),
    "unknown model type": config_with(model_type="x" * 10000),
    "a thousand million layers": config_with(num_hidden_layers=10**9),
    "layers without end": config_with(num_hidden_layers=10**30),
    "negative layers": config_with(num_hidden_layers=-1),
    "layers as text": config_with(num_hidden_layers="two"),
    "layers as object": config_with(num_hidden_layers={}),
    "no layers": config_with(num_hidden_layers=None),
    "heads of zero": config_with(num_attention_heads=0),
    "rope of another kind": config_with(rope_scaling=[1], rope_theta="x"),
    "layer types of another kind": config_with(layer_types=5),
    "an unknown number": config_with(unknown_size=10**15),
    "quantization": config_with(quantization_config={"quant_method": "gptq"}),
    "code": config_with(auto_map={"AutoConfig": "evil.Config"}),
    "a config that is a pipe": pipe_at("config.json"),
    "weights that are a pipe": pipe_at("model.safetensors"),
    "generation config that is a list": text_in("generation_config.json", "[]"),
    "generation config that is a pipe": pipe_at("generation_config.json"),
    "an index of another place": index_of("../elsewhere.safetensors"),
    "an index of a pipe": lambda path: (pipe_at("pipe.safetensors")(path), index_of("pipe.safetensors")(path)),
    "an index of nothing": index_of("absent.safetensors"),
    "an index that is no index": text_in("model.safetensors.index.json", '{"weight_map": []}'),
    "larger than the model": lambda path: os.truncate(path / "model.safetensors", 1 << 30),
    "a directory for a file": lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("served") / "model", TINY, 0)
    return load_model(str(path), torch.float32, CPU)


@pytest.mark.parametrize("kind", ODD_DIRECTORIES)
def test_an_odd_directory_is_no_update(kind, served, tmp_path):
    path = make_tiny_model(tmp_path / "model", TINY, 1)
    ODD_DIRECTORIES[kind](path)
    with pytest.raises(ModelDirectoryError) as caught:
        load_update(str(path), torch.float32, CPU, served.config, served.num_parameters())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("path", ["", "/nowhere", "a\0b", "x" * 4000, "/dev/null", "/proc/self/mem", "\x1b[31m"])
def test_a_path_that_is_no_directory_is_no_update(path, served):
    with pytest.raises(ModelDirectoryError) as caught:
        load_update(path, torch.float32, CPU, served.config, served.num_parameters())
    assert "\n" not in str(caught.value)


def test_an_update_that_fits_is_loaded(served, tmp_path):
    path = make_tiny_model(tmp_path / "model", TINY, 1)
    new = load_update(str(path), torch.float32, CPU, served.config, served.num_parameters())
    assert not torch.equal(new.lm_head.weight, served.lm_head.weight)
    assert new.state_dict().keys() == served.state_dict().keys()
