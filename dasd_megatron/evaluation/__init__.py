"""Evaluation: Avg@k, Pass@k and Maj@k."""

from dasd_megatron.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k

__all__ = ["avg_at_k", "maj_at_k", "pass_at_k"]
