"""Parameters of single ranks of large models, on the meta device in a fake process group of the full world, against the plan's."""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

cases = json.loads(sys.argv[1])
backend.select(load_config(["experiment=quickstart"]).backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from dasd_megatron.models.convert import meta_chunks  # noqa: E402
from dasd_megatron.planning.command import plan_config  # noqa: E402
from dasd_megatron.planning.estimate import Architecture, chunk_parameters, total_parameters  # noqa: E402

for overrides, rank, published in cases:
    config = plan_config(overrides)
    parallel = config.parallel
    tensor, pipeline, data = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
    )
    hf_config = AutoConfig.for_model(**config.model.architecture)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * pipeline * data)
    parallel_state.initialize_model_parallel(
        tensor, pipeline, parallel.virtual_pipeline_model_parallel_size, create_gloo_process_groups=False
    )
    _, chunks = meta_chunks(hf_config, torch.bfloat16)
    arch = Architecture.of(hf_config)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = [[(p.numel(), bool(getattr(p, "shared_embedding", False))) for p in chunk.parameters()] for chunk in chunks]
    predicted = chunk_parameters(arch, config, stage)
    assert [[size for size, _ in chunk] for chunk in predicted] == [[size for size, _ in chunk] for chunk in found], (overrides, rank)
    assert predicted == found, (overrides, rank, [p for p in zip(predicted, found, strict=True)])
    if published is not None:
        assert total_parameters(arch) == published, (overrides, total_parameters(arch))
    print(overrides, rank, sum(size for chunk in found for size, _ in chunk), flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
