"""Credit assignment: from per-token statistics and rewards to per-token advantages."""

from __future__ import annotations

from dasd_megatron.algorithms.advantage import ALGORITHMS, group_relative_advantage, token_advantages
from dasd_megatron.algorithms.credit import (
    GAP_LIMIT,
    Credit,
    NonFiniteTokenError,
    context_parallel_credit,
    direction_adaptive_credit,
    gather_packed_tokens,
)
from dasd_megatron.algorithms.credit_metrics import CreditStatistics, credit_metrics, credit_statistics

__all__ = [
    "ALGORITHMS",
    "GAP_LIMIT",
    "Credit",
    "CreditStatistics",
    "NonFiniteTokenError",
    "context_parallel_credit",
    "credit_metrics",
    "credit_statistics",
    "direction_adaptive_credit",
    "gather_packed_tokens",
    "group_relative_advantage",
    "token_advantages",
]
