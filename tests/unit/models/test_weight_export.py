"""Which parameters of the model travel together."""

from __future__ import annotations

import torch

from dasd_megatron.models.weight_export import ExportEntry, plan_buckets, split_bucket
from dasd_megatron.models.weight_formats import HfTensor


def entry(stage: int, name: str, *tensors: tuple[str, torch.dtype, int]) -> ExportEntry:
    made = tuple(HfTensor(hf_name, dtype, (length,)) for hf_name, dtype, length in tensors)
    return ExportEntry(stage, 0, name, name, (1,), tensors[0][1], None, made)


PLAN = [
    entry(0, "embedding", ("embed", torch.bfloat16, 50)),
    entry(0, "qkv", ("q", torch.bfloat16, 5), ("k", torch.bfloat16, 2), ("v", torch.bfloat16, 2)),
    entry(0, "norm", ("norm", torch.float32, 3)),
    entry(0, "proj", ("o", torch.bfloat16, 8)),
    entry(1, "fc1", ("gate", torch.bfloat16, 4), ("up", torch.bfloat16, 4)),
    entry(1, "head", ("embed", torch.bfloat16, 50)),
]


def test_buckets_are_of_one_stage_and_have_every_tensor_once() -> None:
    buckets = plan_buckets(PLAN, 32)
    assert [(bucket.stage, [part.name for part in bucket.entries], bucket.size) for bucket in buckets] == [
        (0, ["embedding"], 100),
        (0, ["qkv", "norm"], 30),
        (0, ["proj"], 16),
        (1, ["fc1"], 16),
    ]
    # The widest elements come first.
    assert [tensor.name for tensor in buckets[1].tensors] == ["norm", "q", "k", "v"]


def test_chosen_parameters_alone() -> None:
    (bucket,) = plan_buckets(PLAN, 1000, only={"norm", "proj"})
    assert [tensor.name for tensor in bucket.tensors] == ["norm", "o"]
    # A tied head that nobody else sends is sent.
    (bucket,) = plan_buckets(PLAN, 1000, only={"head"})
    assert bucket.stage == 1 and plan_buckets(PLAN, 1000, only={}) == []


def test_a_bucket_is_split_into_what_was_put_end_to_end() -> None:
    wide, narrow = torch.randn(2, 3), torch.randn(5).to(torch.bfloat16)
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in (wide, narrow)])
    views = split_bucket(flat, [torch.float32, torch.bfloat16], [(2, 3), (5,)])
    assert torch.equal(views[0], wide) and torch.equal(views[1], narrow)
    views[1].zero_()
    assert not flat[24:].any()
