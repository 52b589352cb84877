"""CPU time and bytes a token on the way of rollouts from a server's answer to a training step, and the same with lists
and JSON, which is how it was done before.

    python benchmarks/data_path.py                           # 0.03 and 0.5 million tokens
    python benchmarks/data_path.py --tokens 32768 4194304    # other sizes
    python benchmarks/data_path.py --quick --output out.json # one round of few tokens, to see that it works

Each part is done in two ways that alternate: ``columns`` is the package's own code, ``lists`` the former way, written
again here as :class:`Lists`. The parts are

- ``parse``: an answer of /generate is parsed and checked;
- ``pack`` and ``unpack``: a step's samples are made ready for the scatter, and made samples again (former: pickled);
- ``save``: written to a file and flushed to disk (former: a JSON object a line);
- ``read``: read back and checked (former: the package's reader of such lines);
- ``batches``: cut into packed micro-batches, eight sequences each;
- ``log_probs``: made one tensor of the servers' log-probs.

Decoding, grading and the network are in none of them. Responses have 8,192 random tokens of a vocabulary of 49,152 and
synthetic mathematical text; its bytes a token are in the results, since they count on disk. Times are CPU seconds of
this process, medians over the rounds. Ratios are taken within a round. Writes ``benchmarks/results/data_path.json``
unless told otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import pickle
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from machine import describe
from record import write_record

from dasd_megatron.files import atomic_file
from dasd_megatron.rollout.answers import Answer, Completion, read_completions
from dasd_megatron.rollout_files import read_samples, save_columns
from dasd_megatron.rollout_json import as_json
from dasd_megatron.sample_columns import Columns, from_columns, to_columns, without_teacher
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import BatchLayout, batch_samples, make_micro_batches

RESULTS = Path(__file__).parent / "results" / "data_path.json"
RESPONSE, PROMPT, GROUP, VOCAB = 8192, 128, 4, 49_152
ROWS_OF_A_REQUEST = 4
VERSION = "step_000001"
LAYOUT = BatchLayout(micro_batch_size=8, packing=True)
PIECES = ["\\\\frac{", "x", "}{", "2", " = ", "the ", "sum ", "of ", "3", "\n", " so ", "we have ", "+ ", "^2", "7"]
NAMES_OF_A_ROW = re.compile(rb'"(meta_info|output_ids|output_token_logprobs|finish_reason)"\s*:')


def make_answers(tokens: int, seed: int) -> list[bytes]:
    """Return answers of /generate with ``tokens`` tokens in all, four responses each."""
    draw = random.Random(seed)
    answers = []
    for _ in range(tokens // RESPONSE // ROWS_OF_A_REQUEST):
        rows = []
        for _ in range(ROWS_OF_A_REQUEST):
            ids = [draw.randrange(VOCAB) for _ in range(RESPONSE)]
            triples = [[-draw.expovariate(2.0), token, None] for token in ids]
            meta = {"finish_reason": {"type": "stop"}, "weight_version": VERSION, "output_token_logprobs": triples}
            rows.append({"text": "", "output_ids": ids, "meta_info": meta})
        answers.append(orjson.dumps(rows))
    return answers


def make_text(draw: random.Random) -> str:
    """Return a text as long as that of a response."""
    return "".join(draw.choices(PIECES, k=RESPONSE))


def facts_of(index: int) -> dict[str, Any]:
    """Return the fields of a sample that are no arrays, beside its text."""
    group = index // GROUP
    return {
        "group": group, "sample": index % GROUP, "position": group, "problem_id": f"p{group}",
        "problem": "What is 1 + 1? " * 20, "expected_answer": "2", "reference_solution": "It is 2. " * 40,
        "finish_reason": "stop", "reward": float(index % 2), "predicted_answer": "2", "timed_out": False,
    }  # fmt: skip


class ColumnsWay:
    """The package's own code."""

    def __init__(self, texts: list[str], prompts: list[list[int]], folder: Path) -> None:
        self.texts, self.path = texts, folder / "step_000001.safetensors"
        self.prompts = [np.array(prompt, np.int32) for prompt in prompts]

    def parse(self, answers: list[bytes]) -> list[Completion]:
        params = [{"max_new_tokens": RESPONSE}] * ROWS_OF_A_REQUEST
        return [
            completion
            for content in answers
            for completion in read_completions(Answer("/generate", 200, content), params, VERSION, VOCAB)
        ]

    def samples(self, completions: list[Completion]) -> list[Sample]:
        return [
            Sample(
                prompt_ids=self.prompts[index // GROUP], response_ids=found.output_ids, text=self.texts[index],
                rollout_log_probs=found.log_probs, weight_versions=[[*span] for span in found.weight_versions],
                **facts_of(index),
            )
            for index, found in enumerate(completions)
        ]  # fmt: skip

    def bytes_held(self, samples: list[Sample]) -> int:
        return sum(sample.response_ids.nbytes + sample.rollout_log_probs.nbytes for sample in samples)

    def pack(self, samples: list[Sample]) -> Columns:
        return to_columns(samples, with_teacher=True)

    def unpack(self, packed: Columns) -> list[Sample]:
        return from_columns(packed)

    def save(self, packed: Columns, samples: list[Sample]) -> None:
        save_columns(self.path, without_teacher(packed))

    def read(self) -> list[Sample]:
        return read_samples(self.path, vocab_size=VOCAB)

    def batches(self, samples: list[Sample]) -> object:
        return batch_samples(samples, [sample.prompt_ids for sample in samples], LAYOUT)

    def log_probs(self, samples: list[Sample]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([sample.of_sampled(sample.rollout_log_probs) for sample in samples]))


class Lists:
    """How it was done before: a Python object for each number, and JSON."""

    def __init__(self, texts: list[str], prompts: list[list[int]], folder: Path) -> None:
        self.texts, self.prompts, self.path = texts, prompts, folder / "step_000001.jsonl"

    def parse(self, answers: list[bytes]) -> list[dict[str, Any]]:
        return [self._row(row) for content in answers for row in self._rows(content)]

    def _rows(self, content: bytes) -> Any:
        assert max(Counter(NAMES_OF_A_ROW.findall(content)).values()) <= ROWS_OF_A_REQUEST
        gc.disable()
        rows = orjson.loads(content)
        gc.enable()
        return rows

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, triples = row["output_ids"], row["meta_info"]["output_token_logprobs"]
        assert all_of_type(ids, int) and min(ids) >= 0 and max(ids) < VOCAB and all_of_type(triples, list)
        log_probs, tokens, _ = zip(*triples, strict=True)
        assert all_of_type(log_probs, int, float) and all(map(math.isfinite, log_probs)) and max(log_probs) <= 1e-3
        assert list(tokens) == ids
        return {"response_ids": ids, "rollout_log_probs": list(map(float, log_probs))}

    def samples(self, completions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **facts_of(index), **found, "prompt_ids": list(self.prompts[index // GROUP]), "text": self.texts[index],
                "weight_versions": [[VERSION, RESPONSE]],
            }
            for index, found in enumerate(completions)
        ]  # fmt: skip

    def bytes_held(self, samples: list[dict[str, Any]]) -> int:
        lists = [sample[name] for sample in samples for name in ("response_ids", "rollout_log_probs")]
        numbers = {id(number): number for values in lists for number in values}
        return sum(map(sys.getsizeof, lists)) + sum(map(sys.getsizeof, numbers.values()))

    def pack(self, samples: list[dict[str, Any]]) -> bytes:
        return pickle.dumps(samples)

    def unpack(self, packed: bytes) -> list[dict[str, Any]]:
        return pickle.loads(packed)

    def save(self, packed: bytes, samples: list[dict[str, Any]]) -> None:
        with atomic_file(self.path) as partial, partial.open("w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample) + "\n")

    def read(self) -> list[Sample]:
        return read_samples(self.path, vocab_size=VOCAB)

    def batches(self, samples: list[dict[str, Any]]) -> object:
        return make_micro_batches(
            [sample["prompt_ids"] for sample in samples], [sample["response_ids"] for sample in samples], LAYOUT
        )

    def log_probs(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        values = [sample["rollout_log_probs"][place] for sample in samples for place in range(RESPONSE)]
        return torch.tensor(values, dtype=torch.float32)


def all_of_type(values: Any, *types: type) -> bool:
    """Return whether each value is of exactly one of ``types``, as the former parser looked."""
    found = list(map(type, values))
    return sum(map(found.count, types)) == len(found)


def run_once(way: Any, answers: list[bytes], tokens: int) -> tuple[dict[str, float], dict[str, float], list[Any]]:
    """Do all parts; return nanoseconds and bytes a token of each, and the samples that were read back."""
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds[part] = time.process_time() - started
        return result

    completions = timed("parse", lambda: way.parse(answers))
    samples = way.samples(completions)
    packed = timed("pack", lambda: way.pack(samples))
    timed("unpack", lambda: way.unpack(packed))
    timed("save", lambda: way.save(packed, samples))
    found = timed("read", way.read)
    timed("batches", lambda: way.batches(samples))
    timed("log_probs", lambda: way.log_probs(samples))
    sizes = {"held": way.bytes_held(samples) / tokens, "on_disk": way.path.stat().st_size / tokens}
    return {part: 1e9 * value / tokens for part, value in seconds.items()}, sizes, found


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Return the figures of ``tokens`` tokens, a multiple of 32,768: medians over the rounds and ratios within them."""
    draw = random.Random(0)
    answers = make_answers(tokens, seed=1)
    texts = [make_text(draw) for _ in range(tokens // RESPONSE)]
    prompts = [[draw.randrange(VOCAB) for _ in range(PROMPT)] for _ in range(len(texts) // GROUP)]
    times: dict[str, list[dict[str, float]]] = {"columns": [], "lists": []}
    sizes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = {"columns": ColumnsWay(texts, prompts, Path(folder)), "lists": Lists(texts, prompts, Path(folder))}
        for way in ways.values():
            # What is imported and allocated at the first call belongs to no part.
            run_once(way, answers[:1], RESPONSE * ROWS_OF_A_REQUEST)
        for number in range(rounds):
            read = {}
            for name in list(ways) if number % 2 == 0 else reversed(ways):
                found, sizes[name], read[name] = run_once(ways[name], answers, tokens)
                times[name].append(found | {"all": sum(found.values())})
                print(f"{tokens:,} tokens, round {number + 1}, {name}: {times[name][-1]}", file=sys.stderr, flush=True)
            assert list(map(as_json, read["columns"])) == list(map(as_json, read["lists"])), "the ways differ"
            read.clear()
    parts = times["columns"][0]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "text_bytes_a_token": sum(len(text.encode()) for text in texts) / tokens,
        "bytes_a_token": sizes,
        "cpu_ns_a_token": {
            name: {part: statistics.median(found[part] for found in all_found) for part in parts}
            for name, all_found in times.items()
        },
        "lists_to_columns": {
            part: statistics.median(
                lists[part] / max(columns[part], 1e-3)
                for lists, columns in zip(times["lists"], times["columns"], strict=True)
            )
            for part in parts
        },
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    least = RESPONSE * ROWS_OF_A_REQUEST
    parser.add_argument("--tokens", type=int, nargs="+", default=[least, 16 * least])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of the fewest tokens")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = [least], 1
    if any(tokens < least or tokens % least for tokens in options.tokens):
        parser.error(f"--tokens: multiples of {least}")
    record = {"machine": describe(), "sizes": [measure(tokens, options.rounds) for tokens in options.tokens]}
    write_record(options.output, record)
    print(json.dumps(record["sizes"], indent=2))


if __name__ == "__main__":
    main()
