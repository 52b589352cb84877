"""Losses as pure functions on tensors: token statistics of vocabulary-parallel logits, policy surrogate, KL penalty."""

from __future__ import annotations

from dasd_megatron.losses.policy import kl_k3, policy_surrogate
from dasd_megatron.losses.token_stats import DIVERGENCES, TokenStats, vocab_parallel_token_stats

__all__ = ["DIVERGENCES", "TokenStats", "kl_k3", "policy_surrogate", "vocab_parallel_token_stats"]
