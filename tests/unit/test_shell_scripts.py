"""The shell scripts and the Dockerfile: linted, and what the batch scripts would do, without Slurm."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dasd_megatron.commands.plan import plan
from dasd_megatron.config import load_config
from dasd_megatron.planning.assumptions import assume
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.lengths import longest_lengths
from dasd_megatron.planning.plan import make_plan, model_sizes
from dasd_megatron.planning.training_time import training_time

ROOT = Path(__file__).parents[2]
SIZES = {"7b": (1, 1, 2, 4), "32b": (4, 3, 1, 8), "70b": (8, 4, 1, 8)}
"""Training nodes, rollout nodes, servers on each, GPUs of each server."""


def shell_scripts() -> list[Path]:
    found = [
        path
        for folder in ("slurm", "docker", ".ci", "tools", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
    ]
    return [
        path
        for path in found
        if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash"))
    ]


def program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: pip install -e '.[dev]'")
    return found


def test_shellcheck() -> None:
    scripts = shell_scripts()
    assert {"common.sh", "env.sh", "train_dasd_70b.sh", "install_trainer.sh", "run"} <= {path.name for path in scripts}
    done = subprocess.run([program("shellcheck"), "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint() -> None:
    done = subprocess.run([program("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_runs_scripts_that_are_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    scripts = set(re.findall(r"docker/\w+\.sh", text))
    assert scripts == {f"docker/{path.name}" for path in (ROOT / "docker").iterdir()}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in re.findall(r"^COPY (\w\S*) ", text, re.MULTILINE):
        assert f"!{source.split('/')[0]}" in ignored
    # Every stage that is an image ends as a user without rights.
    for stage in ("cpu", "gpu"):
        assert "\nUSER 10001\n" in re.search(rf" AS {stage}\n(.*?)(\nFROM|$)", text, re.DOTALL)[1] + "\n"


def test_pins_are_what_the_package_accepts() -> None:
    """The constraints fit the requirements of the package, so that the images get the tested versions."""
    pins = {}
    for line in (ROOT / "requirements" / "trainer.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def dry_run(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> tuple[str, list[list[str]]]:
    """Run a script dry; return what it prints and the commands in it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "DASD_"))}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        cwd=cwd,
        env={**clean, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("    ")]


def option(command: list[str], name: str) -> str:
    return next(word.split("=", 1)[1] for word in command if word.startswith(f"{name}="))


def overrides_of(command: list[str]) -> list[str]:
    return command[command.index("train") + 1 :]


CONTAINERS = {
    "none": ([], f"{ROOT}/.venv/bin/python", f"{ROOT}/.venv-sglang/bin/python"),
    "pyxis": (
        ["--container-image=image", f"--container-workdir={ROOT}"],
        "/opt/dasd/bin/python",
        "/opt/sglang/bin/python",
    ),
    "apptainer": (["apptainer", "exec", "--nv", "--bind", "image"], "/opt/dasd/bin/python", "/opt/sglang/bin/python"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("size", SIZES)
def test_dry_run(size: str, container: str, tmp_path: Path) -> None:
    """From any directory, without Slurm: the steps, their nodes, GPUs and addresses, and overrides that `dasd train`
    takes."""
    train_nodes, rollout_nodes, per_node, tensor_parallel = SIZES[size]
    words, python, sglang = CONTAINERS[container]
    text, commands = dry_run(
        f"train_dasd_{size}.sh",
        "optimizer.lr=2e-6",
        "run.name=a b",
        cwd=tmp_path,
        DASD_CONTAINER=container,
        DASD_IMAGE="image",
    )
    submit, check, *servers, train, requeue = commands
    nodes = train_nodes + rollout_nodes
    assert submit == ["sbatch", f"--nodes={nodes}", f"slurm/train_dasd_{size}.sh", "optimizer.lr=2e-6", "run.name=a b"]
    assert f"#SBATCH --nodes={nodes}\n" in (ROOT / "slurm" / f"train_dasd_{size}.sh").read_text()
    assert requeue == ["scontrol", "requeue", "0"]
    names = [f"node{index:02d}" for index in range(1, nodes + 1)]
    urls = []
    for index, server in enumerate(servers):
        slot = index % per_node
        devices = range(slot * tensor_parallel, (slot + 1) * tensor_parallel)
        assert server[0] == "srun" and option(server, "--nodelist") == names[train_nodes + index // per_node]
        assert option(server, "CUDA_VISIBLE_DEVICES") == ",".join(map(str, devices))
        assert (
            server[server.index("--tp-size") + 1] == str(tensor_parallel)
            and server[server.index("--python") + 1] == sglang
        )
        assert server.index(python) > max([server.index(word) for word in words], default=0)
        assert (
            "--overlap" in server
            and option(server, "--open-mode") == "append"
            and "/logs/server." in option(server, "--output")
        )
        urls.append(f"http://{option(server, '--nodelist')}:{server[server.index('--port') + 1]}")
    assert len(set(urls)) == len(urls) == rollout_nodes * per_node
    assert f"{urls[-1]}/health" in text
    assert option(train, "--nodelist").split(",") == names[:train_nodes] and option(train, "--ntasks") == str(
        train_nodes
    )
    # A node that has saved and ended first must not take the others with it before they have.
    assert option(train, "--kill-on-bad-exit") == "0" and option(train, "--wait") == "60"
    assert option(train, "PET_NNODES") == str(train_nodes) and option(train, "PET_RDZV_ENDPOINT") == "node01:29500"
    assert 'PET_NODE_RANK=$SLURM_NODEID PET_LOG_DIR=$PET_LOG_DIR/node$SLURM_NODEID exec "$@"' in train
    assert option(check, "--nodelist") == "node01" and check[check.index("--nodes") + 1] == str(train_nodes)
    given = overrides_of(train)
    assert [word for word in given if not word.startswith("rollout.servers")] == [
        word for word in check[check.index("--gpus-per-node") + 2 :] if not word.startswith("rollout.servers")
    ]
    assert (
        f"rollout.servers=[{','.join(urls)}]" in given
        and "resume=auto" in given
        and given[-2:] == ["optimizer.lr=2e-6", "run.name=a b"]
    )
    if container != "none":
        return
    # Hydra takes them, and the processes fill the nodes. The paths are not there.
    known = [word for word in given if not word.startswith(("model.path", "data.", "run.name"))]
    sources = [f"data.{name}.{field}" for name in ("train", "heldout") for field in ("generator=chain_sum", "size=200")]
    config = load_config([*known, *sources])
    parallel = config.parallel
    # Slurm's warning leaves time for a save, and the grace for a step of full length by the plan's estimate besides.
    signal = re.search(r"#SBATCH --signal=B:USR1@(\d+)", (ROOT / "slurm" / f"train_dasd_{size}.sh").read_text())
    arch = Architecture.of(model_sizes(config.model))
    found = make_plan(config, arch, transformer_engine=True)
    step = training_time(config, arch, found, longest_lengths(config), assume("h100", []), gpus_per_node=8).total
    assert step + 600 < config.checkpoint.grace_seconds < int(signal[1])
    processes = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.data_parallel_size
    )
    assert processes == 8 * train_nodes


@pytest.mark.parametrize("size", SIZES)
def test_a_layout_fits_80_gb(size: str, capsys: pytest.CaptureFixture) -> None:
    plan([f"experiment=dasd_{size}"])
    total = re.search(r"total, with reserve +([\d.]+) GB of 80.00 GB: fits", capsys.readouterr().out)
    # As docs/slurm.md says.
    assert f"| {float(total[1]):.1f} GB |" in (ROOT / "docs" / "slurm.md").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_colocated(size: str) -> None:
    train_nodes, _, per_node, _ = SIZES[size]
    _, (submit, check, *servers, train, _) = dry_run(f"train_dasd_{size}.sh", DASD_PLACEMENT="colocated")
    assert submit[1] == f"--nodes={train_nodes}" and len(servers) == train_nodes * per_node
    assert {option(server, "--nodelist") for server in servers} == set(option(train, "--nodelist").split(","))
    given = overrides_of(train)
    turns = {"rollout.max_staleness=0", "rollout.release_memory=true", "backend.offload=all"}
    assert turns | {"precision.recompute=full"} <= set(given) & set(check)
    alone = train_nodes == 1
    assert f"rollout.weight_sync={'tensor' if alone else 'disk'}" in given
    for server in servers:
        assert server[server.index("--host") + 1] == ("127.0.0.1" if alone else "0.0.0.0")
        assert server[server.index("--") + 1 :] == ["--enable-memory-saver", "--mem-fraction-static", "0.75"]
    sources = [f"data.{name}.{field}" for name in ("train", "heldout") for field in ("generator=chain_sum", "size=200")]
    for step in (check, train):
        words = [word for word in overrides_of(step) if "=" in word]
        known = [word for word in words if not word.startswith(("model.path", "data."))]
        load_config([*known, *sources])


def test_colocated_servers_behind_a_router_keep_their_memory() -> None:
    _, (_, _, *servers, _router, train, _) = dry_run("train_dasd_32b.sh", DASD_PLACEMENT="colocated", DASD_ROUTER="1")
    given = overrides_of(train)
    assert {"rollout.max_staleness=0", "precision.recompute=full"} <= set(given)
    assert "rollout.release_memory=true" not in given and "backend.offload=all" not in given
    assert "rollout.weight_sync=disk" in given
    for server in servers:
        assert server[server.index("--") + 1 :] == ["--mem-fraction-static", "0.4"]


def test_router_and_settings_of_the_environment() -> None:
    layout = {
        "DASD_ROUTER": "1",
        "DASD_ROLLOUT_NODES": "1",
        "DASD_SERVER_TP": "8",
        "DASD_SERVER_ARGS": "--quantization fp8",
    }
    text, (submit, _, server, router, train, _) = dry_run("train_dasd_32b.sh", **layout)
    assert submit[1] == "--nodes=5" and server[-3:] == ["--", "--quantization", "fp8"]
    assert router[router.index("--servers") + 1] == "http://node05:30000" and option(router, "--nodelist") == "node05"
    assert {"rollout.servers=[]", "rollout.router=http://node05:31000"} <= set(overrides_of(train))
    assert "http://node05:31000/readiness" in text


def test_tiny_evaluation_and_conversion() -> None:
    _, (_, model, _, *servers, train, _) = dry_run("train_dasd_tiny.sh", "run.steps=3")
    assert "make_tiny_model" in model[-2] and [option(server, "--nodelist") for server in servers] == [
        "node03",
        "node03",
    ]
    assert all(server[server.index("--engine") + 1] == "embedded" for server in servers)
    given = overrides_of(train)
    assert load_config([word for word in given if not word.startswith("model.path")]).run.steps == 3
    _, (_, *servers, evaluate) = dry_run(
        "eval.sh", "/models/mine", "evaluation.samples=8", DASD_PLACEMENT="colocated", DASD_TRAIN_NODES="4"
    )
    assert len(servers) == 8 and {option(step, "--nodelist") for step in [*servers, evaluate]} == {"node01"}
    assert "model.path=/models/mine" in evaluate and evaluate[-1] == "evaluation.samples=8"
    _, (_, convert) = dry_run("convert.sh", "hf-to-megatron", "--hf-path", "a b")
    assert convert[-4:] == ["convert", "hf-to-megatron", "--hf-path", "a b"] and not any(
        "CUDA" in word for word in convert
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DASD_CONTAINER": "docker"}, "DASD_CONTAINER=docker: write one of none pyxis apptainer"),
        ({"DASD_CONTAINER": "pyxis"}, "DASD_CONTAINER=pyxis needs DASD_IMAGE"),
        (
            {"DASD_SERVER_TP": "4", "DASD_SERVERS_PER_NODE": "3"},
            "3 servers of DASD_SERVER_TP=4 GPUs do not fit on DASD_GPUS_PER_NODE=8",
        ),
        ({"DASD_ROLLOUT_NODES": "two"}, "DASD_ROLLOUT_NODES=two: write a whole number"),
        ({"DASD_ROLLOUT_NODES": "0"}, "there is no rollout server"),
        ({"DASD_SERVER_TP": "0"}, "DASD_SERVER_TP=0: write a whole number from 1 to 64"),
        ({"DASD_SERVER_PORT": "65533"}, "DASD_SERVER_PORT=65533: the servers' ports, one after the other, would end"),
        ({"DASD_COLOCATED_MEMORY": "1.5"}, "DASD_COLOCATED_MEMORY=1.5: write a share like 0.4"),
        ({"DASD_SERVER_ARGS": "--a 'b c'"}, "write it on one line without quotes: it is split at spaces"),
        ({"DASD_SERVER_ARGS": "--a b\n--c d"}, "write it on one line without quotes: it is split at spaces"),
        ({"DASD_API_KEY": "k" * 15}, "DASD_API_KEY has 15 characters"),
        ({"DASD_API_KEY": "k" * 20 + "\nX: y"}, "DASD_API_KEY has 25 characters"),
        ({"DASD_ENV": "/no/env.sh"}, "DASD_ENV=/no/env.sh: no such file"),
        ({"SLURM_JOB_ID": "7;x"}, "SLURM_JOB_ID=7"),
        ({"SLURM_RESTART_COUNT": "x"}, "RESTARTS=x: write a whole number"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, str], message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DASD_"))}
    done = subprocess.run(
        ["bash", "slurm/train_dasd_32b.sh"],
        cwd=ROOT,
        env={**environment, "DRY_RUN": "1", **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_env_names_every_setting() -> None:
    """Settings that common.sh reads stand in env.sh, with a default, unless the scripts set them."""
    used = set(re.findall(r"\bDASD_[A-Z_]+", (ROOT / "slurm" / "common.sh").read_text()))
    named = set(re.findall(r"\bDASD_[A-Z_]+", (ROOT / "slurm" / "env.sh").read_text()))
    assert used - named == {"DASD_SCRIPT", "DASD_ENV", "DASD_ENGINE", "DASD_RUN_DIR"}
    assert named <= used


def test_what_lies_elsewhere_is_mounted_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").touch()
    settings = {
        "DASD_CONTAINER": "pyxis",
        "DASD_IMAGE": "image",
        "DASD_ROOT": str(ROOT),
        "DASD_RUN_DIR": "/elsewhere/run",
    }
    settings |= {
        "DASD_MODEL": str(tmp_path / "model"),
        "DASD_TRAIN_DATA": str(tmp_path / "train.jsonl"),
        "DASD_HELDOUT_DATA": "/no/file",
    }
    _, (_, *steps, _) = dry_run("train_dasd_32b.sh", **settings)
    mounts = {option(step, "--container-mounts") for step in steps}
    assert len(mounts) == 1
    places = [mount.split(":")[0] for mount in mounts.pop().split(",")]
    assert (
        places[-3:] == ["/elsewhere/run", str(tmp_path / "model"), str(tmp_path / "train.jsonl")]
        and "/no/file" not in places
    )
    settings["DASD_RUN_DIR"] = str(ROOT / "runs" / "mine")
    _, (_, step, *_) = dry_run("train_dasd_32b.sh", **settings)
    assert settings["DASD_RUN_DIR"] not in [
        mount.split(":")[0] for mount in option(step, "--container-mounts").split(",")
    ]


@pytest.mark.parametrize(("gigabytes", "gpus"), [(15, "1"), (65, "2"), (141, "4"), (900, "8")])
def test_a_server_of_an_evaluation_holds_its_model(gigabytes: int, gpus: str, tmp_path: Path) -> None:
    for index in range(2):
        with open(tmp_path / f"model-{index}.safetensors", "wb") as file:
            file.truncate(gigabytes * 10**9 // 2)
    _, (_, server, *_) = dry_run("eval.sh", str(tmp_path))
    assert server[server.index("--tp-size") + 1] == gpus


@pytest.mark.parametrize(
    ("squeue", "scontrol", "said", "tries"),
    [("false", "true", "requeued", 1), ("echo RUNNING", "flaky", "again in 10 s", 2)],
)
def test_a_controller_that_does_not_answer_is_asked_again(
    squeue: str, scontrol: str, said: str, tries: int, tmp_path: Path
) -> None:
    answer = "true" if scontrol == "true" else f"(($(wc -l < {tmp_path}/tries) > 1))"
    commands = f"""
        source slurm/common.sh
        JOB_ID=7
        squeue() {{ {squeue}; }}
        scontrol() {{ echo x >> {tmp_path}/tries; {answer}; }}
        sleep() {{ :; }}
        end_job 75
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75 and said in done.stdout, done.stderr
    assert (tmp_path / "tries").read_text().count("x") == tries


def run_with_common(commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands in a shell that has the functions of the batch scripts."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source slurm/common.sh\nJOB_ID=7\nLOG_DIR=logs\n{commands}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_server_that_ends_is_started_again(tmp_path: Path) -> None:
    done = run_with_common(f"""
        DASD_SERVER_RESTARTS=2
        sleep() {{ :; }}
        keep "server 0 on n3" bash -c 'echo x >> {tmp_path}/starts; exit 137'
        wait
    """)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts").read_text().count("x") == 3
    for restart in (1, 2):
        assert (
            f"server 0 on n3 ended with status 137; started again ({restart} of 2), its log is in logs" in done.stdout
        )
    assert "server 0 on n3 ended 3 times in a row and stays down" in done.stdout


def test_the_end_of_a_job_ends_its_servers_and_starts_none_again(tmp_path: Path) -> None:
    done = run_with_common(f"""
        DASD_SERVER_RESTARTS=2
        keep "server 0 on n3" bash -c 'echo $$ >> {tmp_path}/starts; exec sleep 50'
        until [[ -s {tmp_path}/starts ]]; do sleep 0.05; done
        end_servers
    """)
    assert done.returncode == 0, done.stderr
    (process,) = (tmp_path / "starts").read_text().split()
    assert not Path(f"/proc/{process}").exists()
    assert "started again" not in done.stdout and "stays down" not in done.stdout


NUMBERS = [
    "DASD_TRAIN_NODES",
    "DASD_ROLLOUT_NODES",
    "DASD_SERVERS_PER_NODE",
    "DASD_SERVER_TP",
    "DASD_GPUS_PER_NODE",
    "DASD_GPU_MEMORY",
    "DASD_SERVER_PORT",
    "DASD_ROUTER_PORT",
    "DASD_RENDEZVOUS_PORT",
    "DASD_READY_SECONDS",
    "DASD_SERVER_RESTARTS",
    "DASD_END_SECONDS",
]
CHOICES = ["DASD_CONTAINER", "DASD_PLACEMENT", "DASD_ENGINE", "DASD_ROUTER"]
PATHS = [
    "DASD_MODELS",
    "DASD_MODEL",
    "DASD_DATA",
    "DASD_RUNS",
    "DASD_RUN_DIR",
    "DASD_TRAIN_DATA",
    "DASD_HELDOUT_DATA",
    "DASD_PYTHON",
    "DASD_SGLANG_PYTHON",
]
TEXTS = ["DASD_COLOCATED_MEMORY", "DASD_IMAGE", "DASD_MOUNTS", "DASD_SERVER_ARGS", "DASD_API_KEY"]


@pytest.mark.parametrize("name", [*NUMBERS, *CHOICES, *PATHS, *TEXTS, "SLURM_JOB_ID", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("script", ["train_dasd_32b.sh", "eval.sh"])
def test_no_setting_is_run(script: str, name: str, tmp_path: Path) -> None:
    """Bash computes `a[$(command)]` where it wants a number."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DASD_"))}
    hostile = f"a[$(touch {tmp_path}/run)]\x1b[31m'\"`touch {tmp_path}/run`;touch {tmp_path}/run\n"
    done = subprocess.run(
        ["bash", f"slurm/{script}", str(tmp_path)],
        cwd=ROOT,
        env={**environment, "DRY_RUN": "1", name: hostile},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not list(tmp_path.iterdir())
    given = {"DASD_TRAIN_NODES", "DASD_ROLLOUT_NODES", "DASD_PLACEMENT", "DASD_ROUTER", "DASD_MODEL"}
    if script == "eval.sh" and name in given:
        assert done.returncode == 0  # The script has its own.
        return
    shown = name.replace("SLURM_RESTART_COUNT", "RESTARTS")
    assert done.returncode == 1 and done.stderr.startswith(f"dasd: error: {shown}"), done.stderr
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and len(done.stderr) < 500


def test_every_setting_is_among_the_hostile_ones() -> None:
    named = set(re.findall(r'"\$\{(DASD_[A-Z_]+):=', (ROOT / "slurm" / "env.sh").read_text()))
    assert named - {*NUMBERS, *CHOICES, *PATHS, *TEXTS} == {"DASD_ROOT"}


def check(call: str, values: list[str]) -> list[str]:
    """Return what a check of checks.sh leaves of each of ``values``, or its error."""
    loop = f'for X in "$@"; do ({call} && printf "%s\\0" "$X") 2>&1 || printf "\\0"; done'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source slurm/checks.sh; {loop}", "bash", *values],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *results, end = done.stdout.split("\0")
    assert len(results) == len(values) and not end and not done.stderr, done.stderr
    return results


def test_numbers() -> None:
    sound = {"0": "0", "08": "8", "010": "10", "64": "64", "0000000000000012": "12"}
    assert check("whole_number X 0 64", list(sound)) == list(sound.values())
    hostile = ["", " 1", "1 ", "+1", "-1", "1.0", "1e1", "0x10", "8#7", "65", "9" * 30, "1\n2", "x", "1+1", "a[0]", "٣"]
    for value, result in zip(hostile, check("whole_number X 0 64", hostile), strict=True):
        assert re.fullmatch(r"dasd: error: X=.*: write a whole number from 0 to 64, in slurm/env.sh\n", result), value


def test_paths() -> None:
    sound = ["", "/a/b", "a b/c", "/runs/2e-6_x@y+z"]
    assert check("plain_path X", sound) == sound
    hostile = [f"/a{c}b" for c in "'\"`$\\,:;%={}()#*?<>|&!~[]\n\t\x1b\x7f"] + [
        "-a",
        " /a",
        "/a ",
        "/größe",
        "/a\u2028b",
    ]
    for value, result in zip(hostile, check("plain_path X", hostile), strict=True):
        assert re.fullmatch(r"dasd: error: X=.*: give a path of ASCII.*\n", result), value


def test_a_sound_path_comes_out_of_hydra_as_it_was() -> None:
    for path in ("/a b/c", "/runs/2e-6_x@y+z"):
        assert load_config(["experiment=quickstart", f"run.dir={path}"]).run.dir == path


def test_words_and_keys() -> None:
    assert check("plain_words X", ["", "--a b", "--a=b,c"]) == ["", "--a b", "--a=b,c"]
    assert all("split at spaces" in result for result in check("plain_words X", ["a\nb", "'a'", '"a"', "a\\ b"]))
    keys = ["k" * 16, "".join(map(chr, range(33, 127)))]
    assert check("plain_key X", keys) == keys
    wrong = ["k" * 15, "k" * 16 + " ", "k" * 16 + "\n", "k" * 16 + "ä", "k" * 16 + "\x1b"]
    for value, result in zip(wrong, check("plain_key X", wrong), strict=True):
        assert result.startswith("dasd: error: X has ") and value not in result


@pytest.mark.parametrize("key", ['"quoted"\\back\\\\slash"', "$(touch_x)`touch_x`#&", "'" * 16])
def test_a_key_with_quotes_reaches_the_server_whole(key: str, tmp_path: Path) -> None:
    """And is on no command line. The server's answer goes nowhere."""
    program = tmp_path / "curl"
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\ncat > {tmp_path}/input\n')
    program.chmod(0o755)
    commands = "source slurm/common.sh; plain_key DASD_API_KEY; answers http://n1:1/health"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DASD_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "input").read_text() == f"Authorization: Bearer {key}\n"
    arguments = (tmp_path / "arguments").read_text()
    assert key not in arguments and "--header\n@-\n" in arguments and "--location" not in arguments


def test_a_node_that_is_no_host_name_is_refused() -> None:
    done = run_with_common("""
        scontrol() { printf '%s\\n' n1 '$(touch x);n2'; }
        DASD_TRAIN_NODES=2 DASD_ROLLOUT_NODES=0 SLURM_JOB_NODELIST=n find_nodes
    """)
    assert done.returncode == 1 and "Slurm names a node" in done.stderr and done.stderr.count("\n") == 1


def test_lines_of_scripts_fit() -> None:
    for path in (ROOT / "slurm").glob("*.sh"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert len(line) <= 120, f"{path.name}:{number}"


@pytest.mark.parametrize("target", ["a b", "$(shell touch {mark})", "a;touch {mark}", "a'b"])
def test_a_directory_that_make_would_take_apart_is_refused(target: str, tmp_path: Path) -> None:
    target = target.format(mark=tmp_path / "mark")
    done = subprocess.run(
        ["bash", "docker/install_sglang.sh", target, "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith("install_sglang.sh: error: ")
    assert not list(tmp_path.iterdir())
