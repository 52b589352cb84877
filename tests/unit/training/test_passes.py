"""Metrics of a loss travel by the names that it gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasd_megatron import backend
from dasd_megatron.losses import TokenStats
from dasd_megatron.training import passes
from dasd_megatron.training.batching import BatchLayout, make_micro_batches


def a_loss(stats: TokenStats, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = torch.arange(10.0)[index]
    loss = (stats.log_prob * weights).sum()
    return loss, {"loss": loss, "weight": weights.sum(), "a_share": (weights > 2).sum()}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collectives of a single rank; the names of those that were called."""
    called: list[str] = []

    def collective(name: str) -> None:
        def pass_on(tensor: torch.Tensor) -> torch.Tensor:
            called.append(name)
            return tensor

        monkeypatch.setattr(passes, name, pass_on)

    for name in ("broadcast_from_last_stage", "sum_over_sequence_parts", "reduce_over_replicas"):
        collective(name)
    monkeypatch.setattr(backend, "current", lambda: SimpleNamespace(device=lambda: torch.device("cpu")))
    return called


@pytest.mark.parametrize("token", [-1, 50])
def test_a_response_token_outside_the_vocabulary_is_refused_before_the_pass(token: int) -> None:
    batches = make_micro_batches([[1], [1]], [[49, 3], [0, token]], BatchLayout(micro_batch_size=1))
    model: Any = SimpleNamespace(vocab_size=50)
    with pytest.raises(
        ValueError, match=f"range from {min(token, 0)} to {max(token, 0)}, outside the vocabulary of 50"
    ):
        passes.run_schedule(model, batches, lambda *_: None, forward_only=True)


def test_names_are_known_where_no_loss_is_computed() -> None:
    assert passes._reported_names(passes._by_tokens(a_loss), torch.device("cpu")) == ["loss", "weight", "a_share"]


def test_means_are_over_the_tokens_of_all_micro_batches(one_rank: list[str]) -> None:
    log_prob = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    reports = []
    for index in (torch.tensor([3, 0]), torch.tensor([1, 2])):
        _, sums = a_loss(TokenStats(log_prob[index], log_prob[index], None, None), index)
        reports.append({name: value.to(torch.float32) for name, value in sums.items()})
    means = passes._means_by_name(["loss", "weight", "a_share"], reports, count=4)
    assert means == {"loss": (-12 - 2 - 6) / 4, "weight": 6 / 4, "a_share": 1 / 4}
    assert one_rank == ["broadcast_from_last_stage", "sum_over_sequence_parts", "reduce_over_replicas"]


def test_a_stage_without_the_loss_takes_part_in_the_same_collectives(one_rank: list[str]) -> None:
    assert passes._means_by_name(["loss", "weight"], [], count=4) == {"loss": 0.0, "weight": 0.0}
    assert one_rank == ["broadcast_from_last_stage", "sum_over_sequence_parts", "reduce_over_replicas"]


def test_an_undocumented_order_of_names_does_not_mix_them_up(one_rank: list[str]) -> None:
    report = {"b": torch.tensor(1.0), "a": torch.tensor(2.0)}
    other = {"a": torch.tensor(4.0), "b": torch.tensor(3.0)}
    assert passes._means_by_name(["a", "b"], [report, other], count=2) == {"a": 3.0, "b": 2.0}
