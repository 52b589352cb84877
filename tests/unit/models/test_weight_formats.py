"""Blockwise FP8: against float64, against what SGLang makes of it, and which tensors are quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dasd_megatron.models.hf_weights import HfDirectoryWriter
from dasd_megatron.models.weight_export import ExportEntry, plan_buckets
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS, HfTensor, quantize_blocks
from dasd_megatron.weight_ways import WEIGHT_FORMAT_NAMES

FP8 = WEIGHT_FORMATS["fp8_blockwise"]
# Every finite value of e4m3, in order.
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
VALUES = CODES[CODES.isfinite()].unique()


def nearest(quotients: torch.Tensor) -> torch.Tensor:
    """The distance of each float64 to the nearest value of e4m3."""
    above = torch.searchsorted(VALUES, quotients).clamp(1, len(VALUES) - 1)
    return torch.minimum((VALUES[above] - quotients).abs(), (VALUES[above - 1] - quotients).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 384), (130, 70), (1, 300)])
def test_every_value_is_the_nearest_under_its_block_s_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    # Blocks of very different sizes, and one of zeros.
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 2, shape[1])
    weight[:128, 128:256] = 0
    weight = weight.to(dtype)
    values, scales = quantize_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape and values.is_contiguous()
    exact = weight.double()
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = exact[row : row + 128, column : column + 128]
            scale = scales[row // 128, column // 128].double()
            largest = block.abs().max()
            assert scale == (1 if largest == 0 else pytest.approx(float(largest) / 448, rel=1e-6))
            found = values[row : row + 128, column : column + 128].double()
            # The quotient is rounded to float32 first, so that a tie can fall to either side.
            error, quotients = (found - block / scale).abs(), block / scale
            assert bool((error <= nearest(quotients) + quotients.abs() * 2**-22).all())
            assert found.abs().max() == (0 if largest == 0 else 448)
    assert tuple(scales.shape) == (-(-shape[0] // 128), -(-shape[1] // 128)) and scales.dtype == torch.float32


def test_the_largest_and_the_smallest_weights_stay_finite() -> None:
    weight = torch.full((2, 256), torch.finfo(torch.float32).max)
    weight[:, 128:] = 1e-44
    values, scales = quantize_blocks(weight)
    assert bool(values.float().isfinite().all()) and bool((scales > 0).all()) and bool(scales.isfinite().all())


def test_linear_layers_alone_are_quantised() -> None:
    layer, shape = "model.layers.3.", (256, 130)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        weight = HfTensor(f"{layer}{name}.weight", torch.bfloat16, shape)
        assert FP8.tensors(weight) == (
            HfTensor(f"{layer}{name}.weight", torch.float8_e4m3fn, shape),
            HfTensor(f"{layer}{name}.weight_scale_inv", torch.float32, (2, 2)),
        )
        assert all(FP8.keeps(tensor) for tensor in FP8.tensors(weight))
        made = list(FP8.convert(weight.name, torch.ones(shape)))
        assert [(part, value.dtype, tuple(value.shape)) for part, value in made] == [*FP8.tensors(weight)]
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        f"{layer}self_attn.q_proj.bias",
        f"{layer}self_attn.q_norm.weight",
        f"{layer}input_layernorm.weight",
    ):
        tensor = HfTensor(name, torch.bfloat16, (256,))
        assert FP8.tensors(tensor) == (tensor,) and not FP8.keeps(tensor)
    assert tuple(WEIGHT_FORMATS) == WEIGHT_FORMAT_NAMES


def test_a_bucket_holds_values_and_scales() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    made = tuple(HfTensor(name, torch.bfloat16, (128, 256)) for name in names)
    entry = ExportEntry(0, 0, "qkv", "qkv", (384, 256), torch.bfloat16, 0, made)
    (bucket,) = plan_buckets([entry], 1, form=FP8)
    # The float32 scales come before the bytes.
    assert [tensor.name for tensor in bucket.tensors] == [f"{name}_scale_inv" for name in names] + names
    assert bucket.size == 3 * (128 * 256 + 2 * 4)


def test_a_directory_says_that_it_is_quantised(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    name = "model.layers.0.mlp.up_proj.weight"
    weight, norm = torch.randn(256, 128), torch.randn(8).to(torch.bfloat16)
    formed = FP8.tensors(HfTensor(name, torch.bfloat16, (256, 128)))
    writer = HfDirectoryWriter(
        tmp_path / "model",
        {tensor.name: tensor.shape for tensor in formed} | {"model.norm.weight": (8,)},
        torch.bfloat16,
        template_dir=template,
        other_dtypes={tensor.name: tensor.dtype for tensor in formed},
        config_fields=FP8.config,
    )
    for part, value in FP8.convert(name, weight):
        writer.write(part, value)
    writer.write("model.norm.weight", norm)
    writer.finish()
    from safetensors.torch import load_file

    found = load_file(tmp_path / "model" / "model.safetensors")
    values, scales = quantize_blocks(weight)
    assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found[f"{name}_scale_inv"], scales) and torch.equal(found["model.norm.weight"], norm)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128] and config["torch_dtype"] == "bfloat16"
