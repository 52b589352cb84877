"""Weights in blockwise FP8 are what SGLang's own layers take them for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.models.hf_weights import HfDirectoryWriter
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS
from dasd_megatron.rollout.local_server import SGLANG_STARTER
from tests.support.servers import sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SIZES = {
    "hidden_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 512,
}
ROWS = {"q": 512, "k": 256, "v": 256, "gate": 512, "up": 512}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {f"{part}_proj.weight": (rows, 384) for part, rows in ROWS.items()} | {"down_proj.weight": (384, 512)}
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def held(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What SGLang's layers hold after they have loaded the directory that the trainer writes."""
    folder = tmp_path_factory.mktemp("fp8")
    (folder / "config.json").write_text(json.dumps(SIZES))
    form = WEIGHT_FORMATS["fp8_blockwise"]
    # The form goes by the layer's name in a whole model.
    layer = "model.layers.0.mlp."
    tensors = {
        part.removeprefix(layer): value
        for name, weight in weights.items()
        for part, value in form.convert(layer + name, weight)
    }
    writer = HfDirectoryWriter(
        folder / "model",
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        torch.bfloat16,
        template_dir=folder,
        other_dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        config_fields=form.config,
    )
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    script = Path(__file__).parents[1] / "support" / "sglang_fp8_layers.py"
    done = subprocess.run(
        [sglang_python(), script, SGLANG_STARTER, folder / "model", folder / "held.safetensors"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "held.safetensors") | tensors


# Of each layer the trainer's tensors, one below another, with the dimension that a server's processes share.
LAYERS = {
    "qkv": [("q_proj", 0), ("k_proj", 0), ("v_proj", 0)],
    "gate_up": [("gate_proj", 0), ("up_proj", 0)],
    "down": [("down_proj", 1)],
}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_sglang_s_layers_hold_the_bytes_that_were_sent(rank: int, size: int, held: dict[str, torch.Tensor]) -> None:
    for layer, parts in LAYERS.items():
        for kind in ("weight", "weight_scale_inv"):
            expected = torch.cat([held[f"{part}.{kind}"].chunk(size, dim)[rank] for part, dim in parts])
            found = held[f"{size}.{rank}.{layer}.{kind}"]
            assert found.dtype == expected.dtype and found.shape == expected.shape, (layer, kind)
            assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8)), (layer, kind)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_sglang_takes_them_for_the_policy_s_weights(
    rank: int, size: int, held: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> None:
    for layer, parts in LAYERS.items():
        policy = torch.cat([weights[f"{part}.weight"].chunk(size, dim)[rank] for part, dim in parts]).float()
        meant = held[f"{size}.{rank}.{layer}.meant"]
        scale = policy.abs().max() / 448
        # e4m3 keeps three bits behind the leading one, and 2**-9 of a scale at least.
        assert bool(((meant - policy).abs() <= policy.abs() * 2**-4 + scale * 2**-9).all()), layer
