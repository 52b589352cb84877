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
    assert "fits" in printed(capsys, *job)
    with pytest.raises(
        ConfigError, match=r"there are 20\.00 GB: the nearest layout that fits has 16 GPUs .*: parallel\."
    ):
        plan(["--gpu-memory", "20", *job])
    assert "DOES NOT FIT" in capsys.readouterr().out
    text = printed(capsys, *job[:2])
    assert "sequence_parallel=false" in text and "8,190,735,360 in all" in text
    assert "over the network" in printed(capsys, "--gpus-per-node", "4", *job)
    assert "weights" in printed(capsys)
    assert "turns them off" in printed(capsys, "--gpu-memory", "200", "model=qwen3_8b", PP + "2", VPP + "2")
    fused, dense = (
        float(number) for number in re.search(r"last stage +([\d.]+) GB fused \(([\d.]+) GB", text).groups()
    )
    assert fused < dense
    assert "no context parallelism" in printed(
        capsys, "model=smollm2_135m", "backend.kind=cpu", "rollout.max_new_tokens=64"
    )


def test_search_lists_layouts_that_fit(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--search", "--gpus", "48", "model=qwen3_32b", "batch.groups=64")
    assert "not measured" in text
    rows = [line.split() for line in text.splitlines()[2:]]
    assert 1 <= len(rows) <= 10
    for tensor, pipeline, _, data, _, memory, _, _, servers, _, size, *_ in rows:
        assert int(tensor) * int(pipeline) * int(data) + int(servers) * int(size) == 48 and float(memory) <= 80
    steps = [float(row[13]) for row in rows]
    assert steps == pytest.approx(sorted(steps), rel=0.01)
    colocated = printed(
        capsys, "--search", "--gpus", "32", "--rollout-nodes", "0", "model=qwen3_32b", "batch.groups=64"
    )
    for tensor, pipeline, _, data, _, _, _, _, servers, _, size, *_ in map(str.split, colocated.splitlines()[2:]):
        assert int(tensor) * int(pipeline) * int(data) == int(servers) * int(size) == 32


def time_lines(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, str]:
    """The rows of the section of times."""
    text = printed(capsys, *arguments).split("not measured\n")[-1]
    return dict(re.findall(r"^  +(\S.*?)  +(.*)$", text, re.MULTILINE))


def test_a_plan_names_the_bound_of_a_step(capsys: pytest.CaptureFixture) -> None:
    job = ["experiment=dasd_32b"]
    assert "bound by rollouts" in time_lines(capsys, *job, "--rollout-nodes", "1")["a step"]
    assert "bound by training" in time_lines(capsys, *job, "--rollout-nodes", "8")["a step"]
    # By default there are as many nodes as keep up with training, and at most as many as training has.
    rows = time_lines(capsys, *job)
    assert "4 servers of 8 GPUs on 4 nodes" in rows["rollouts"] and "bound by rollouts" in rows["a step"]
    slow = time_lines(capsys, *job, "precision.recompute=full", "loss.share_pass=never")
    assert "3 servers of 8 GPUs on 3 nodes" in slow["rollouts"] and "bound by training" in slow["a step"]
    assert rows["a step's sequences"].startswith("1,024: 512 tokens of prompt and 2,666 of response")
    disk = [*job, "--rollout-nodes", "3", "rollout.weight_sync=disk"]
    slow = time_lines(capsys, *disk, "--assume", "process_write=2e8")
    assert "bound by weight sync" in slow["a step"] and slow["weight sync"].endswith("by disk")
    stuck = time_lines(capsys, *job, "--rollout-nodes", "3", "--assume", "disk_write=2e8", "checkpoint.every=1")
    assert "bound by saving" in stuck["a step"]
    often = time_lines(capsys, *job, "--rollout-nodes", "3", "evaluation.every=1")
    assert "bound by evaluation" in often["a step"] and often["evaluation"].endswith("500 (assumed) problems")
    in_turn = time_lines(capsys, *job, "--rollout-nodes", "3", "rollout.max_staleness=0")
    assert "rollouts and training in turn" in in_turn["a step"]


def test_servers_are_those_of_the_configuration(capsys: pytest.CaptureFixture) -> None:
    job = ["model=qwen3_8b", TP + "4"]
    named = time_lines(capsys, *job, "rollout=external", "rollout.servers=[http://a:1,http://b:1,http://c:1]")
    assert "3 servers of 1 GPU on 1 node" in named["rollouts"]
    own = ["rollout=sglang_cpu", "rollout.sglang.backend=cuda", "rollout.sglang.tensor_parallel_size=2"]
    # Beside all activations there would be no room for the longest sequence.
    own.append("precision.recompute=selective")
    assert "1 server of 2 GPUs on the trainer's GPUs" in time_lines(capsys, *job, *own)["rollouts"]
    assert "4 servers of 2 GPUs" in time_lines(capsys, *job, "--server-tp", "2", "--rollout-nodes", "1")["rollouts"]
    # The embedded server is no engine of this model, and a CPU has none of these rates.
    assert "by a model" not in printed(capsys, *job, "rollout=embedded")
    assert "by a model" not in printed(capsys, "experiment=quickstart")
    with pytest.raises(ConfigError, match="no room for a sequence"):
        plan([*job, "--rollout-nodes", "0", "--server-tp", "1", "--gpu-memory", "65"])
    assert "NO ROOM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model=qwen3_8b", TP + "3"], "num_attention_heads=32"),
        (["model=qwen3_8b", PP + "5"], "num_hidden_layers=36"),
        (["model=qwen9"], "choose one of"),
        (["--search", "model=qwen3_8b"], "--gpus"),
        (["--search", "--gpus", "2", "model=llama3_70b"], "needs"),
        (["--search", "--gpus", "1", "model=llama3_70b"], "the number of GPUs"),
        (["--search", "--gpus", "8", "--rollout-nodes", "1", "model=llama3_70b"], "leaves no GPU"),
        (["--assume", "mfu=2", "model=qwen3_8b"], "at most 1"),
        (["--server-tp", "3", "model=qwen3_8b"], "a divisor of"),
        (["model=qwen3_8b", "rollout.max_new_tokens=100000"], "max_position_embeddings"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_plan_says_why_the_rollouts_are_scored_first(capsys: pytest.CaptureFixture) -> None:
    assert "in a pass of its own" not in printed(capsys, "experiment=dasd_7b")
    assert "before the update: rejection decides" in printed(capsys, "experiment=dasd_7b", "loss.rejection=token")
