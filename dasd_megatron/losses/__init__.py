"""Losses as pure functions on tensors: token statistics of vocabulary-parallel logits, surrogates, penalties.

The public names are imported where they are first used, so that the tables come without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasd_megatron.losses.divergences import DIVERGENCES, Divergence
    from dasd_megatron.losses.kernels import IMPLEMENTATIONS
    from dasd_megatron.losses.linear_stats import GradientSum, linear_token_stats
    from dasd_megatron.losses.mismatch import Rejected, importance_weights, reject
    from dasd_megatron.losses.policy import (
        aggregation_weights,
        count_trained,
        kl_k3,
        policy_surrogate,
        response_means,
        rollouts_of_tokens,
        routed_divergence,
    )
    from dasd_megatron.losses.statistics import EntryStats, TokenStats, TopK
    from dasd_megatron.losses.surrogates import AGGREGATIONS, REJECTIONS, SURROGATES, Bounds
    from dasd_megatron.losses.token_stats import vocab_parallel_token_stats
    from dasd_megatron.losses.top_k import top_k_divergence

__all__ = [
    "AGGREGATIONS",
    "DIVERGENCES",
    "IMPLEMENTATIONS",
    "REJECTIONS",
    "SURROGATES",
    "Bounds",
    "Divergence",
    "EntryStats",
    "GradientSum",
    "Rejected",
    "TokenStats",
    "TopK",
    "aggregation_weights",
    "count_trained",
    "importance_weights",
    "kl_k3",
    "linear_token_stats",
    "policy_surrogate",
    "reject",
    "response_means",
    "rollouts_of_tokens",
    "routed_divergence",
    "top_k_divergence",
    "vocab_parallel_token_stats",
]
# The lightest module is tried first, so that a name of a table loads no torch.
_MODULES = (
    *("divergences", "surrogates", "mismatch", "policy", "kernels", "statistics", "token_stats", "linear_stats"),
    "top_k",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            members = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in members:
                return members[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
