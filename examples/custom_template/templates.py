"""Prompts made in Python: the student's as text, the teacher's as a conversation."""

from dasd_megatron.data.prompts import Problem


def student(problem: Problem) -> str:
    """Return the sum with spaces around its signs."""
    return problem.problem.replace("+", " + ").replace("-", " - ").replace("=", " =")


def teacher(problem: Problem, privileged: str) -> list[dict[str, str]]:
    """Return a conversation: the question, the solution as its answer, and the question again."""
    question = {"role": "user", "content": student(problem)}
    return [question, {"role": "assistant", "content": privileged}, question]
