"""``dasd rollouts``: what stands in files of rollouts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dasd_megatron.arguments import Parser, at_least
from dasd_megatron.errors import printable, printable_lines
from dasd_megatron.rollout_files import read_samples
from dasd_megatron.rollout_json import as_json
from dasd_megatron.samples import Sample

_TEXTS = ("problem", "expected_answer", "predicted_answer", "feedback", "privileged", "text")


def show_rollouts(arguments: list[str]) -> None:
    """Run ``dasd rollouts``.

    Raises:
        ReplayError: a file cannot be read.
    """
    parser = Parser(prog="dasd rollouts", description="Look into files of rollouts.")
    show = parser.add_subparsers(required=True, metavar="show").add_parser("show", help="print rollouts")
    show.add_argument("files", type=Path, nargs="+", metavar="FILE", help="RUN/rollouts/step_<n>.safetensors or .jsonl")
    show.add_argument("--group", type=at_least(0), metavar="N", help="only the responses to this prompt of the step")
    show.add_argument("--first", type=at_least(1), metavar="N", help="of each file only so many")
    show.add_argument("--json", action="store_true", help="one JSON object a line, with all ids and log-probs")
    options = parser.parse_args(arguments)
    with _ending_quietly():
        for path in options.files:
            samples = [sample for sample in read_samples(path) if options.group in (None, sample.group)]
            for line in _lines(samples[: options.first], options.json):
                print(line)


def _lines(samples: Sequence[Sample], in_json: bool) -> Iterator[str]:
    for sample in samples:
        yield json.dumps(as_json(sample)) if in_json else describe(sample)


def describe(sample: Sample) -> str:
    """Return a sample for people: a line of numbers, and its texts below. What no terminal shows is left out."""
    masked = "" if sample.response_mask is None else f" of {len(sample.response_ids)}"
    versions = ", ".join(f"{tokens} of {name}" for name, tokens in sample.weight_versions)
    measures = "".join(f", {name}={value:g}" for name, value in (sample.measures or {}).items())
    head = (
        f"group {sample.group}, sample {sample.sample}: reward {sample.reward:g}, {len(sample.sampled)}{masked} tokens "
        f"({versions}), {sample.finish_reason}{', grading timed out' if sample.timed_out else ''}{measures}; problem "
        f"{sample.problem_id}, mean log-prob {sample.of_sampled(sample.rollout_log_probs).mean():.4f}"
    )
    texts = [(name, getattr(sample, name)) for name in _TEXTS]
    shown = [f"  {name}: {_indented(text)}" for name, text in texts if text]
    return "\n".join([printable(head), *shown, ""])


def _indented(text: str) -> str:
    return printable_lines(text).replace("\n", "\n    ")


@contextlib.contextmanager
def _ending_quietly() -> Iterator[None]:
    """End the block without an error when nobody reads on, as behind a pipe to ``head``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
