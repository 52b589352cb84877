"""Errors that a user can mend, and how a command reports them.

Such an error belongs to this package and is one line: what is wrong, where, and what to do. Any other error is a defect
and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dasd_megatron import stopping


def report_errors(work: Callable[[], None]) -> int:
    """Run ``work``; an error that the user can mend is one line on standard error and exit status 1, anything else a
    traceback.

    A run that a signal has stopped has exit status 75, and one that the watch has stopped 76.
    """
    try:
        work()
    except stopping.StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"dasd: {stop}", file=sys.stderr, flush=True)
        return stop.exit_status
    except Exception as error:
        # Errors that name a cause and a remedy are this package's own; others are defects and keep their traceback.
        if type(error).__module__.startswith("dasd_megatron."):
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                print(f"dasd: error: {error}", file=sys.stderr, flush=True)
            elif not getattr(error, "on_all_ranks", False):
                print(f"dasd: error on rank {rank}: {error}", file=sys.stderr, flush=True)
            return 1
        raise
    return 0


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line that names the field and the fix."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
