"""``dasd train``: check a run, prepare it and start its processes."""

from __future__ import annotations

import os
import socket

from dasd_megatron.commands.configuration import asks_for_help, load_arguments, print_fields
from dasd_megatron.config import Config, RolloutConfig
from dasd_megatron.errors import ConfigError


def train(arguments: list[str]) -> None:
    """Run ``dasd train``.

    Raises:
        SystemExit: a process of the run has failed; with its status.
        Exception: what :func:`dasd_megatron.run.prepare.prepare_run` and :func:`dasd_megatron.training.launch.launch`
            raise.
    """
    if "--dry-run" in arguments:
        from dasd_megatron.commands.dry_run import dry_run

        dry_run(arguments)
        return
    if asks_for_help(arguments):
        print_fields("train")
        return
    config = load_arguments(arguments)
    # Both variables are set under a torchrun of the user's own. RANK alone proves nothing: some containers set it for
    # each node.
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        _train_as_worker(config)
    else:
        _launch_workers(config)


def _train_as_worker(config: Config) -> None:
    from dasd_megatron.run.paths import choose_run_dir
    from dasd_megatron.training.worker import run

    run(config, choose_run_dir(config), prepared=False)


def _launch_workers(config: Config) -> None:
    # A configuration that is refused does not wait for these imports.
    from dasd_megatron import backend
    from dasd_megatron.run.paths import choose_run_dir
    from dasd_megatron.training.launch import launch, read_nodes

    nodes = read_nodes(config.run, config.parallel.world_size, os.environ)
    root = choose_run_dir(config)
    # The first node starts the server.
    serves = nodes.rank == 0 and config.rollout.replay is None
    backend.check_devices(config.backend, nodes.processes, config.rollout.device if serves else "cpu")
    if nodes.rank == 0:
        _check_port(config.rollout)

    def prepare() -> None:
        from dasd_megatron.run.prepare import prepare_run

        prepare_run(config, root)
        print(f"run directory: {root}", flush=True)

    status = launch(config, root, nodes, prepare)
    if status:
        raise SystemExit(status)


def _check_port(rollout: RolloutConfig) -> None:
    """Refuse (ConfigError) a ``rollout.port`` that the run's own rollout server cannot listen on."""
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
