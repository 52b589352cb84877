"""The weights of a warm start's examples."""

from __future__ import annotations

import random
import secrets
from array import array

import torch

from dasd_megatron.data.examples import Example
from dasd_megatron.training.warm_start import _weigh


def test_the_mean_over_tokens_is_the_weighted_one_however_replicas_share() -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    examples = [
        Example(array("i", [1]), array("i", [5] * draw.randint(1, 9)), 10 ** draw.uniform(-3, 3)) for _ in range(8)
    ]
    losses = [[draw.random() for _ in example.response] for example in examples]
    wanted = sum(example.weight * sum(loss) for example, loss in zip(examples, losses, strict=True)) / sum(
        example.weight * len(loss) for example, loss in zip(examples, losses, strict=True)
    )
    tokens = sum(map(len, losses))
    for replicas in (1, 2, 4):
        share = 8 // replicas
        total = 0.0
        for first in range(0, 8, share):
            own = slice(first, first + share)
            batch = _weigh(examples, own, torch.device("cpu"))
            assert batch.weights is not None
            flat = torch.tensor([value for loss in losses[own] for value in loss], dtype=torch.float64)
            total += float((flat * batch.weights).sum())
        assert abs(total / tokens - wanted) < 1e-6 * wanted


def test_equal_weights_change_nothing() -> None:
    examples = [Example(array("i", [1]), array("i", [5] * length), 1.0) for length in (1, 3, 7)]
    batch = _weigh(examples, slice(0, 3), torch.device("cpu"))
    assert batch.weights is not None and bool((batch.weights == 1.0).all())
