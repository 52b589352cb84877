"""The embedded server's cache and batch: how prompts are grouped and padded."""

from __future__ import annotations

import torch

from dasd_megatron.rollout.embedded.batch import PREFILL_TOKENS, GrowingLayer, pad_left, positions_of, prefill_groups
from dasd_megatron.rollout.embedded.requests import GenerateJob, Row


def testprefill_groups_bound_the_tokens_and_count_a_prompt_once():
    def rows(*prompts):
        return [Row(GenerateJob(), "", list(prompt), None, False, 0, 0) for prompt in prompts]

    long, short = [1] * (PREFILL_TOKENS // 2), [2] * 10
    assert [len(g) for g in prefill_groups(rows(long, long, long, long))] == [4]
    other = [3] * (PREFILL_TOKENS // 2)
    assert [len(g) for g in prefill_groups(rows(long, other, short, short))] == [2, 2]
    assert [len(g) for g in prefill_groups(rows([1] * (2 * PREFILL_TOKENS), short))] == [1, 1]


def test_a_growing_layer_holds_what_was_added():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 1, 100, 4, generator=generator)
    layer = GrowingLayer()
    layer.update(columns[:, :, :3], -columns[:, :, :3])
    for column in range(3, 100):
        new = columns[:, :, column : column + 1]
        keys, values = layer.update(new, -new)
        assert torch.equal(keys, columns[:, :, : column + 1]) and torch.equal(values, -keys)
    assert layer.buffers[0].shape[-2] > 100, "spare columns save a copy on most steps"


def test_padding_is_on_the_left_and_has_position_0():
    ids, mask = pad_left([[5, 6, 7], [8]], 4, torch.device("cpu"))
    assert ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert positions_of(mask).tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
