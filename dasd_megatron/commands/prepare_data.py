"""``tools/prepare_data.py``: its arguments, and what it says at the end."""

from __future__ import annotations

import os
from pathlib import Path

from dasd_megatron.arguments import Parser
from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prepare import PrepareOptions, prepare_problems
from dasd_megatron.data.prompts import DataError

_DESCRIPTION = (
    "Problem sets in our format from Hugging Face datasets, JSON lines, JSON arrays or Parquet: cleaned, "
    "de-duplicated, and checked against evaluation sets. The columns of published sets are found by themselves."
)


def _parse(arguments: list[str]) -> PrepareOptions:
    parser = Parser(description=_DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="JSON lines, JSON array or Parquet; a folder or a pattern of such")
    source.add_argument("--dataset", help="name of a Hugging Face dataset, or a directory that save_to_disk wrote")
    parser.add_argument("--config", help="configuration of --dataset, like 'main' of gsm8k")
    parser.add_argument("--split", default="train", help="split of --dataset (default: train)")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--problem-field", help="column of the problem's text; a point leads into an object, like extra_info.question"
    )
    parser.add_argument("--answer-field", help="column of the final answer, like reward_model.ground_truth")
    parser.add_argument("--solution-field", help="column of the worked solution")
    parser.add_argument(
        "--no-answer",
        nargs="*",
        metavar="WORD",
        default=DataSourceConfig().no_answer,
        help="words that stand for a missing answer (default: %(default)s)",
    )
    parser.add_argument("--allow-missing-solution", action="store_true", help="keep problems without a worked solution")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory whose tokenizer counts the lengths")
    parser.add_argument("--max-problem-tokens", type=int, help="drop longer problems")
    parser.add_argument("--max-solution-tokens", type=int, help="drop problems with a longer solution")
    parser.add_argument(
        "--contamination",
        type=Path,
        nargs="*",
        default=[],
        help="evaluation sets; problems that repeat one are dropped",
    )
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that count as a repetition (default: 13)")
    return PrepareOptions(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> None:
    """Run ``tools/prepare_data.py``.

    Raises:
        DataError, ConfigError: with one line on what is wrong.
    """
    options = _parse(arguments)
    if (options.max_problem_tokens or options.max_solution_tokens) and options.tokenizer is None:
        raise DataError("--max-problem-tokens and --max-solution-tokens count tokens: give --tokenizer DIRECTORY")
    if options.ngram < 1:
        raise DataError(f"--ngram {options.ngram}: give 1 or more")
    if options.output.exists():
        raise DataError(f"{options.output} exists; remove it, or give another --output")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(options.output.parent, os.W_OK):
        raise DataError(f"{options.output.parent} cannot be written to; give another --output")
    manifest = prepare_problems(options)
    print(f"kept {manifest['kept']} in {options.output}")
    for line in manifest["found"]:
        print(line)
    for reason, count in manifest["dropped"].items():
        print(f"dropped {count}: {reason}")
    if manifest["dropped"]:
        print(f"each with its row in {options.output.with_suffix('.rejected.jsonl')}")
