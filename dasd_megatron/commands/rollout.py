"""``dasd rollout``: the rollouts of training steps without a trainer, for looking at and for ``rollout.replay``."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_megatron import backend
from dasd_megatron.commands.configuration import asks_for_help, load_arguments, print_fields
from dasd_megatron.config import Config, read_config
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.templates import make_renderer
from dasd_megatron.models.hf_config import load_tokenizer, read_hf_config
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.buffer import BufferState
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.collector import Collector
from dasd_megatron.rollout.discovery import check_models, check_updated, find_servers
from dasd_megatron.rollout.local_server import LocalServer
from dasd_megatron.rollout_files import rollouts_path, save_samples
from dasd_megatron.run.checks import require_hf_directory, teacher_of_rollouts
from dasd_megatron.run.paths import choose_run_dir, run_problems, start_hf_files, start_path
from dasd_megatron.run.prepare import prepare_run
from dasd_megatron.samples import version_name
from dasd_megatron.verify.grader import Grader

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def collect_rollouts(arguments: list[str]) -> None:
    """Run ``dasd rollout``.

    Raises:
        Exception: what :func:`sample_steps` raises, and ConfigError for a configuration that cannot be read.
    """
    if asks_for_help(arguments):
        print_fields("rollout")
        return
    config = load_arguments(arguments)
    backend.check_devices(config.backend, 0, config.rollout.device)
    sample_steps(config, choose_run_dir(config))


def sample_steps(config: Config, root: Path) -> None:
    """Sample, grade and filter the rollouts of ``run.steps`` steps, all from the starting model, into
    ``<root>/rollouts``.

    Prompts, seeds, filters and files are those of training, so ``rollout.replay=<root>/rollouts`` trains on them.
    External servers load the model from ``model.path``, which they have to reach.

    Raises:
        ConfigError: the configuration cannot run, or ``model.path`` is a Megatron checkpoint.
        RolloutServerError, PluginError, GraderError: see :meth:`Collector.take`; the steps that are done stay.
    """
    require_hf_directory(config.model.path)
    paths = prepare_run(config, root)
    config = read_config(paths.config)
    model = start_path(config.model, paths)
    tokenizer = load_tokenizer(start_hf_files(config.model, paths))
    version = version_name(0)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(total_steps=0))
        grader = stack.enter_context(Grader(config.verify))
        urls = find_servers(config.rollout)
        if config.rollout.engine != "external":
            log = root / "logs" / "rollout_server.log"
            urls = [stack.enter_context(LocalServer(model, version, config.rollout, log)).url]
        else:
            asyncio.run(_load(make_client(config.rollout, urls), model.absolute(), read_hf_config(model)))
        problems = run_problems(paths, "train")
        renderer, vocab_size = make_renderer(config.data, config.teacher, tokenizer), read_hf_config(model).vocab_size
        collector = Collector(
            config.rollout,
            config.batch,
            problems=problems,
            order=DataOrder(len(problems), config.run.seed, config.data.shuffle),
            renderer=renderer,
            teacher=teacher_of_rollouts(config, renderer, problems, vocab_size),
            grader=grader,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            state=BufferState(),
        )
        stack.callback(collector.close)
        collector.connect(make_client(config.rollout, urls))
        collector.after_sync(0)
        with display.phase(f"rollouts of {config.run.steps} steps", total=config.run.steps) as phase:
            for step in range(1, config.run.steps + 1):
                samples = collector.take().samples()
                save_samples(rollouts_path(paths.rollouts, step), samples)
                phase.advance(accuracy=sum(sample.reward > 0 for sample in samples) / len(samples))
    print(f"rollouts: {paths.rollouts.absolute()}", flush=True)


async def _load(client: RolloutClient, path: Path, hf_config: PretrainedConfig) -> None:
    async with client:
        await check_models(client, hf_config)
        await client.update_weights_from_disk(str(path), version_name(0))
        await check_updated(client)
