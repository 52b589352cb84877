"""Bytes on disk of a run, and the seconds of saving and of handing weights to the servers, by a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.estimate import DTYPE_BYTES, Architecture, total_parameters
from dasd_megatron.planning.rollouts import Servers

_FP32 = 4
# The newest weights that servers read, and those that take their place.
_WEIGHT_DIRECTORIES = 2


@dataclass(frozen=True)
class Storage:
    """Bytes on disk. ``checkpoints`` is the most that the run has at once, the one that is being written included;
    ``weights`` are those that servers read, and ``exports`` all Hugging Face directories at the end of the run."""

    checkpoint: float
    checkpoints: float
    weights: float
    exports: float

    @property
    def total(self) -> float:
        """Bytes of all of them."""
        return self.checkpoints + self.weights + self.exports


def checkpoint_bytes(arch: Architecture, config: Config) -> float:
    """Return the bytes of one checkpoint: the weights, Adam's two moments, float32 weights where the model's have
    another type, and the teacher's weights where it has some of its own that change."""
    width = DTYPE_BYTES[config.precision.params_dtype]
    each = width + 2 * _FP32 + (_FP32 if width != _FP32 else 0)
    each += {"ema": _FP32, "snapshot": width}.get(config.teacher.weights, 0)
    tables = arch.hidden * (1 if arch.tied else 2)
    padding = arch.padded_vocab(config.parallel.tensor_model_parallel_size) - arch.vocab
    return float((total_parameters(arch) + padding * tables) * each)


def storage_of(arch: Architecture, config: Config) -> Storage:
    """Return the bytes that the run needs on disk for weights. Rollouts, logs and data come on top."""
    one = checkpoint_bytes(arch, config)
    exported = total_parameters(arch) * DTYPE_BYTES[config.precision.params_dtype]
    every = config.checkpoint.export_every
    # The last step's model is exported in any case.
    exports = 1 + (config.run.steps // every if every else 0)
    weights = _WEIGHT_DIRECTORIES * exported if config.rollout.weight_sync == "disk" else 0
    return Storage(one, one * checkpoints_at_once(config), weights, exports * exported)


def checkpoints_at_once(config: Config) -> int:
    """Return the most checkpoints that the run has on disk at once: the newest, those that are kept for good, and the
    one that is being written."""
    settings, steps = config.checkpoint, config.run.steps
    # The last step is saved in any case.
    every = settings.every or max(1, steps)
    saved = max(1, math.ceil(steps / every))
    newest = min(saved, settings.keep_last + 1)
    if not settings.keep_every:
        return newest
    last_multiple = saved if steps % every == 0 else saved - 1
    older = (last_multiple - newest + (steps % every != 0)) * every
    return newest + max(0, older) // math.lcm(every, settings.keep_every)


@dataclass(frozen=True)
class Saving:
    """Seconds of a checkpoint: ``stall``, in which training waits, and ``writing``, in which files are written."""

    stall: float
    writing: float

    def per_step(self, every: int, step: float) -> float:
        """Return the seconds that checkpoints add to a step of ``step`` seconds, on average over the steps between
        two of them. The next checkpoint waits for the files of the one before."""
        return (self.stall + max(0.0, self.writing - every * step)) / every if every else 0.0


def saving_time(arch: Architecture, config: Config, assumed: Assumptions) -> Saving:
    """Return the time of one checkpoint, which every rank writes a part of."""
    written, ranks = checkpoint_bytes(arch, config), config.parallel.world_size
    writing = written / min(assumed.disk_write, ranks * assumed.process_write)
    if not config.checkpoint.async_save:
        return Saving(writing, 0.0)
    return Saving(written / ranks / (assumed.host_link * assumed.link_share), writing)


def sync_time(arch: Architecture, config: Config, servers: Servers, assumed: Assumptions) -> float:
    """Return the seconds of handing the weights to all servers. Every GPU of a server receives all of them, whoever
    sends them."""
    quantised = config.rollout.weight_format == "fp8_blockwise"
    sent = float(total_parameters(arch) * (1 if quantised else DTYPE_BYTES[config.precision.params_dtype]))
    way = config.rollout.weight_sync
    if way == "disk":
        # Servers of one node read a file from the shared disk once.
        return sent / min(assumed.disk_write, assumed.process_write) + servers.nodes * sent / assumed.disk_read
    return sent / ((assumed.host_link if way == "tensor" else assumed.network) * assumed.link_share)


def evaluations_of(config: Config) -> int:
    """Return the number of evaluations within the run."""
    settings, steps = config.evaluation, config.run.steps
    later = max(0, steps - 1) // settings.every if settings.every else 0
    return int(settings.before) + later + int(settings.after)
