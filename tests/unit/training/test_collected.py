"""Rollouts for steps to come are read from a checkpoint as they were written, by this version or an earlier one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from dasd_megatron.rollout.buffer import BufferState, make_group
from dasd_megatron.rollout_files import read_samples
from dasd_megatron.rollout_json import as_json
from dasd_megatron.training.checkpoint import _read_collected, _write_collected
from tests.support.random_samples import random_group


def test_groups_for_steps_to_come_are_kept(tmp_path: Path) -> None:
    draw = random.Random(2)
    groups = [make_group(random_group(draw, group, 3, with_teacher=False)) for group in range(4)]
    assert _write_collected(BufferState(ready=groups[1:]), tmp_path) == ["ready.safetensors"]
    assert _read_collected(tmp_path) == {"ready": groups[1:]}
    names = _write_collected(BufferState(ready=groups[1:], refused=groups[:1]), tmp_path)
    assert names == ["ready.safetensors", "refused.safetensors"]
    assert _read_collected(tmp_path) == {"ready": groups[1:], "refused": groups[:1]}
    for path in list(tmp_path.iterdir()):
        lines = "".join(json.dumps(as_json(sample)) + "\n" for sample in read_samples(path))
        path.with_suffix(".jsonl").write_text(lines)
        path.unlink()
    assert _read_collected(tmp_path) == {"ready": groups[1:], "refused": groups[:1]}
