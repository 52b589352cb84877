"""One rank of a ``gloo_pool.GlooPool``: run the checks that come through a connection until it ends."""

import datetime
import importlib
import sys
import traceback
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

# A rank that fails leaves the others in a collective for as long as the group's own limit.
COLLECTIVE_SECONDS = 20


def serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    while True:
        try:
            module, name, case, message = connection.recv()
        except EOFError:
            break
        try:
            getattr(importlib.import_module(module), name)(rank, world_size, case, message)
            connection.send(None)
        # Whatever a check raises is the test's result, and is raised again in the parent.
        except Exception:
            connection.send(traceback.format_exc()[-3000:])
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Connection(int(sys.argv[4])))
