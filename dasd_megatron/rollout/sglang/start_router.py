"""Start sglang-router, as ``python -m sglang_router.launch_router`` does, with the interpreter of its own environment.

    python start_router.py ARGUMENTS

The router ends with the process that started it. Its API key, and that of its servers, comes from DASD_API_KEY, since
everybody on the machine can read a command line. This file imports nothing of this package, since the router's
environment does not have it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Start SGLang's router, which ends with its parent."""
    # A thread that waits for the parent's end would never run: the router does not give Python the interpreter back.
    # The kernel's signal works.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        from sglang_router.launch_router import launch_router, parse_router_args
    except ImportError as error:
        sys.exit(
            f"{sys.executable} has no sglang-router ({error}); name the interpreter of an environment that has it "
            "with --python"
        )
    key = os.environ.get("DASD_API_KEY")
    launch_router(parse_router_args(sys.argv[1:] + ([] if key is None else ["--api-key", key])))


if __name__ == "__main__":
    main()
