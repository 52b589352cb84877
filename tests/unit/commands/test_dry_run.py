"""``dasd train --dry-run`` refuses what it can before Megatron-Core is asked, and prints the commands to start."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from dasd_megatron.cli import main
from dasd_megatron.commands.dry_run import _evaluation_lines, _parser, dry_run
from dasd_megatron.commands.router import _parser as router_parser
from dasd_megatron.commands.serve import _parser as server_parser
from dasd_megatron.commands.start_commands import Cluster, start_commands
from dasd_megatron.config import load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.plan import model_sizes
from tests.support.chat_templates import save_model_files

TP, PP, DP = (
    "parallel.tensor_model_parallel_size=",
    "parallel.pipeline_model_parallel_size=",
    "parallel.data_parallel_size=",
)
REFUSED = [
    (["experiment=dasd_32b", TP + "3"], ["tensor_model_parallel_size=3", "num_attention_heads=64"]),
    (["experiment=dasd_32b", TP + "16"], ["tensor_model_parallel_size=16", "num_key_value_heads=8"]),
    (["experiment=dasd_32b", PP + "3"], ["pipeline_model_parallel_size", "64"]),
    (["experiment=dasd_32b", "--nodes", "2"], ["32 processes", "2 nodes of 8 hold 16"]),
    (["experiment=dasd_32b", "--nodes", "5"], ["32 processes", "5 nodes"]),
    (["experiment=dasd_32b", "--hosts", "a,b,c"], ["32 processes", "3 nodes of 8 hold 24"]),
    (["experiment=dasd_32b", "--hosts", "a,b,b,c"], ["--hosts"]),
    (["experiment=dasd_70b", "--gpu-memory", "24"], ["stage 0", "24.00 GB", "precision.recompute=full"]),
    (
        ["experiment=dasd_70b", PP + "1", "parallel.virtual_pipeline_model_parallel_size=null", DP + "1"],
        ["stage 0", "80.00 GB"],
    ),
    (["experiment=dasd_7b", "model.path=/nowhere", "model.architecture=null"], ["model.architecture"]),
    (["experiment=quickstart", "model=hf", "model.path=/nowhere"], ["model.path=/nowhere", "preset"]),
    (["experiment=dasd_7b", "--response-tokens", "100,many"], ["--response-tokens 100,many"]),
    (["experiment=dasd_7b", "--response-tokens", "100,9000"], ["--response-tokens", "rollout.max_new_tokens=8192"]),
    (["experiment=dasd_7b", "--nodes", "0"], ["--nodes=0"]),
    (
        ["experiment=dasd_7b", "rollout.servers=[http://a:1,http://a:2,http://a:3]", "--server-tp", "4"],
        ["3 servers of 4 GPUs", " a "],
    ),
    (["experiment=dasd_7b", "optimizer.rl=1"], ["optimizer.lr"]),
    (["experiment=dasd_7b", "batch.groups=7"], ["batch.groups=7"]),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_cannot_run_is_refused_with_one_line(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--dry-run", *arguments]) == 1
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.strip().splitlines()) == 1, printed
    for part in named:
        assert part in printed.err


def test_the_templates_of_a_model_that_is_here_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = save_model_files(tmp_path / "m", "{% for m in messages %}<|user|><|end|>{% endfor %}")
    arguments = ["experiment=quickstart", "parallel=single", "model=hf", f"model.path={tmp_path}/m"]
    assert main(["train", "--dry-run", *arguments]) == 1
    assert "the tokenizer's chat template does not show the problem" in capsys.readouterr().err
    tokenizer.chat_template = "<|new|>{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "m")
    assert main(["train", "--dry-run", *arguments]) == 1
    assert f"has the token '<|new|>' (id {len(tokenizer) - 1})" in capsys.readouterr().err


def test_nothing_is_written_and_no_mask_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = os.umask(0o022)
    try:
        with pytest.raises(ConfigError):
            dry_run(["--dry-run", "experiment=dasd_32b", "--nodes", "2"])
        assert os.umask(0o022) == 0o022 and not list(tmp_path.iterdir())
    finally:
        os.umask(mask)


def commands(*arguments: str) -> dict[str, list[list[str]]]:
    """The words of the lines that a dry run would print, by their title."""
    options = _parser().parse_intermixed_args(["--dry-run", *arguments])
    config = load_config(options.overrides, needs_files=False)
    cluster = Cluster(["a", "b"], options.gpus_per_node, 80e9, options.server_tp)
    arch = Architecture.of(model_sizes(config.model))
    found = start_commands(config, cluster, arch, options.overrides, options.config_dir)
    return {title: [shlex.split(line) for line in lines] for title, lines in found.items()}


def test_servers_and_router_are_started_by_commands_that_their_parsers_take() -> None:
    servers = "rollout.servers=[http://c:30000,http://c:30001,http://d:30000]"
    found = commands("experiment=dasd_70b", servers)["rollout servers"]
    assert [line[0] for line in found] == ["c:", "c:", "d:"]
    # 141 GB of weights take four GPUs of 80 GB, and the second server of a node the next four.
    assert [line[1] for line in found] == [
        f"CUDA_VISIBLE_DEVICES={devices}" for devices in ("0,1,2,3", "4,5,6,7", "0,1,2,3")
    ]
    for line, port in zip(found, (30000, 30001, 30000), strict=True):
        assert line[2:4] == ["dasd", "serve"] and line[4:6] == ["--engine", "sglang"]
        options = server_parser().parse_args(line[6:])
        assert (options.port, options.host, options.tp_size, options.dtype) == (port, "0.0.0.0", 4, "bfloat16")
    assert (
        commands("experiment=dasd_70b", servers, "--server-tp", "2")["rollout servers"][1][1]
        == "CUDA_VISIBLE_DEVICES=2,3"
    )
    routed = commands("experiment=dasd_7b", "rollout.servers=[]", "rollout.router=http://c:31000")[
        "router, on its node"
    ]
    options = router_parser().parse_args(routed[0][2:])
    assert (options.port, options.host, options.servers) == (31000, "0.0.0.0", ["http://ROLLOUT_NODE:30000"])


def test_each_node_trains_by_torchruns_variables_and_the_same_overrides() -> None:
    (lines,) = (
        lines for title, lines in commands("experiment=dasd_32b", "run.steps=7").items() if title.startswith("training")
    )
    for rank, line in enumerate(lines):
        split = line.index("dasd")
        assert line[0] == f"{'ab'[rank]}:"
        variables = dict(word.split("=", 1) for word in line[1:split])
        assert variables.pop("PET_RDZV_ID")
        assert variables == {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_RDZV_ENDPOINT": "a:29500"}
        assert line[split : split + 2] == ["dasd", "train"] and {"experiment=dasd_32b", "run.steps=7"} <= set(
            line[split + 2 :]
        )
        load_config(line[split + 2 :], needs_files=False)


@pytest.mark.parametrize(
    ("overrides", "speed", "lines"),
    [
        (["run.steps=10", "evaluation.every=3", "data.heldout.size=500", "evaluation.samples=16"], 5000.0, [
            "5 evaluations of 16 samples of 500 held-out problems: 8,000 samples",
            "at most 65,536,000",
            "at most 3h38m at 5000 tokens a second",
        ]),
        (["data.heldout.size=null", "data.heldout.generator=null", "data.heldout.path=/x.jsonl"], 5000.0, [
            "of each held-out problem:",
        ]),
        (["evaluation.before=false", "evaluation.after=false", "evaluation.every=0"], 5000.0, ["none"]),
    ],
)  # fmt: skip
def test_the_length_of_an_evaluation_is_said(overrides: list[str], speed: float, lines: list[str]) -> None:
    common = ["experiment=dasd_7b", "evaluation.before=true", "evaluation.after=true", "rollout.max_new_tokens=8192"]
    config = load_config([*common, *overrides], needs_files=False)
    text = "\n".join(_evaluation_lines(config, speed))
    assert all(line in text for line in lines), text
