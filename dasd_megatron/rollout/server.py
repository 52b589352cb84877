"""Entry point of the embedded rollout server: ``python -m dasd_megatron.rollout.server``."""

import sys

from dasd_megatron.rollout.embedded.server import main

if __name__ == "__main__":
    sys.exit(main())
