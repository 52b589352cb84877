"""Evaluation: Avg@k, Pass@k and Maj@k."""

from dasd_megatron.evaluation.metrics import avg_at_k, maj_at_k, pass_at_k

__all__ = ["avg_at_k", "maj_at_k", "pass_at_k"]
