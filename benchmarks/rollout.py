"""Tokens a second of the rollout servers, as ratios to ``transformers.generate`` in the same run, and the cost of the
client alone.

    python benchmarks/rollout.py --model models/smollm2      # both parts
    python benchmarks/rollout.py --parts client              # one of them; what the results file has of the other stays
    python benchmarks/rollout.py --quick --output out.json   # a tiny model and few rounds, to see that it works

Part ``generation`` uses the same weights, dtype, threads, prompts and number of new tokens in every way; the end of
sequence is ignored. The ways are

- ``transformers.generate`` on one batch in this process;
- the embedded server with all streams in one request, which is one batch whatever ``rollout.deterministic`` says;
- the embedded server with the streams in several requests at once, which are merged unless it is set;
- real SGLang on the CPU.

The servers return log-probs and ``generate`` does not. Seconds are from request to checked completions, reading the
prompts included. Every round has prompts of its own, so that no prefix cache helps.

Part ``client`` runs :class:`RolloutClient` against a server without a model (``canned_server.py``), in another process.
Peers are bare HTTP clients with as many requests in flight, which do not read their answers, and bare JSON parsers.

Ways alternate, every other round in reverse. Figures are medians over the rounds with the least and the most; ratios
are taken within each round. Writes ``benchmarks/results/rollout.json`` unless told otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from canned_server import VERSION, VOCAB_SIZE, canned_answer
from machine import describe
from record import write_record

from dasd_megatron.config import RolloutConfig, SGLangConfig, TinyModelConfig
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.local_server import LocalServer

ROOT = Path(__file__).parents[1]
BASELINE = "transformers.generate"
IN_FLIGHT = 64
Work = Callable[[], object]


def measure(ways: dict[str, Work], rounds: int, units: int) -> dict[str, dict[str, Any]]:
    """Return ``units`` a second of each way: the median over the rounds, [least, most], and the median ratio to the
    first way."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            ways[name]()
            rates[name].append(units / (time.perf_counter() - started))
            print(f"round {number + 1}, {name}: {rates[name][-1]:,.0f}/s", file=sys.stderr, flush=True)
    base = next(iter(rates.values()))
    return {
        name: {
            "rate": statistics.median(found),
            "spread": [min(found), max(found)],
            "ratio": statistics.median(rate / base_rate for rate, base_rate in zip(found, base, strict=True)),
        }
        for name, found in rates.items()
    }


class Prompts:
    """Random prompts, the same for all ways of a round: a way's n-th call gets the n-th set."""

    def __init__(self, streams: int, tokens: int, vocab_size: int) -> None:
        self.shape = (streams, tokens)
        self.vocab_size = vocab_size
        self.calls: dict[str, int] = {}

    def next(self, way: str) -> torch.Tensor:
        """Return prompts, [streams, tokens] int64."""
        self.calls[way] = self.calls.get(way, 0) + 1
        return torch.randint(self.vocab_size, self.shape, generator=torch.Generator().manual_seed(self.calls[way]))


def by_transformers(model: Any, prompts: torch.Tensor, new_tokens: int) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )
    with torch.inference_mode():
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    assert found.shape == (prompts.shape[0], prompts.shape[1] + new_tokens), found.shape


def by_server(config: RolloutConfig, url: str, prompts: torch.Tensor, new_tokens: int, requests: int) -> None:
    common = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": new_tokens, "ignore_eos": True}
    params = [{**common, "sampling_seed": seed} for seed in range(len(prompts))]

    async def sample() -> None:
        async with make_client(config, [url]) as client:
            rows = -(-len(prompts) // requests)
            found = await client.generate(prompts.tolist(), params, weight_version="start", rows_per_request=rows)
        assert {len(completion.output_ids) for completion in found} == {new_tokens}

    asyncio.run(sample())


def load_baseline(options: argparse.Namespace) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=getattr(torch, options.dtype),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    # The model's own settings, like an end of sequence, would count beside those of the call.
    model.generation_config = transformers.GenerationConfig()
    return model.eval().requires_grad_(False)


def start_servers(
    options: argparse.Namespace, config: RolloutConfig, folder: Path, stack: contextlib.ExitStack
) -> dict[str, tuple[str, int]]:
    """Start the servers, which end with ``stack``; return address and number of requests of each way through them."""

    def start(name: str, rollout: RolloutConfig) -> str:
        return stack.enter_context(LocalServer(options.model, "start", rollout, folder / f"{name}.log")).url

    merging, deterministic = (
        start(f"embedded-{value}", dataclasses.replace(config, deterministic=value)) for value in (False, True)
    )
    servers = {"embedded, one request": (merging, 1)}
    if options.requests > 1:
        servers[f"embedded, {options.requests} requests, merged"] = (merging, options.requests)
        servers[f"embedded, {options.requests} requests, deterministic"] = (deterministic, options.requests)
    if options.quick:
        print("SGLang is left out: --quick", file=sys.stderr)
    elif not options.sglang_python.is_file():
        print(f"SGLang is left out: {options.sglang_python} is missing (make sglang-cpu builds it)", file=sys.stderr)
    else:
        room = max(4096, 2 * max(options.streams) * (options.prompt_tokens + options.new_tokens))
        settings = SGLangConfig(backend="cpu", python=str(options.sglang_python), max_total_tokens=room)
        rollout = dataclasses.replace(
            config, engine="sglang", sglang=settings, deterministic=False, startup_timeout_seconds=240.0
        )
        servers["SGLang, one request"] = (start("sglang", rollout), 1)
    return servers


def generation_ways(
    model: Any, config: RolloutConfig, servers: dict[str, tuple[str, int]], prompts: Prompts, new_tokens: int
) -> dict[str, Work]:
    """Return the ways to draw ``new_tokens`` for each of the prompts, the baseline first."""
    streams = prompts.shape[0]
    ways: dict[str, Work] = {BASELINE: lambda: by_transformers(model, prompts.next(BASELINE), new_tokens)}
    for name, (url, requests) in servers.items():
        # Fewer streams than requests would be the way with one request again.
        if requests <= streams:
            ways[name] = lambda name=name, url=url, requests=requests: by_server(
                config, url, prompts.next(name), new_tokens, requests
            )
    return ways


def generation(options: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens a second at each number of streams; the servers stand by, idle, while another way runs."""
    model = load_baseline(options)
    config = RolloutConfig(
        max_new_tokens=options.new_tokens,
        max_prompt_tokens=options.prompt_tokens,
        threads=options.threads,
        dtype=options.dtype,
        max_batch_size=max(options.streams),
        request_timeout_seconds=240.0,
        max_retries=0,
    )
    cells: dict[str, dict[int, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = start_servers(options, config, folder, stack)
        for streams in options.streams:
            prompts = Prompts(streams, options.prompt_tokens, model.config.vocab_size)
            for warm_up in generation_ways(model, config, servers, prompts, min(2, options.new_tokens)).values():
                warm_up()
            print(f"{streams} streams", file=sys.stderr)
            ways = generation_ways(model, config, servers, prompts, options.new_tokens)
            for name, row in measure(ways, options.rounds, streams * options.new_tokens).items():
                cells.setdefault(name, {})[streams] = row
    names = ("dtype", "threads", "streams", "requests", "prompt_tokens", "new_tokens", "rounds")
    return {
        "machine": describe(),
        "settings": {
            "parameters": model.num_parameters(),
            "architecture": model.config.model_type,
            **{name: getattr(options, name) for name in names},
        },
        "tokens_per_second": cells,
    }


def generation_table(part: dict[str, Any]) -> str:
    streams = part["settings"]["streams"]
    lines = ["| tokens/s (ratio) | " + " | ".join(f"{n} {'stream' if n == 1 else 'streams'}" for n in streams) + " |"]
    lines.append("|---" * (1 + len(streams)) + "|")
    for name, cells in part["tokens_per_second"].items():
        found = [cells.get(n) for n in streams]
        texts = [
            ""
            if cell is None
            else f"{cell['rate']:,.1f} [{cell['spread'][0]:,.1f}, {cell['spread'][1]:,.1f}] ({cell['ratio']:.2f})"
            for cell in found
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def canned_server(rows: int, tokens: int) -> Iterator[str]:
    """Yield the address of a server in another process that answers every request with ``rows`` rows of ``tokens``
    tokens."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("canned_server.py")),
        "--rows",
        str(rows),
        "--tokens",
        str(tokens),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def by_client(url: str, requests: int, rows: int, tokens: int, in_flight: int) -> None:
    common = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": tokens}
    params = [{**common, "sampling_seed": seed} for seed in range(requests * rows)]
    prompts = [list(range(tokens))] * (requests * rows)
    limits = {"connect_timeout": 5.0, "request_timeout": 60.0, "max_retries": 0, "backoff": 0.0}

    async def sample() -> None:
        async with RolloutClient([url], max_in_flight=in_flight, **limits) as client:
            await client.generate(prompts, params, weight_version=VERSION, rows_per_request=rows, vocab_size=VOCAB_SIZE)

    asyncio.run(sample())


def by_bare_client(library: str, url: str, requests: int, tokens: int) -> None:
    """Send as many requests by an HTTP library alone."""
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": tokens, "sampling_seed": 1}
    body = json.dumps(
        {"input_ids": [list(range(tokens))], "sampling_params": [params], "return_logprob": True}
    ).encode()
    headers = {"Content-Type": "application/json"}
    send_all = _send_by_httpx if library == "httpx" else _send_by_aiohttp
    asyncio.run(send_all(f"{url}/generate", body, headers, requests))


async def _send_by_httpx(url: str, body: bytes, headers: dict[str, str], requests: int) -> None:
    import httpx

    limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
    async with httpx.AsyncClient(limits=limits, timeout=60.0, trust_env=False) as http:
        await _repeat(lambda: http.post(url, content=body, headers=headers), requests)


async def _send_by_aiohttp(url: str, body: bytes, headers: dict[str, str], requests: int) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT)) as session:

        async def send() -> None:
            async with session.post(url, data=body, headers=headers) as response:
                await response.read()

        await _repeat(send, requests)


async def _repeat(send: Callable[[], Awaitable[object]], count: int) -> None:
    """Send ``count`` times, with :data:`IN_FLIGHT` requests at once."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await send()

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def client(options: argparse.Namespace) -> dict[str, Any]:
    """Measure requests a second with short answers, and tokens a second with long ones."""
    import orjson

    short, (rows, tokens) = 32, (4, 64) if options.quick else (64, 4096)
    many, few = (100, 2) if options.quick else (2000, 4)
    with canned_server(1, short) as url:
        by_client(url, 100, 1, short, IN_FLIGHT)
        requests = {
            "RolloutClient": lambda: by_client(url, many, 1, short, IN_FLIGHT),
            "aiohttp alone": lambda: by_bare_client("aiohttp", url, many, short),
            "httpx alone": lambda: by_bare_client("httpx", url, many, short),
        }
        per_second = measure(requests, options.rounds, many)
    body = canned_answer(rows, tokens)
    with canned_server(rows, tokens) as url:
        reading = {
            "RolloutClient": lambda: by_client(url, few, rows, tokens, few),
            "orjson alone": lambda: [orjson.loads(body) for _ in range(few)],
            "json alone": lambda: [json.loads(body) for _ in range(few)],
        }
        tokens_per_second = measure(reading, options.rounds, few * rows * tokens)
    settings = {
        "requests": {"count": many, "rows": 1, "tokens": short, "in_flight": IN_FLIGHT},
        "reading": {"count": few, "rows": rows, "tokens": tokens, "in_flight": few, "bytes": len(body)},
        "rounds": options.rounds,
    }
    return {
        "machine": describe(),
        "settings": settings,
        "requests_per_second": per_second,
        "tokens_per_second": tokens_per_second,
    }


def client_table(part: dict[str, Any]) -> str:
    lines = []
    for title, key in (("requests/s", "requests_per_second"), ("tokens/s read", "tokens_per_second")):
        lines += [f"| {title} | median | least | most |", "|---" * 4 + "|"]
        for name, row in part[key].items():
            lines.append(f"| {name} | {row['rate']:,.0f} | {row['spread'][0]:,.0f} | {row['spread'][1]:,.0f} |")
        lines.append("")
    return "\n".join(lines)


PARTS = {"generation": (generation, generation_table), "client": (client, client_table)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--model", type=Path, help="Hugging Face directory, for the part generation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="sequences generated at once")
    parser.add_argument(
        "--requests", type=int, default=4, help="requests that the streams are spread over, in the ways with several"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sglang-python",
        type=Path,
        default=ROOT / ".venv-sglang" / "bin" / "python",
        help="interpreter that has SGLang",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model, few streams, tokens and rounds, no SGLang"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rollout.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            from dasd_megatron.models.tiny import make_tiny_model

            options.model = make_tiny_model(Path(folder) / "tiny", TinyModelConfig(), seed=0)
            options.streams, options.requests, options.new_tokens, options.rounds = [1, 4], 2, 4, 2
        if "generation" in options.parts and options.model is None:
            parser.error("the part generation needs --model DIR (or --quick)")
        results = json.loads(options.output.read_text()) if options.output.exists() else {}
        for name in options.parts:
            run, table = PARTS[name]
            results[name] = run(options)
            print(f"\n{table(results[name])}", flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_record(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
