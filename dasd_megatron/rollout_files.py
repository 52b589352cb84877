"""Files of rollouts, which training writes and replay, reports and resumed runs read.

A file is of safetensors, and its tensors are the columns of :mod:`~dasd_megatron.sample_columns`. A step's rollouts are
in one file, or in one of each data-parallel replica. Files of earlier versions, with one JSON object a line, are read
too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError

from dasd_megatron.errors import first_line
from dasd_megatron.files import atomic_file
from dasd_megatron.reading import ROWS_FILE_BYTES, UnreadableError, read_bytes
from dasd_megatron.rollout_json import ADVICE, read_json_samples
from dasd_megatron.sample_columns import Columns, columns_fault, from_columns, to_columns
from dasd_megatron.samples import ReplayError, Sample, sample_fault

_STEP_FILE = re.compile(r"step_([0-9]{6,15})(?:-([0-9]{5})-of-([0-9]{5}))?\.(safetensors|jsonl)")


def rollouts_path(folder: str | Path, step: int, replica: int = 0, replicas: int = 1) -> Path:
    """Return the file of what data-parallel ``replica`` of ``replicas`` has of training step ``step`` (counted from
    1)."""
    part = "" if replicas == 1 else f"-{replica + 1:05d}-of-{replicas:05d}"
    return Path(folder) / f"step_{step:06d}{part}.safetensors"


def whole_steps(names: Sequence[str]) -> dict[int, list[str]]:
    """Return the names of the files of each step whose rollouts are there in whole, steps and files in order.

    Columns count before JSON, and of files of several layouts those of the most replicas: whoever writes a step removes
    what is there of other layouts.
    """
    found: dict[int, dict[int, list[str]]] = {}
    for name in sorted(names):
        if (match := _STEP_FILE.fullmatch(name)) is not None:
            parts = 0 if match[4] == "jsonl" else int(match[3] or 1)
            found.setdefault(int(match[1]), {}).setdefault(parts, []).append(name)
    steps = {}
    for step, layouts in sorted(found.items()):
        whole = [parts for parts, files in layouts.items() if len(files) == max(parts, 1)]
        if whole:
            steps[step] = layouts[max(whole)]
    return steps


def remove_other_layouts(folder: Path, step: int, replicas: int) -> None:
    """Remove files of a step that runs of another number of replicas have left in ``folder``, or earlier versions."""
    kept = {rollouts_path(folder, step, replica, replicas).name for replica in range(replicas)}
    for path in folder.glob(f"step_{step:06d}*"):
        if _STEP_FILE.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def save_columns(path: Path, columns: Columns) -> None:
    """Write columns; the file appears whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        # The library's own function for files raises no OSError where the disk is full.
        partial.write_bytes(safetensors.numpy.save(columns))


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, at least one, without the teacher's prompts. Raises OSError."""
    save_columns(path, to_columns(samples, with_teacher=False))


def read_samples(path: Path, *, vocab_size: int | None = None) -> list[Sample]:
    """Read a file of :func:`save_samples`, or one with a JSON object a line.

    ``vocab_size``: number of tokens of the model that is to be trained on them, where it is known.

    Raises:
        ReplayError: names what is broken, or a rollout that cannot be trained on, with the field and its value.
    """
    if path.suffix == ".jsonl":
        return read_json_samples(path, vocab_size)
    try:
        columns = safetensors.numpy.load(read_bytes(path, advice=ADVICE, limit=ROWS_FILE_BYTES))
    except UnreadableError as error:
        raise ReplayError(str(error)) from error
    # A type of numbers that NumPy lacks is a KeyError.
    except (SafetensorError, KeyError, ValueError) as error:
        raise ReplayError(f"{path}: no saved rollouts ({first_line(error)}): {ADVICE}") from error
    fault = columns_fault(columns)
    if fault is not None:
        raise ReplayError(f"{path}: no saved rollouts ({fault}): {ADVICE}")
    samples = from_columns(columns)
    for number, sample in enumerate(samples, 1):
        fault = sample_fault(sample, vocab_size)
        if fault is not None:
            raise ReplayError(f"{path}: rollout {number}: {fault}")
    return samples


def load_samples(
    folder: str | Path, step: int, *, groups: int, samples_per_group: int, vocab_size: int | None = None
) -> list[Sample]:
    """Read all rollouts of a step in ``folder``, in order of (group, sample).

    Raises:
        ReplayError: missing file, broken or unsound file, not exactly ``samples_per_group`` rollouts of each of
            ``groups`` prompts, or a group of several prompts.
    """
    path = rollouts_path(folder, step)
    names = [found.name for found in path.parent.glob(f"step_{step:06d}*")]
    files = [path.with_name(name) for name in whole_steps(names).get(step, [])]
    if not files:
        raise ReplayError(
            f"{path}: no such file; rollout.replay must hold the rollouts of every step that is trained, in whole"
        )
    path = files[0]
    samples = [sample for file in files for sample in read_samples(file, vocab_size=vocab_size)]
    samples.sort(key=lambda sample: (sample.group, sample.sample))
    expected = [(group, sample) for group in range(groups) for sample in range(samples_per_group)]
    if [(sample.group, sample.sample) for sample in samples] != expected:
        raise ReplayError(
            f"{path}: {len(samples)} rollouts are not {groups} groups of {samples_per_group}; "
            "set batch.groups and batch.samples_per_group as in the run that saved them"
        )
    prompts: dict[int, int] = {}
    for sample in samples:
        first = samples[sample.group * samples_per_group]
        if (sample.position, sample.problem_id) != (first.position, first.problem_id):
            raise ReplayError(
                f"{path}: group {sample.group} has the problems {first.problem_id!r} (position {first.position}) and "
                f"{sample.problem_id!r} (position {sample.position}); a group is the responses to one prompt"
            )
        if prompts.setdefault(sample.position, sample.group) != sample.group:
            raise ReplayError(
                f"{path}: groups {prompts[sample.position]} and {sample.group} have the same position "
                f"{sample.position}; no two groups share one"
            )
    return samples
