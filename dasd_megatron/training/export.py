"""The policy as a Hugging Face directory: for the rollout servers, after the warm start, and as the result of the
run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dasd_megatron.models.bridge import export_hf
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.training.parallel import PeerError, on_selected_rank


class ExportError(RuntimeError):
    """The weights could not be written. Raised on every rank; the latest checkpoint is usable."""

    on_all_ranks = True


def export_model(model: ShardedModel, path: Path, *, template_dir: Path, manifest: bool = True) -> None:
    """Write the policy to ``path`` in its own dtype, with the tokenizer and config of ``template_dir``. Collective over
    all ranks.

    ``manifest``: with hashes of the tensors, for a directory that is to be kept.

    Raises:
        ExportError: rank 0 could not write.
    """
    finish = export_hf(
        model.bridge, model.chunks, path, template_dir=template_dir, dtype=model.config.params_dtype, manifest=manifest
    )
    try:
        on_selected_rank(dist.get_rank() == 0, finish, (OSError, WeightsError))
    except PeerError as error:
        raise ExportError(
            f"could not write the weights to {path}: {error}; free disk space and continue with resume=auto"
        ) from error
