"""Credit assignment: from per-token statistics and rewards to per-token advantages.

The public names are imported where they are first used, so that the table of methods comes without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasd_megatron.algorithms.advantage import group_relative_advantage, token_advantages
    from dasd_megatron.algorithms.credit import (
        GAP_LIMIT,
        Credit,
        NonFiniteTokenError,
        context_parallel_credit,
        direction_adaptive_credit,
        gather_packed_tokens,
    )
    from dasd_megatron.algorithms.credit_sums import CreditStatistics, credit_metrics, credit_statistics
    from dasd_megatron.algorithms.gates import PUSH_GATES, PushGate
    from dasd_megatron.algorithms.methods import METHODS, Method, MethodSettings, RolloutFacts
    from dasd_megatron.algorithms.switch import EntropySwitch

__all__ = [
    "GAP_LIMIT",
    "METHODS",
    "PUSH_GATES",
    "Credit",
    "CreditStatistics",
    "EntropySwitch",
    "Method",
    "MethodSettings",
    "NonFiniteTokenError",
    "PushGate",
    "RolloutFacts",
    "context_parallel_credit",
    "credit_metrics",
    "credit_statistics",
    "direction_adaptive_credit",
    "gather_packed_tokens",
    "group_relative_advantage",
    "token_advantages",
]
# The lightest module is tried first, so that a name of a table loads no torch.
_MODULES = ("methods", "gates", "switch", "credit", "credit_sums", "advantage")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            members = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in members:
                return members[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
