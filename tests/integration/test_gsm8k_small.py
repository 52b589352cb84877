"""examples/gsm8k_small at toy size on the CPU: its configuration on a tiny model, with problems of GSM8K."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dasd_megatron.config import TinyModelConfig, load_config
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.runs import one_threaded, rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k_small"
DATA = Path(os.environ.get("DASD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k"
# A character is a token here, so prompts are longer.
TOY = [
    "backend.kind=cpu",
    "rollout.threads=1",
    "run.steps=2",
    "data.train.size=40",
    "data.heldout.size=3",
    "batch.groups=2",
    "batch.samples_per_group=2",
    "rollout.max_prompt_tokens=4000",
    "rollout.max_new_tokens=16",
    "evaluation.samples=2",
    "evaluation.ks=[1,2]",
    "verify.workers=0",
    "checkpoint.every=0",
    "logging.save_rollouts_every=1",
]

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no GSM8K in {DATA}; set DASD_TEST_DATA to a folder with gsm8k"
)


@needs_data
def test_the_configuration_is_that_of_one_gpu(tmp_path: Path) -> None:
    data = [f"data.train.path={DATA / 'train.jsonl'}", f"data.heldout.path={DATA / 'test.jsonl'}"]
    arguments = ["experiment=gsm8k_small", *data, f"model.path={tmp_path}"]
    for method in ("grpo", "opsd", "dasd"):
        config = load_config([*arguments, f"algorithm={method}"], EXAMPLE)
        assert (config.backend.kind, config.rollout.device, config.parallel.world_size) == ("cuda", "cuda", 1)
        # All rollouts of a step are one request and one batch.
        rollouts = config.batch.groups * config.batch.samples_per_group
        assert config.rollout.groups_per_request >= config.batch.groups and config.rollout.max_batch_size >= rollouts


@needs_data
def test_it_trains_at_toy_size(tmp_path: Path) -> None:
    """In half precision, with memory that is released and rollouts corrected for their arithmetic, as on a GPU."""
    tiny = TinyModelConfig(
        hidden_size=32, num_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=48,
        max_position_embeddings=8192,
    )  # fmt: skip
    model, run = make_tiny_model(tmp_path / "model", tiny, 1), tmp_path / "run"
    arguments = ["experiment=gsm8k_small", "model=hf", f"model.path={model}", *TOY]
    for part, name in (("train", "train"), ("heldout", "test")):
        # Characters beyond ASCII have no token in the tiny model.
        lines = (DATA / f"{name}.jsonl").read_text().splitlines()
        plain = [line for line in lines if line.isascii() and "\\u" not in line]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(plain[:50]) + "\n")
        arguments.append(f"data.{part}.path={tmp_path / f'{name}.jsonl'}")
    command = [sys.executable, "-m", "dasd_megatron.cli", "train", "--config-dir", str(EXAMPLE), *arguments]
    done = subprocess.run([*command, f"run.dir={run}"], capture_output=True, text=True, timeout=240, env=one_threaded())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    # The server has the trainer's weights, before and after it gave its memory back.
    assert max(row["rollout/log_prob_diff_mean"] for row in metrics) < 0.05
    assert [row["label"] for row in rows(run / "evaluation.jsonl")] == ["before", "after"]
    # The teacher has seen the worked solution.
    inspected = json.loads((run / "inspect" / "step_000001.json").read_text())
    assert any(abs(gap) > 1e-3 for gap in inspected[0]["delta"])
