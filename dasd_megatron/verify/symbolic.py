"""The work of a grading process: math-verify on a pair of answers.

Every worker imports this module, so it must stay light and not import torch.
"""

from __future__ import annotations

import logging
import math
import resource
import signal
from typing import Any

from dasd_megatron.verify.answers import for_algebra

MEMORY_LIMIT_BYTES = 4 << 30
_ORPHAN_GRACE_SECONDS = 5


def prepare_worker() -> None:
    """Load math-verify and bound what an answer can do to the machine."""
    # The pool stops a worker by SIGTERM. A handler in Python would wait for the end of, say, a giant integer power. The
    # default action does not.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # math-verify warns once per process that its timeouts are off. The pool has timeouts of its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    import math_verify

    math_verify.parse("$1$", parsing_timeout=None)
    # "9^{9^{9^{9}}}" asks for more memory than any machine has; math-verify turns the MemoryError into "not equal".
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def symbolically_equal(predicted: str, expected: str, timeout_seconds: float) -> bool:
    """Return whether math-verify finds the two answers equal. The caller kills the worker at ``timeout_seconds``."""
    import math_verify

    # If the caller itself is killed while an answer hangs, only the kernel is left to stop this process.
    signal.alarm(math.ceil(timeout_seconds) + _ORPHAN_GRACE_SECONDS)
    try:
        gold = _parse(expected)
        return bool(gold) and bool(math_verify.verify(gold, _parse(predicted), timeout_seconds=None))
    finally:
        signal.alarm(0)


def _parse(answer: str) -> list[Any]:
    import math_verify

    parsed: list[Any] = math_verify.parse(f"\\boxed{{{for_algebra(answer)}}}", parsing_timeout=None)
    return parsed
