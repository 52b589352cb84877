"""``dasd plan``: what it prints and what it refuses."""

from __future__ import annotations

import re

import pytest

from dasd_megatron.commands.plan import plan
from dasd_megatron.errors import ConfigError

TP, PP, VPP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.virtual_pipeline_model_parallel_size=",
)


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    plan(list(arguments))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--search", "--gpus", "99999999999999999999"],
        ["--search", "--gpus", "0"],
        ["--gpus-per-node", "0"],
        ["--gpu-memory", "nan"],
        ["--gpu-memory", "inf"],
    ],
)
def test_numbers_beyond_every_cluster_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    """A search of 10^20 GPUs would not end."""
    with pytest.raises((SystemExit, ConfigError)) as caught:
        plan(arguments)
    assert arguments[-2] in capsys.readouterr().err + str(caught.value)


def test_a_plan_says_whether_it_fits(capsys: pytest.CaptureFixture) -> None:
    job = ["model=qwen3_8b", TP + "8", "parallel.sequence_parallel=true"]
    assert "fits" in printed(capsys, *job) and "DOES NOT FIT" in printed(capsys, "--gpu-memory", "20", *job)
    text = printed(capsys, *job[:2])
    assert "sequence_parallel=false" in text and "8,190,735,360 in all" in text
    assert "over the network" in printed(capsys, "--gpus-per-node", "4", *job)
    assert "weights" in printed(capsys)
    assert "turns them off" in printed(capsys, "model=qwen3_8b", PP + "2", VPP + "2")
    fused, dense = (
        float(number) for number in re.search(r"last stage +([\d.]+) GB fused \(([\d.]+) GB", text).groups()
    )
    assert fused < dense
    assert "no context parallelism" in printed(
        capsys, "model=smollm2_135m", "backend.kind=cpu", "rollout.max_new_tokens=64"
    )


def test_search_lists_layouts_that_fit(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--search", "--gpus", "32", "model=qwen3_32b", "batch.groups=64")
    rows = [line.split() for line in text.splitlines()[2:]]
    assert 1 <= len(rows) <= 10
    for tensor, pipeline, _, data, _, memory, *_ in rows:
        assert int(tensor) * int(pipeline) * int(data) == 32 and float(memory) <= 80
    assert [float(row[-1]) for row in rows] == sorted(float(row[-1]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model=qwen3_8b", TP + "3"], "num_attention_heads=32"),
        (["model=qwen3_8b", PP + "5"], "num_hidden_layers=36"),
        (["model=qwen9"], "choose one of"),
        (["--search", "model=qwen3_8b"], "--gpus"),
        (["--search", "--gpus", "1", "model=llama3_70b"], "needs"),
        (["--search", "--gpus", "7", "model=llama3_70b"], "batch.groups"),
        (["model=qwen3_8b", "rollout.max_new_tokens=100000"], "max_position_embeddings"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)
