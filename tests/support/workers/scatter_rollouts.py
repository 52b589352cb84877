"""Every rank of a replica gets the replica's own samples, and nobody else's."""

import json
import random
import sys

import numpy as np

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(["experiment=quickstart", *arguments["overrides"]])
backend.select(config.backend)

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from dasd_megatron.sample_columns import from_columns, to_columns  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from tests.support.random_samples import random_group  # noqa: E402

parallel.initialize(config)
draw, replicas = random.Random(arguments["seed"]), config.parallel.data_parallel_size
shares = [random_group(draw, replica, 3 + replica) for replica in range(replicas)]
parts = None
if dist.get_rank() == 0:
    parts = [
        parallel.Part({**to_columns(share, with_teacher=True), "none": np.zeros(0, np.int32)}, {"place": place})
        for place, share in enumerate(shares)
    ]
got = parallel.scatter_to_replicas(parts)
replica = parallel_state.get_data_parallel_rank()
assert got.facts == {"place": replica} and len(got.arrays["none"]) == 0 and got.arrays["none"].dtype == np.int32
assert from_columns(got.arrays) == shares[replica]
dist.barrier()
dist.destroy_process_group()
