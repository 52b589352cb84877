"""Losses as pure functions on tensors: token statistics of vocabulary-parallel logits, policy surrogate, penalties."""

from __future__ import annotations

from dasd_megatron.losses.kernels import IMPLEMENTATIONS
from dasd_megatron.losses.linear_stats import linear_token_stats
from dasd_megatron.losses.policy import importance_weights, kl_k3, policy_surrogate, routed_divergence
from dasd_megatron.losses.statistics import DIVERGENCES, TokenStats
from dasd_megatron.losses.token_stats import vocab_parallel_token_stats

__all__ = [
    "DIVERGENCES",
    "IMPLEMENTATIONS",
    "TokenStats",
    "importance_weights",
    "kl_k3",
    "linear_token_stats",
    "policy_surrogate",
    "routed_divergence",
    "vocab_parallel_token_stats",
]
