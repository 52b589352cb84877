"""Verification: the final answer of a response against the expected one."""

from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.grader import Grader, GraderError, Verdict

__all__ = ["Grader", "GraderError", "Verdict", "extract_answer"]
