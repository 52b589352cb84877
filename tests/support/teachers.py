"""Makers of teacher's prompts for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dasd_megatron.config import TeacherConfig
from dasd_megatron.data.privileged import Privileged
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import PromptRenderer


def teacher_of(
    renderer: PromptRenderer,
    *privileged: str,
    problems: Sequence[Problem] = (),
    seed: int = 0,
    max_tokens: int = 100_000,
    vocab_size: int | None = None,
    **settings: Any,
) -> TeacherPrompts:
    """Return the maker of a teacher that is shown ``privileged``, the solution where none is named."""
    config = TeacherConfig(privileged=list(privileged or ("solution",)), **settings)
    return TeacherPrompts(config, renderer, problems, seed, max_tokens, vocab_size)


def solution_of(problem: Problem) -> Privileged:
    """Return a problem's solution as a teacher is shown it."""
    return Privileged("solution", problem.reference_solution)
