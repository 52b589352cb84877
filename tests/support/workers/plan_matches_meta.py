"""Parameters of single ranks of large models, on the meta device in a fake process group of the full world, against the
plan's."""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

cases = json.loads(sys.argv[1])
backend.select(load_config(["experiment=quickstart"]).backend)

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from dasd_megatron.models.convert import meta_chunks  # noqa: E402
from dasd_megatron.planning.estimate import Architecture, chunk_parameters, total_parameters  # noqa: E402
from dasd_megatron.planning.plan import plan_config  # noqa: E402
from dasd_megatron.training.rehearsal import as_rank  # noqa: E402

for overrides, rank, published in cases:
    config = plan_config(overrides)
    hf_config = AutoConfig.for_model(**config.model.architecture)
    with as_rank(config.parallel, rank):
        _, chunks = meta_chunks(hf_config, torch.bfloat16)
        stage = parallel_state.get_pipeline_model_parallel_rank()
    arch = Architecture.of(hf_config)
    found = [[(p.numel(), bool(getattr(p, "shared_embedding", False))) for p in chunk.parameters()] for chunk in chunks]
    predicted = chunk_parameters(arch, config.parallel, stage)
    assert [[size for size, _ in chunk] for chunk in predicted] == [[size for size, _ in chunk] for chunk in found], (
        overrides,
        rank,
    )
    assert predicted == found, (overrides, rank, [p for p in zip(predicted, found, strict=True)])
    if published is not None:
        assert total_parameters(arch) == published, (overrides, total_parameters(arch))
    print(overrides, rank, sum(size for chunk in found for size, _ in chunk), flush=True)
