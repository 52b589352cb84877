"""Export of the policy as a Hugging Face directory: for the rollout servers, after the warm start, and as the result of
the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from dasd_megatron.models.bridge import export_hf
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.models.weight_formats import PLAIN, WeightFormat
from dasd_megatron.training.parallel import PeerError, on_selected_rank


class ExportError(RuntimeError):
    """The weights could not be written. Raised on every rank; the latest checkpoint is usable."""

    on_all_ranks = True


class Policy(NamedTuple):
    """The policy as the rollout servers are to serve it.

    version: name of its present weights. template_dir: Hugging Face directory that its tokenizer and config come from.
    """

    model: ShardedModel
    version: str
    template_dir: Path


class StoredWeights(NamedTuple):
    """A Hugging Face directory, and the version of the weights in it."""

    path: Path
    version: str


class WeightDirectory:
    """The newest weights of a run that are on disk for servers to read, in ``root/<version>``, in the form ``form``.

    A server of the trainer's own starts from them, however it gets its later weights. All ranks hold the same versions.
    """

    def __init__(self, root: Path, form: WeightFormat = PLAIN) -> None:
        self.root, self.form = root, form
        self._newest: StoredWeights | None = None

    @property
    def newest(self) -> StoredWeights:
        """The weights that were written last."""
        if self._newest is None:
            raise RuntimeError(f"no weights have been written to {self.root} yet")
        return self._newest

    def is_empty(self) -> bool:
        """Return whether this process has written nothing yet."""
        return self._newest is None

    def holds(self, version: str | None) -> bool:
        """Return whether the newest weights are ``version``."""
        return self._newest is not None and self._newest.version == version

    def write(self, policy: Policy) -> None:
        """Write the policy's weights and remove older ones. Collective over all ranks; raises ExportError."""
        path = self.root / policy.version
        # They live until the next version: hashes would cost a pass over the bytes, and nobody would read them.
        export_model(policy.model, path, template_dir=policy.template_dir, manifest=False, form=self.form)
        if dist.get_rank() == 0:
            for old in self.root.iterdir():
                # What somebody else has put there is left.
                if old != path and old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
        self._newest = StoredWeights(path, policy.version)


def export_model(
    model: ShardedModel, path: Path, *, template_dir: Path, manifest: bool = True, form: WeightFormat = PLAIN
) -> None:
    """Write the policy to ``path`` in its own dtype, with the tokenizer and config of ``template_dir``. Collective over
    all ranks.

    ``manifest``: with hashes of the tensors, for a directory that is to be kept. ``form``: what its tensors are turned
    into.

    Raises:
        ExportError: rank 0 could not write.
    """
    finish = export_hf(
        model.bridge,
        model.chunks,
        path,
        template_dir=template_dir,
        dtype=model.config.params_dtype,
        manifest=manifest,
        form=form,
    )
    try:
        on_selected_rank(dist.get_rank() == 0, finish, (OSError, WeightsError))
    except PeerError as error:
        raise ExportError(
            f"could not write the weights to {path}: {error}; free disk space and continue with resume=auto"
        ) from error
