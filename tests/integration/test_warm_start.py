"""A warm start from a file: its loss and gradient against a plain reference, on two replicas, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dasd_megatron.data.order import DataOrder
from tests.support.runs import NO_EVALUATION, kill, reproducible, rows, start, train

pytestmark = pytest.mark.integration

BATCH, STEPS = 8, 40
ROWS = [
    {
        "prompt": f"{number}+{number}=",
        "response": ("so " * (number % 5)) + f"#### {2 * number}",
        "weight": 0.5 + number % 3,
    }
    for number in range(20)
]


def test_a_warm_start_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "replay").mkdir()
    overrides = [
        *NO_EVALUATION,
        f"rollout.replay={tmp_path / 'replay'}",
        "run.steps=0",
        "parallel.data_parallel_size=2",
        f"warm_start.path={path}",
        f"warm_start.steps={STEPS}",
        f"warm_start.batch_size={BATCH}",
        "warm_start.micro_batch_size=3",
        "optimizer.clip_grad=1e6",
    ]
    train(*overrides, f"run.dir={tmp_path / 'run'}")
    found = rows(tmp_path / "run" / "warm_start.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)) and found[-1]["loss"] < found[0]["loss"] / 2

    loss, norm = first_step(tmp_path / "run" / "start")
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)

    killed = tmp_path / "killed"
    process = start(*overrides, f"run.dir={killed}")
    written = killed / "warm_start.jsonl"
    while not written.exists() or written.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0][-6000:]
    kill(process)
    assert not (killed / "model").exists(), "killed too late to show anything"
    # Its own copy is what the run goes by, and it is compared with the file, which may have moved.
    moved = path.rename(tmp_path / "moved.jsonl")
    train(*overrides, f"warm_start.path={moved}", f"run.dir={killed}", "resume=auto")
    assert reproducible(written) == reproducible(tmp_path / "run" / "warm_start.jsonl")
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def first_step(model_path: Path) -> tuple[float, float]:
    """The weighted mean of the first step's losses and the norm of its gradient, in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_path).double()
    examples = [json.loads(line) for line in (model_path.parent / "data" / "warm_start.jsonl").read_text().splitlines()]
    total = torch.zeros((), dtype=torch.float64)
    weight = 0.0
    for index in DataOrder(len(examples), seed=1).indices(0, BATCH):
        example = examples[index]
        ids = torch.tensor([example["prompt_ids"] + example["response_ids"]])
        log_probs = model(ids).logits[0].log_softmax(-1)
        first = len(example["prompt_ids"])
        for place in range(first, ids.shape[1]):
            total = total - example["weight"] * log_probs[place - 1, ids[0, place]]
            weight += example["weight"]
    loss = total / weight
    loss.backward()
    norm = torch.stack([parameter.grad.square().sum() for parameter in model.parameters()]).sum().sqrt()
    return float(loss), float(norm)
