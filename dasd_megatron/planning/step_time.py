"""The seconds of a step of the whole run, by a model: training, rollouts, weight sync, saving and evaluation, and which
of them bounds it."""

from __future__ import annotations

from dataclasses import dataclass

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.lengths import Lengths
from dasd_megatron.planning.rollouts import RolloutTime, Servers, evaluation_time, rollout_time
from dasd_megatron.planning.storage import Saving, evaluations_of, saving_time, sync_time
from dasd_megatron.planning.training_time import TrainingTime


@dataclass(frozen=True)
class ServerTime:
    """Seconds of what the servers do: the rollouts of a step, one evaluation, and taking new weights."""

    servers: Servers
    rollouts: RolloutTime
    evaluation: float
    sync: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by its parts. ``saving`` and ``evaluation`` are what they add to a step on average.

    ``ahead``: rollouts of the next step are sampled while this one trains, so the longer of the two counts.
    """

    training: TrainingTime
    served: ServerTime
    checkpoint: Saving
    saving: float
    evaluation: float
    ahead: bool

    @property
    def seconds(self) -> float:
        """Seconds of a step, on average over the run."""
        work = work_seconds(self.training.total, self.served.rollouts.seconds, ahead=self.ahead)
        return work + self.served.sync + self.saving + self.evaluation

    @property
    def parts(self) -> dict[str, float]:
        """The seconds of each part, by its name."""
        return {
            "training": self.training.total,
            "rollouts": self.served.rollouts.seconds,
            "weight sync": self.served.sync,
            "saving": self.saving,
            "evaluation": self.evaluation,
        }

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def work_seconds(training: float, rollouts: float, *, ahead: bool) -> float:
    """Return the seconds of training and rollouts together, which take turns or run beside one another."""
    return max(training, rollouts) if ahead else training + rollouts


def server_time(
    config: Config, arch: Architecture, servers: Servers, lengths: Lengths, assumed: Assumptions
) -> ServerTime:
    """Return the times of ``servers``. They depend on the training layout by the room that it leaves alone."""
    return ServerTime(
        servers,
        rollout_time(config, arch, servers, lengths, assumed),
        evaluation_time(config, arch, servers, lengths, assumed) if evaluations_of(config) else 0.0,
        sync_time(arch, config, servers, assumed),
    )


def step_time(
    config: Config,
    arch: Architecture,
    training: TrainingTime,
    served: ServerTime,
    assumed: Assumptions,
) -> StepTime:
    """Return the time of a step whose training and whose servers take so long."""
    ahead = config.rollout.max_staleness > 0 and not served.servers.shared
    work = work_seconds(training.total, served.rollouts.seconds, ahead=ahead)
    checkpoint = saving_time(arch, config, assumed)
    return StepTime(
        training,
        served,
        checkpoint,
        saving=checkpoint.per_step(config.checkpoint.every, work + served.sync),
        evaluation=served.evaluation * evaluations_of(config) / max(1, config.run.steps),
        ahead=ahead,
    )
