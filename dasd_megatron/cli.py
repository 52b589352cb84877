"""The ``dasd`` command: its usage, and which module runs each subcommand."""

from __future__ import annotations

import importlib
import sys

from dasd_megatron.errors import report_errors

_USAGE = """usage: dasd COMMAND ...

commands:
  train     OVERRIDES           train; for example: dasd train experiment=quickstart algorithm.beta=0.1
            --dry-run OVERRIDES print what it would do on a whole cluster, without data, GPUs or servers \
(--help lists the options)
  evaluate  OVERRIDES           evaluate model.path on evaluation.benchmarks, or on data.heldout
            --compare DIR DIR   where two gradings of the same responses differ
  rollout   OVERRIDES           sample and grade the rollouts of run.steps steps without training on them, \
for rollout.replay
  rollouts  show FILE ...       what stands in files of rollouts, for people or as JSON (--help lists the options)
  plan      [--search --gpus N] OVERRIDES   memory and traffic of a configuration, without a GPU \
(--help lists the options)
  convert   hf-to-megatron | megatron-to-hf | gguf-to-hf ...
  serve     [--engine sglang] --model-path DIR   serve a Hugging Face directory for rollouts (--help lists the options)
  router    --servers URL ...   put sglang-router before rollout servers (--help lists the options)
  report    RUN [RUN ...] [--output FILE]   one page about a run, or about several overlaid; default: RUN/report.html
  doctor                        what is installed, what is missing and how to get it

`dasd train --help` lists every field of the configuration."""

COMMANDS = {
    "train": "dasd_megatron.commands.train:train",
    "evaluate": "dasd_megatron.commands.evaluate:evaluate",
    "rollout": "dasd_megatron.commands.rollout:collect_rollouts",
    "rollouts": "dasd_megatron.commands.rollouts:show_rollouts",
    "convert": "dasd_megatron.commands.convert:convert",
    "plan": "dasd_megatron.commands.plan:plan",
    "serve": "dasd_megatron.commands.serve:serve",
    "router": "dasd_megatron.commands.router:route",
    "report": "dasd_megatron.commands.report:report",
    "doctor": "dasd_megatron.commands.doctor:diagnose",
}
"""Each subcommand and the function that runs it with its arguments. It is imported when it is chosen, so that no
command waits for what another one imports."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand with its arguments, by default those of this process, and return its exit status."""
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], list(arguments[1:])
    if command not in COMMANDS:
        print(f"dasd: error: {command!r} is not a command\n\n{_USAGE}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[command].partition(":")
    run = getattr(importlib.import_module(module), function)
    return report_errors(lambda: run(rest))


if __name__ == "__main__":
    sys.exit(main())
