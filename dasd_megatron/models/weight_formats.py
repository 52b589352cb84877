"""The forms in which weights leave the trainer for rollout servers: as they are, or in blockwise FP8.

Blockwise FP8 is the form of DeepSeek-V3's and Qwen3's own FP8 checkpoints, which SGLang reads: ``weight`` in e4m3 and
``weight_scale_inv``, a float32 number for each block of 128 x 128, which its values are multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SCALE = "_scale_inv"
# The linear layers of all families. Embeddings, norms, biases and the head stay as they are, as in the checkpoints.
_QUANTIZED = tuple(f".{layer}_proj.weight" for layer in ("q", "k", "v", "o", "gate", "up", "down"))


class HfTensor(NamedTuple):
    """A tensor as Hugging Face's directories and rollout servers know it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFormat:
    """The weights as they are, under Hugging Face's names. Other forms are subclasses."""

    config: Mapping[str, Any] = {}
    """Fields of config.json that tell a server of the form."""

    def tensors(self, tensor: HfTensor) -> tuple[HfTensor, ...]:
        """Return what a tensor becomes."""
        return (tensor,)

    def convert(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and values of what a tensor becomes, in the order of :meth:`tensors`."""
        yield name, tensor

    def keeps(self, tensor: HfTensor) -> bool:
        """Return whether servers keep one of :meth:`tensors` in its dtype, whatever ``rollout.dtype`` is."""
        return False


class BlockwiseFp8(WeightFormat):
    """The linear layers in e4m3, with a scale for each block of 128 x 128."""

    config: Mapping[str, Any] = {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        }
    }

    def tensors(self, tensor: HfTensor) -> tuple[HfTensor, ...]:
        """Return the e4m3 tensor and its scales, or a tensor that stays as it is."""
        if not tensor.name.endswith(_QUANTIZED):
            return (tensor,)
        blocks = tuple(math.ceil(length / BLOCK) for length in tensor.shape)
        return (
            HfTensor(tensor.name, torch.float8_e4m3fn, tensor.shape),
            HfTensor(tensor.name + _SCALE, torch.float32, blocks),
        )

    def convert(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the quantised values and their scales, or a tensor that stays as it is."""
        if not name.endswith(_QUANTIZED):
            yield name, tensor
            return
        values, scales = quantize_blocks(tensor)
        yield name, values
        yield name + _SCALE, scales

    def keeps(self, tensor: HfTensor) -> bool:
        """Return whether this is a quantised tensor or its scales."""
        return tensor.name.removesuffix(_SCALE).endswith(_QUANTIZED)


WEIGHT_FORMATS: dict[str, WeightFormat] = {"plain": WeightFormat(), "fp8_blockwise": BlockwiseFp8()}
"""Every form by its name, ``rollout.weight_format`` in the configuration."""
PLAIN = WEIGHT_FORMATS["plain"]


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight ``[N, K]`` of any float dtype by blocks of 128 x 128, of which the last may be smaller.

    The largest value of a block becomes 448, the largest of e4m3. Others are rounded to the nearest, ties to even. A
    block of zeros has the scale 1.

    Returns:
        Values ``[N, K]`` e4m3 and scales ``[ceil(N / 128), ceil(K / 128)]`` float32; the product of a value and its
        block's scale is the weight. On the weight's device.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), [0, -columns % BLOCK, 0, -rows % BLOCK])
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scales = largest / _LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    # Rounding may put a quotient above the largest value, which e4m3 takes for NaN.
    values = (blocks / scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return values.view_as(padded)[:rows, :columns].contiguous(), scales[:, 0, :, 0].contiguous()
