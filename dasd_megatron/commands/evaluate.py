"""``dasd evaluate``: Avg@k, Pass@k and Maj@k of a model on benchmarks, in NeMo-Skills' layout of files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.arguments import Parser
from dasd_megatron.commands.configuration import asks_for_help, load_arguments, print_fields


def evaluate(arguments: list[str]) -> None:
    """Run ``dasd evaluate``, with the defaults of the experiment ``evaluate`` where no other is named.

    Raises:
        Exception: what :func:`dasd_megatron.evaluation.standalone.evaluate_model` raises, and ConfigError for a
            configuration that cannot be read.
    """
    if asks_for_help(arguments):
        print_fields("evaluate")
    elif "--compare" in arguments:
        _compare(arguments)
    else:
        named = any(argument.startswith("experiment=") for argument in arguments)
        config = load_arguments(arguments if named else ["experiment=evaluate", *arguments])
        backend.check_devices(config.backend, 0, config.rollout.device)
        # torch and transformers come with this. A configuration that is refused does not wait for them.
        from dasd_megatron.evaluation.standalone import evaluate_model

        evaluate_model(config, hf_directory)


def _compare(arguments: Sequence[str]) -> None:
    """Print where two gradings of the same responses differ."""
    from dasd_megatron.evaluation import nemo_skills

    parser = Parser(prog="dasd evaluate --compare")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="FOLDER", required=True, help="folders of <benchmark>/output-rs*.jsonl"
    )
    first, second = parser.parse_args(arguments).compare
    nemo_skills.compare_folders(first, second)


def hf_directory(model_path: str, root: Path) -> Path:
    """Return ``model_path``, or where it is a Megatron checkpoint the directory under ``root`` that is made of it
    once."""
    from dasd_megatron.commands.convert import convert
    from dasd_megatron.files import replace_file
    from dasd_megatron.models.hf_config import is_megatron_checkpoint
    from dasd_megatron.models.hf_weights import fingerprint
    from dasd_megatron.reading import UnreadableError, read_json

    path, output, record = Path(model_path), root / "converted", root / "converted.json"
    if not is_megatron_checkpoint(path):
        return path
    source = {"checkpoint": str(path.resolve()), "files": fingerprint(path)}
    known = None
    # A record that cannot be read says nothing of what the directory was made of.
    with contextlib.suppress(UnreadableError):
        known = read_json(record, dict, advice="")
    if not output.is_dir() or known != source:
        convert(["megatron-to-hf", "--checkpoint", str(path), "--output", str(output), "--overwrite"])
        replace_file(record, json.dumps(source) + "\n")
    return output
