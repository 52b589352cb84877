"""Start sglang-router as ``python -m sglang_router.launch_router`` does: ``python router.py ARGUMENTS``, in its own
environment.

It ends with the process that started it. The API key of its servers, and its own, is that of DASD_API_KEY: everybody on
the machine can read a command line. Nothing of this package is imported, since the router's environment does not have
it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    # The kernel's signal, and no thread that waits for it: the router never gives Python the interpreter back.
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
