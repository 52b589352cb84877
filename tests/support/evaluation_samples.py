"""Samples of an evaluation without a server: seven problems, and an engine whose answers depend on the seed alone."""

from __future__ import annotations

import asyncio
import io
import random
from pathlib import Path

from dasd_megatron.config import Config, VerifyConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.evaluation.sampling import Records, sample_benchmark
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.verify.grader import Grader

TOKENIZER = character_tokenizer()
PROBLEMS = [Problem(f"p{i}", f"{i}+1 =", str(i + 1), "") for i in range(7)]
PROMPTS = [TOKENIZER.encode(problem.problem) for problem in PROBLEMS]


class Engine:
    """Answers by the seed alone, in a random order of requests, and fails at the request ``last``."""

    def __init__(self, last: int | None = None, *, same: bool = False, log_prob: float | None = None) -> None:
        self.last, self.same, self.log_prob, self.requests = last, same, log_prob, []

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def generate(self, prompts, params, *, weight_version, rows_per_request) -> list[Completion]:
        assert len(prompts) <= rows_per_request and weight_version == "w"
        await asyncio.sleep(random.random() / 200)
        if self.last is not None and len(self.requests) >= self.last:
            raise RolloutServerError("http://server", "gone", 1, "look at its log")
        self.requests.append([options["sampling_seed"] for options in params])
        return [
            self.completion(prompt, options["sampling_seed"]) for prompt, options in zip(prompts, params, strict=True)
        ]

    def completion(self, prompt: list[int], seed: int) -> Completion:
        term = int(TOKENIZER.decode(prompt).split("+")[0])
        noise = 0 if self.same else seed % 3
        text = "no mark" if noise == 2 else f"{seed % 1000 if not self.same else ''} #### {term + 1 + noise}"
        ids = [*TOKENIZER.encode(text), TOKENIZER.eos_token_id]
        log_prob = -(seed % 97) / 7 if self.log_prob is None else self.log_prob
        return Completion(ids, [log_prob] * len(ids), "length" if noise == 2 else "stop", [("w", len(ids))], "")


def draw(config: Config, folder: Path, engine: Engine) -> Records:
    folder.mkdir(exist_ok=True)
    with Grader(VerifyConfig(workers=0)) as grader, ProgressDisplay(total_steps=0, stream=io.StringIO()) as display:
        return sample_benchmark(
            config,
            folder,
            PROBLEMS,
            PROMPTS,
            client=engine,
            grader=grader,
            tokenizer=TOKENIZER,
            weight_version="w",
            display=display,
        )
