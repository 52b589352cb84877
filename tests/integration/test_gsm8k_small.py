"""examples/gsm8k_small at toy size on the CPU: its comparison on a tiny model, with problems of GSM8K."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from dasd_megatron.config import TinyModelConfig, load_config
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.runs import rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "gsm8k_small"
DATA = Path(os.environ.get("DASD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k"
METHOD = "dasd, beta 0.1, both floors"
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
def test_a_method_is_compared_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, with memory that is released and rollouts corrected for their arithmetic, as on a GPU."""
    tiny = TinyModelConfig(
        hidden_size=32, num_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=48,
        max_position_embeddings=8192,
    )  # fmt: skip
    model = make_tiny_model(tmp_path / "model", tiny, 1)
    overrides = ["model=hf", f"model.path={model}", *TOY]
    for part, name in (("train", "train"), ("heldout", "test")):
        # Characters beyond ASCII have no token in the tiny model.
        lines = (DATA / f"{name}.jsonl").read_text().splitlines()
        plain = [line for line in lines if line.isascii() and "\\u" not in line]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(plain[:50]) + "\n")
        overrides.append(f"data.{part}.path={tmp_path / f'{name}.jsonl'}")
    spec = importlib.util.spec_from_file_location("compare_gsm8k", EXAMPLES / "compare_algorithms" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up in it.
    monkeypatch.setitem(sys.modules, spec.name, compare)
    spec.loader.exec_module(compare)
    options = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--methods", METHOD, "--parallel", "1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(EXAMPLE / "comparison.yaml"), *options, "--", *overrides])
    compare.main()
    run = tmp_path / "runs" / "gsm8k" / compare.slug(METHOD) / "seed1"
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    # The server has the trainer's weights, before and after it gave its memory back.
    assert max(row["rollout/log_prob_diff_mean"] for row in metrics) < 0.05
    # The teacher has seen the worked solution.
    inspected = json.loads((run / "inspect" / "step_000001.json").read_text())
    assert any(abs(gap) > 1e-3 for gap in inspected[0]["delta"])
    before, after = rows(run / "evaluation.jsonl")
    found = json.loads((tmp_path / "results.json").read_text())["gsm8k"][METHOD]["1"]
    assert (before["label"], after["label"]) == ("before", "after")
    assert found["before"]["avg@4"] == before["avg@4"] and found["after"]["pass@4"] == after["pass@4"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert all(name in page for name in (METHOD, "Avg@4", "Pass@4", "entropy, nats", "length, tokens"))
