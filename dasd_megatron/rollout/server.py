"""Entry point of the embedded rollout server: ``python -m dasd_megatron.rollout.server``."""

import faulthandler
import signal
import sys

if __name__ == "__main__":
    # A start that takes too long is asked where it stands, and imports are most of a start.
    faulthandler.register(signal.SIGUSR2)
    from dasd_megatron.rollout.embedded.server import main

    sys.exit(main())
