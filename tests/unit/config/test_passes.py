"""The update's forward pass scores the rollouts only where it can: the reason why not is named."""

from __future__ import annotations

import dataclasses

import pytest

from dasd_megatron.config import Config, load_config, why_scored_first

DISTRIBUTIONAL = ["algorithm.objective=distributional", "algorithm.divergence_top_k=5"]


def config_of(*overrides: str) -> Config:
    return load_config(["experiment=quickstart", "batch.minibatches=1", "batch.epochs=1", *overrides])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], None),
        (["loss.importance_sampling=sequence", "loss.kl_coef=0.1", "batch.packing=true"], None),
        (["algorithm=antisd"], None),
        (DISTRIBUTIONAL, None),
        (["loss.fused_linear=false"], None),
        (["loss.share_pass=never"], "loss.share_pass=never"),
        (["batch.minibatches=2", "batch.epochs=3"], "batch.minibatches x batch.epochs = 6"),
        (["loss.rejection=token"], "rejection"),
        (["loss.rejection_veto=1e-4"], "rejection"),
        (["algorithm=srpo"], "algorithm.name=srpo"),
        ([*DISTRIBUTIONAL, "algorithm.divergence_top_k_of=student"], "algorithm.divergence_top_k_of=student"),
        (["algorithm.divergence_top_k_of=student"], None),
    ],
)
def test_what_needs_the_scores_first(overrides: list[str], reason: str | None) -> None:
    found = why_scored_first(config_of(*overrides))
    assert found is None if reason is None else found is not None and found.startswith(reason), found


def test_context_parallel_ranks_have_parts_of_rollouts() -> None:
    config = config_of()
    config.parallel = dataclasses.replace(config.parallel, context_parallel_size=2)
    assert "context parallelism" in (why_scored_first(config) or "")
