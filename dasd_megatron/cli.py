"""The ``dasd`` command."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from dasd_megatron.config import UMASKS, Config, known_fields, load_config
from dasd_megatron.errors import ConfigError, report_errors

_USAGE = """usage: dasd COMMAND ...

commands:
  train     OVERRIDES           train; for example: dasd train experiment=quickstart algorithm.beta=0.1
            --dry-run OVERRIDES print what it would do on a whole cluster, without data, GPUs or servers (--help lists the options)
  evaluate  OVERRIDES           evaluate model.path on evaluation.benchmarks, or on data.heldout
            --compare DIR DIR   where two gradings of the same responses differ
  rollout   OVERRIDES           sample and grade the rollouts of run.steps steps without training on them, for rollout.replay
  plan      [--search --gpus N] OVERRIDES   memory and traffic of a configuration, without a GPU (--help lists the options)
  convert   hf-to-megatron | megatron-to-hf | gguf-to-hf ...
  serve     [--engine sglang] --model-path DIR   serve a Hugging Face directory for rollouts (--help lists the options)
  router    --servers URL ...   put sglang-router before rollout servers (--help lists the options)
  report    RUN [RUN ...] [--output FILE]   one page about a run, or about several overlaid; default: RUN/report.html
  doctor                        what is installed, what is missing and how to get it

`dasd train --help` lists every field of the configuration."""


def _configuration(arguments: list[str]) -> Config:
    parser = argparse.ArgumentParser(
        prog="dasd", usage="dasd train | evaluate | rollout [--config-dir DIR] [field=value ...]", add_help=False
    )
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.overrides, options.config_dir)
    # Of this process and of all that it starts: workers, servers and graders.
    os.umask(UMASKS[config.run.readable_by])
    return config


def _train(arguments: list[str]) -> None:
    from dasd_megatron.run.paths import choose_run_dir
    from dasd_megatron.run.prepare import prepare_run

    config = _configuration(arguments)
    # Under a torchrun of the user's own. RANK alone says nothing: some containers set it for each node.
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        from dasd_megatron.training.worker import run

        run(config, choose_run_dir(config), prepared=False)
        return
    from dasd_megatron.training.launch import check_gpus, launch, read_nodes

    nodes = read_nodes(config, config.parallel.world_size, os.environ)
    root = choose_run_dir(config)
    if config.backend.kind == "cuda":
        check_gpus(nodes.processes)
    if nodes.rank == 0:
        _check_port(config)

    def prepare() -> None:
        prepare_run(config, root)
        print(f"run directory: {root}", flush=True)

    status = launch(config, root, nodes, prepare)
    if status:
        raise SystemExit(status)


def _check_port(config: Config) -> None:
    rollout = config.rollout
    if rollout.engine == "external" or rollout.replay is not None or rollout.port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((rollout.host, rollout.port))
        except OSError as error:
            raise ConfigError(
                f"rollout.port={rollout.port} on {rollout.host} cannot be used ({error.strerror}): choose another, or "
                "0 for any free one"
            ) from error


def _evaluate(arguments: list[str]) -> None:
    from dasd_megatron.commands.evaluate import evaluate_command, evaluate_model

    if "--compare" in arguments:
        evaluate_command(arguments)
        return
    named = any(argument.startswith("experiment=") for argument in arguments)
    evaluate_model(_configuration(arguments if named else ["experiment=evaluate", *arguments]))


def _rollout(arguments: list[str]) -> None:
    from dasd_megatron.commands.rollout import rollouts_alone
    from dasd_megatron.run.paths import choose_run_dir

    config = _configuration(arguments)
    rollouts_alone(config, choose_run_dir(config))


def _convert(arguments: list[str]) -> None:
    from dasd_megatron.commands.convert import convert

    convert(arguments)


def _plan(arguments: list[str]) -> None:
    from dasd_megatron.commands.plan import plan

    plan(arguments)


def _serve(arguments: list[str]) -> None:
    from dasd_megatron.commands.serve import serve

    serve(arguments)


def _router(arguments: list[str]) -> None:
    from dasd_megatron.commands.router import serve_router

    serve_router(arguments)


def _report(arguments: list[str]) -> None:
    from dasd_megatron.observability.report.page import write_report

    parser = argparse.ArgumentParser(
        prog="dasd report", description="Write one HTML page about a run, or about several overlaid."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: RUN/report.html; of several runs ./report.html"
    )
    options = parser.parse_args(arguments)
    print(write_report(options.runs, options.output).absolute())


def _fields_help(command: str) -> str:
    fields = known_fields()
    width = max(map(len, fields))
    lines = [f"  {name:<{width}}  {text}" for name, text in fields.items()]
    options = "  --config-dir DIR: a directory of your own groups, as DIR/experiment/NAME.yaml"
    if command == "train":
        options += (
            "\n  --dry-run: print what the run would do on a whole cluster; `dasd train --dry-run --help` lists its "
            "options"
        )
    return "\n".join(
        [
            f"usage: dasd {command} [--config-dir DIR] [experiment=NAME] [field=value ...]",
            "",
            options,
            "",
            "fields:",
            *lines,
        ]
    )


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "rollout": _rollout,
    "convert": _convert,
    "plan": _plan,
    "serve": _serve,
    "router": _router,
    "report": _report,
}


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "doctor":
        from dasd_megatron.commands.doctor import print_doctor

        return print_doctor()
    if command not in COMMANDS:
        print(f"dasd: error: {command!r} is not a command\n\n{_USAGE}", file=sys.stderr)
        return 2
    if command == "train" and "--dry-run" in rest:
        from dasd_megatron.commands.dry_run import dry_run

        return report_errors(lambda: dry_run(rest))
    if command in ("train", "evaluate", "rollout") and {"-h", "--help"} & set(rest):
        print(_fields_help(command))
        return 0
    return report_errors(lambda: COMMANDS[command](rest))


if __name__ == "__main__":
    sys.exit(main())
