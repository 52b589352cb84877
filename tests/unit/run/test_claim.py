"""A run directory belongs to one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.run.claim import claim_directory
from dasd_megatron.run.prepare import prepare_run
from tests.support.small_configs import SMALL


@pytest.mark.parametrize("job", [None, "77"])
def test_a_run_directory_in_use_is_refused(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    """At once; a requeued job waits until its former self is gone."""
    root = tmp_path / "run"
    root.mkdir()
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write(sys.argv[2]); file.flush()"
    )
    owner = '{"host": "node1", "pid": 12, "slurm_job": "77"}'
    command = [
        sys.executable,
        "-c",
        f"{hold}; print('held', flush=True); time.sleep(float(sys.argv[3]))",
        str(root / "owner.json"),
        owner,
    ]
    with subprocess.Popen([*command, "2" if job else "60"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        config = load_config([*SMALL, *files, f"run.dir={root}"])
        if job is None:
            with pytest.raises(ConfigError, match=r'is in use by another process \(\{"host": "node1"'):
                prepare_run(config, root)
            holder.kill()
        else:
            monkeypatch.setenv("SLURM_JOB_ID", job)
            prepare_run(config, root)
            assert holder.wait() == 0
            assert json.loads((root / "owner.json").read_text())["slurm_job"] == "77"


def test_files_of_writers_that_were_killed_go_with_the_next_claim(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from dasd_megatron.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "rollouts").mkdir()
    for path in (tmp_path / "config.yaml", tmp_path / "rollouts" / "step_000001.jsonl"):
        subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=60)
        assert len(list(path.parent.glob(f".{path.name}.*"))) == 1
    (tmp_path / "rollouts" / "step_000002.jsonl").touch()
    claim_directory(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["owner.json", "step_000002.jsonl"]
