"""The ``dasd`` command: what it imports for a subcommand, and what it does with a name that is none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from dasd_megatron.cli import COMMANDS, main

# What takes most of a second or more to import, or comes with what does.
HEAVY = {
    "aiohttp",
    "fastapi",
    "httpx",
    "jinja2",
    "mbridge",
    "megatron",
    "numpy",
    "reasoning_gym",
    "rich",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}
CONFIGURATION = {"hydra", "omegaconf", "yaml"}
PROGRAM = """
import sys
from dasd_megatron.cli import main
status = main(sys.argv[1:])
print("imported", status, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run(*arguments: str) -> tuple[int, str, set[str]]:
    """Return the status of a command in a process of its own, what it says, and the packages that it has imported."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    *said, last = child.stdout.splitlines()
    _, status, *packages = last.split()
    return int(status), "\n".join([*said, child.stderr]), set(packages)


@pytest.mark.parametrize(
    ("arguments", "status", "words", "absent"),
    [
        (["--help"], 0, "usage: dasd COMMAND", HEAVY | CONFIGURATION),
        (["trian"], 2, "'trian' is not a command", HEAVY | CONFIGURATION),
        (["train", "--help"], 0, "algorithm.scale_floor", HEAVY),
        (["evaluate", "--help"], 0, "evaluation.benchmarks", HEAVY),
        (["train", "experiment=quickstart", "run.stepz=3"], 1, "did you mean run.steps?", HEAVY),
        (["train", "experiment=quickstart", "algorithm.rho=2"], 1, "algorithm.rho=2", HEAVY),
        (["train", "experiment=quickstart", "rollout.device=cuda"], 1, "torch sees no GPU", HEAVY),
        (["evaluate", "run.stepz=3"], 1, "did you mean run.steps?", HEAVY),
        (["plan", "model=qwen3_0.6b"], 0, "596,049,920 in all", HEAVY),
        (["plan", "experiment=quickstart"], 0, "fits", HEAVY),
        (["plan", "--search", "--gpus", "8", "model=llama3_8b"], 0, "not measured", HEAVY),
        (["plan", "model=qwen3_8b", "parallel.tensor_model_parallel_size=3"], 1, "num_attention_heads=32", HEAVY),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], status: int, words: str, absent: set[str]) -> None:
    found, said, packages = run(*arguments)
    assert found == status and words in said
    assert packages & absent == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_function(name: str) -> None:
    module, _, function = COMMANDS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_without_a_command_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == usage
    assert all(f"\n  {name} " in usage for name in COMMANDS)
