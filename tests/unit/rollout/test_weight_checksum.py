"""The checksums of weights are SGLang's."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dasd_megatron.rollout import weight_checksum
from dasd_megatron.rollout.weight_checksum import cpu_checksum, gpu_checksum

# What SGLang 0.5.23's Triton kernel gives of them, in Triton's interpreter: one word and several, padded, several
# tiles, and a part of one.
OF_THE_KERNEL = {
    "3015603431603089": torch.arange(10, dtype=torch.float32),
    "4277803ab172b5bd": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "2f12b18dbe4b1fc1": torch.arange(30000, dtype=torch.int16)[:29999],
}


@pytest.mark.parametrize("expected", OF_THE_KERNEL)
@pytest.mark.parametrize("chunk", [weight_checksum.CHUNK_WORDS, weight_checksum.TILE_WORDS])
def test_of_a_gpu(expected: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_checksum, "CHUNK_WORDS", chunk)
    tensor = OF_THE_KERNEL[expected]
    assert gpu_checksum([tensor]) == expected
    changed = tensor.clone()
    changed[-1] += 1
    assert gpu_checksum([changed]) != expected


@pytest.mark.parametrize("checksum", [cpu_checksum, gpu_checksum])
def test_tensors_one_below_another_are_one(checksum) -> None:
    tensor = torch.randn(70, 5)
    assert checksum([tensor[:30], tensor[30:31], tensor[31:]]) == checksum([tensor])
    assert checksum([tensor[30:], tensor[:30]]) != checksum([tensor])


def test_of_the_cpu() -> None:
    tensor = torch.randn(7, 3)
    assert cpu_checksum([tensor.T]) == hashlib.sha256(tensor.T.contiguous().numpy().tobytes()).hexdigest()[:16]
