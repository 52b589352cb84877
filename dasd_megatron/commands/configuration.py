"""The arguments of the subcommands that take the whole configuration: train, evaluate and rollout."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dasd_megatron.arguments import Parser
from dasd_megatron.config import UMASKS, Config, known_fields, load_config


def load_arguments(arguments: Sequence[str]) -> Config:
    """Return the configuration that the arguments describe.

    Its ``run.readable_by`` becomes the mask of new files of this process and of all that it starts.
    """
    parser = Parser(
        prog="dasd", usage="dasd train | evaluate | rollout [--config-dir DIR] [field=value ...]", add_help=False
    )
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.overrides, options.config_dir)
    os.umask(UMASKS[config.run.readable_by])
    return config


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return True where --help is among the arguments."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def print_fields(command: str) -> None:
    """Print the usage of a subcommand with every field of the configuration."""
    fields = known_fields()
    width = max(map(len, fields))
    lines = [f"  {name:<{width}}  {text}" for name, text in fields.items()]
    options = "  --config-dir DIR: a directory of your own groups, as DIR/experiment/NAME.yaml"
    if command == "train":
        options += (
            "\n  --dry-run: print what the run would do on a whole cluster; `dasd train --dry-run --help` lists its "
            "options"
        )
    usage = f"usage: dasd {command} [--config-dir DIR] [experiment=NAME] [field=value ...]"
    print("\n".join([usage, "", options, "", "fields:", *lines]))
