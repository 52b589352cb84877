"""The checkpoint that a run goes on from: which one it is, whether it is as it was written, and how far the run had
come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from dasd_megatron.algorithms import EntropySwitch
from dasd_megatron.files import RunDirectoryError
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.rollout.buffer import BufferState, Counts
from dasd_megatron.samples import ReplayError
from dasd_megatron.training.checkpoint_files import (
    LATEST,
    CheckpointError,
    changed_file,
    checkpoints_folder,
    listed_files,
    lost_checkpoints,
    named_latest,
    read_record,
    recover_replaced,
    resumable,
    set_aside,
    step_of,
)
from dasd_megatron.training.parallel import PeerError, broadcast_from_rank0, gather_world, on_selected_rank

COUNTERS = ("skipped", "discarded", "rollbacks", "rolled_back_to")
"""The fields of a TrainerState, beside its step, that are numbers."""
_READ_ERRORS = (CheckpointError, RunDirectoryError, WeightsError, ReplayError, OSError)

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class TrainerState:
    """The progress of a run: ``step`` finished steps, and the rollouts under way (on rank 0).

    ``skipped``: number of the last steps in a row that were skipped; ``rollbacks``: times that the run went back to a
    checkpoint, the last time to that of step ``rolled_back_to`` (-1: never); ``discarded``: replayed steps that were
    undone by it, and are not used again. ``teacher_switch``: for the methods that have one.
    """

    step: int = 0
    rollouts: BufferState = field(default_factory=BufferState)
    skipped: int = 0
    discarded: int = 0
    rollbacks: int = 0
    rolled_back_to: int = -1
    teacher_switch: EntropySwitch = field(default_factory=EntropySwitch)


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """Return the checkpoint that ``resume`` (none, auto or a path) means, once every file of it has been compared with
    its manifest; None where there is none. Collective: each rank reads its share of the files.

    With auto, a damaged checkpoint is named in a warning and set aside, and the one before it is taken.

    Raises:
        CheckpointError: the one at the path is damaged, or all are.
    """
    if resume == "none":
        return None
    if resume != "auto":
        problem = damage(Path(resume))
        if problem is not None:
            raise CheckpointError(f"resume={resume}: {problem}; restore it, or name another checkpoint")
        do_on_rank0(lambda: _check_not_behind(Path(resume), run_dir))
        return Path(resume)
    candidates = answer_of_rank0(lambda: _candidates(run_dir))
    problems: list[str] = []
    for path in candidates:
        problem = damage(path)
        if problem is None:
            _take(path, candidates[: len(problems)], problems)
            return path
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is intact: {'; '.join(problems)}; restore one, or write another run.dir; this "
            "one is left as it is"
        )
    return None


def damage(path: Path) -> str | None:
    """Return a line about the first damaged file of a checkpoint, None if it is intact. Collective: each rank reads its
    share of the files."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def look() -> dict[str, dict[str, Any]]:
        files = listed_files(path)
        step = read_record(path)["step"]
        if path.name.removeprefix("step_").isdigit() and step_of(path) != step:
            raise CheckpointError(f"{path} holds step {step}: give it back its name")
        return files

    try:
        names = sorted(answer_of_rank0(look).items())
    except CheckpointError as error:
        return str(error)
    return next((problem for problem in gather_world(changed_file(path, dict(names[rank::world]))) if problem), None)


def read_state(path: Path) -> tuple[TrainerState, dict[str, Any]]:
    """Return the contents of a checkpoint's ``trainer.json``, as state and whole. Collective over all ranks: rank 0
    reads. Raises CheckpointError."""
    record = answer_of_rank0(lambda: read_record(path))
    rollouts = BufferState(record["position"], record["pending"], counts=Counts(**record["collected"]))
    counters = {name: record[name] for name in ("step", *COUNTERS)}
    # Checkpoints of versions without a switch have none.
    switch = record.get("teacher_switch", {"warm_up": [], "is_on": False})
    switch = EntropySwitch(tuple(map(float, switch["warm_up"])), switch["is_on"])
    return TrainerState(rollouts=rollouts, teacher_switch=switch, **counters), record


def answer_of_rank0(work: Callable[[], T]) -> T:
    """Return on all ranks what ``work`` returns on rank 0; CheckpointError where it fails. Collective."""
    return broadcast_from_rank0(do_on_rank0(work))


def do_on_rank0(work: Callable[[], T]) -> T | None:
    """Do ``work`` on rank 0 alone, which gets what it returns; CheckpointError on all ranks where it fails.
    Collective."""
    try:
        return on_selected_rank(dist.get_rank() == 0, work, _READ_ERRORS)
    except PeerError as error:
        raise CheckpointError(str(error).partition(": ")[2]) from error


def _candidates(run_dir: Path) -> list[Path]:
    """Return the checkpoints that a run may go on from, newest first; CheckpointError where it has had some and none is
    left, since it would otherwise start over."""
    recover_replaced(run_dir)
    found = resumable(run_dir)
    trace = None if found else lost_checkpoints(run_dir)
    if trace is not None:
        raise CheckpointError(
            f"{run_dir} has had checkpoints ({trace}), and no complete one is in {checkpoints_folder(run_dir)}: "
            "restore one, or write another run.dir; this one is left as it is"
        )
    return found


def _take(path: Path, damaged: Sequence[Path], problems: Sequence[str]) -> None:
    """Set the ``damaged`` checkpoints aside for the intact one at ``path``, which is older, and say so. Collective."""
    do_on_rank0(lambda: _set_aside(path, damaged, problems))


def _set_aside(path: Path, damaged: Sequence[Path], problems: Sequence[str]) -> None:
    for other, problem in zip(damaged, problems, strict=True):
        logger.warning(
            "%s: this checkpoint is damaged and set aside as %s, one before it is taken", problem, set_aside(other).name
        )
    named = named_latest(path.parent.parent)
    if named != path.name and not damaged:
        logger.warning(
            "%s: %s is the newest complete checkpoint, and is taken",
            f"{path.parent / LATEST} {'cannot be read' if named is None else f'names {ascii(named)}'}",
            path.name,
        )


def _check_not_behind(path: Path, run_dir: Path) -> None:
    """Refuse (CheckpointError) to go on from another run's checkpoint in a run directory with checkpoints of later
    steps: they would be taken for newer ones, and kept in place of those to come."""
    later = [own for own in resumable(run_dir) if step_of(own) > read_record(path)["step"]]
    if later and path.resolve().parent != checkpoints_folder(run_dir).resolve():
        raise CheckpointError(
            f"resume={path} is of another run than {run_dir}, which has the later {later[0].name}: write resume=auto "
            "to go on with that one, or another run.dir"
        )
