"""``dasd evaluate``: Avg@k, Pass@k and Maj@k of a Hugging Face directory, or of servers that run already."""

from __future__ import annotations

import contextlib
import json
import sys

from dasd_megatron.config import Config, ConfigError
from dasd_megatron.data.generators import generate_problems
from dasd_megatron.data.prompts import load_problems
from dasd_megatron.data.templates import check_lengths
from dasd_megatron.evaluation.evaluate import evaluate
from dasd_megatron.observability.progress import ProgressDisplay, summary_table
from dasd_megatron.rollout.discovery import find_servers
from dasd_megatron.rollout.generation import make_client
from dasd_megatron.rollout.launch import LocalServer
from dasd_megatron.training.prepare import check_key, choose_run_dir, load_tokenizer, make_renderer, require_hf_directory
from dasd_megatron.verify.grader import Grader


def evaluate_model(config: Config) -> None:
    """Evaluate ``model.path`` on ``data.heldout`` and print the table; the results go to ``evaluation.json`` in the run directory.

    With ``rollout.engine=external`` the external servers answer and ``model.path`` only gives the tokenizer.
    """
    if config.model.path is None:
        raise ConfigError("model.path is required to evaluate: give a Hugging Face directory, like the model/ folder of a finished run")
    require_hf_directory(config)
    check_key(config)
    source = config.data.heldout
    problems = (
        generate_problems(source, "heldout") if source.generator is not None else load_problems(source, "heldout", needs_solution=False)
    )
    tokenizer = load_tokenizer(config.model.path)
    renderer = make_renderer(config, tokenizer)
    check_lengths(problems, renderer, config.rollout.max_prompt_tokens, teacher=False)
    root = choose_run_dir(config)
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(total_steps=0))
        grader = stack.enter_context(Grader(config.verify))
        urls, version = find_servers(config.rollout), None
        if config.rollout.engine != "external":
            version = "evaluated"
            server = stack.enter_context(LocalServer(config.model.path, version, config.rollout, root / "logs" / "rollout_server.log"))
            urls = [server.url]
        with display.phase(f"evaluate {len(problems)} problems x {config.evaluation.samples} samples"):
            metrics = evaluate(
                config,
                make_client(config.rollout, urls),
                grader,
                renderer,
                tokenizer,
                problems,
                step=0,
                label="evaluate",
                weight_version=version,
                samples_path=root / "evaluations" / "evaluate" / "samples.jsonl",
            )
    (root / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
    summary_table(metrics, None, {"model": config.model.path, "samples": (root / "evaluations" / "evaluate").absolute()}, stream=sys.stdout)
