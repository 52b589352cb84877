"""The division of the model's layers among pipeline stages."""

from __future__ import annotations

from dasd_megatron.config.schema_training import ParallelConfig
from dasd_megatron.errors import ConfigError


def stage_layers(parallel: ParallelConfig, num_layers: int, source: str = "num_hidden_layers") -> list[int]:
    """Return the number of layers of each pipeline stage, over all its chunks.

    Args:
        parallel: numbers of stages and chunks, and of layers at the two ends.
        num_layers: of the whole model.
        source: where the number of layers is written, for the message.

    Raises:
        ConfigError: the stages in the middle, or the chunks of a stage, would not get equal numbers of layers.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.first_pipeline_num_layers, parallel.last_pipeline_num_layers
    if first is None and last is None and num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size = {stages} does not divide {source}: write a divisor of it, or "
            "give the first or last stage another number by parallel.first_pipeline_num_layers or "
            "last_pipeline_num_layers"
        )
    middle = stages - (first is not None) - (last is not None)
    remaining = num_layers - (first or 0) - (last or 0)
    if remaining < middle or (remaining % middle if middle else remaining):
        raise ConfigError(
            f"parallel.first_pipeline_num_layers={first} and last_pipeline_num_layers={last} leave {remaining} layers "
            f"of {source} to {middle} other pipeline stages: each needs the same number of them, and at least one"
        )
    layers = [remaining // middle if middle else 0] * stages
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    for count in layers:
        if count % chunks:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size={chunks} does not divide the {count} layers of a "
                f"stage ({source}): write a divisor of them"
            )
    return layers
