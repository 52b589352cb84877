"""Process of the embedded server: its arguments, its socket, and how it ends."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
import uvicorn

from dasd_megatron import access, backend
from dasd_megatron.arguments import Parser, at_least, port
from dasd_megatron.errors import ConfigError, printable_lines
from dasd_megatron.models.hf_config import check_model_directory
from dasd_megatron.rollout.embedded.app import build_app
from dasd_megatron.rollout.embedded.connections import MAX_HEADER_BYTES, LimitedConnection
from dasd_megatron.rollout.embedded.engine import Engine
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError
from dasd_megatron.rollout.embedded.schema import MAX_NAME_LENGTH
from dasd_megatron.rollout.sockets import ListenError, bind

GRACEFUL_SHUTDOWN_SECONDS = 30
GIB = 1 << 30

# All modules of the embedded server log under the name of its entry point.
logger = logging.getLogger("dasd_megatron.rollout.server")


class _Server(uvicorn.Server):
    """uvicorn waits for open requests before it stops; this one ends them first."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close()
        await super().shutdown(sockets)


def watch_parent(stop: Callable[[], None]) -> None:
    """Call ``stop`` once standard input reaches its end or the parent process changes.

    The process exits hard if that does not end it.
    """
    parent = os.getppid()

    def watch() -> None:
        stdin = sys.stdin.fileno()
        while os.getppid() == parent:
            readable = select.select([stdin], [], [], 1.0)[0]
            if readable and not os.read(stdin, 4096):
                break
        stop()
        time.sleep(GRACEFUL_SHUTDOWN_SECONDS + 5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end.

    Raises ListenError, ModelDirectoryError, ConfigError or AccessError before that when the server cannot start.
    """
    check_model_directory(args.model_path, "--model-path")
    access.api_key()  # a wrong key is to be reported before the model is loaded
    sock = socket.socket(fileno=args.fd) if args.fd is not None else bind(args.host, args.port)
    access.warn_if_open(sock.getsockname()[0], "the rollout server")
    if args.exit_with_parent:
        # Before the model is loaded there is nothing to finish: a parent that dies early ends this process at once.
        stop: list[Callable[[], Any]] = [lambda: os._exit(1)]
        watch_parent(lambda: stop[0]())
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = backend.load(args.device)
    device = kind.serving_device()
    free = kind.free_memory(device)
    engine = Engine(
        args.model_path,
        device=device,
        dtype=getattr(torch, args.dtype),
        max_batch_size=args.max_batch_size,
        weight_version=args.weight_version,
        deterministic=args.deterministic,
        cache_bytes=int(args.cache_gib * GIB) if args.cache_gib is not None else free // 2,
    )
    logger.info(
        "%s had %.1f GiB free; the model takes %.1f, keys and values of %d tokens %.1f at most",
        device,
        free / GIB,
        engine.weight_bytes / GIB,
        engine.longest_sequence,
        engine.cache_bytes / GIB,
    )
    host, own_port = sock.getsockname()[:2]
    config = uvicorn.Config(
        build_app(engine, _settings(args, engine, host, own_port)),
        log_level="warning",
        access_log=False,
        http=LimitedConnection,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        timeout_keep_alive=60,
    )
    server = _Server(config, engine)
    if args.exit_with_parent:
        stop[0] = lambda: server.handle_exit(signal.SIGTERM, None)
    logger.info("serving %s (weight version %s) on http://%s:%d", args.model_path, args.weight_version, host, own_port)
    asyncio.run(server.serve(sockets=[sock]))


def _settings(args: argparse.Namespace, engine: Engine, host: str, port: int) -> dict[str, Any]:
    """Return the settings of the start, as /server_info shows them."""
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.model_path,
        "host": host,
        "port": port,
        "dtype": args.dtype,
        "device": str(engine.device),
        "threads": args.threads,
        "max_running_requests": args.max_batch_size,
        "cache_tokens": engine.cache_tokens,
        "context_length": engine.context_length,
        "vocab_size": engine.vocab_size,
        "deterministic": args.deterministic,
        "engine": "dasd_megatron embedded",
        "api": "sglang 0.5.23",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with status 2."""
    parser = Parser(
        prog="dasd serve",
        description="Serve a Hugging Face causal LM with SGLang's native HTTP API, on the CPU or one GPU. "
        "`dasd serve --engine sglang --help` is about SGLang itself.",
    )
    parser.add_argument("--model-path", required=True, help="Hugging Face model directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=port, default=30000, help="port to listen on; 0: any free one")
    parser.add_argument(
        # The trainer starts servers with a socket that it has bound.
        "--fd",
        type=int,
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the model (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads of the model")
    parser.add_argument(
        "--max-batch-size", "--max-running-requests", type=at_least(1), default=256, help="sequences decoded at once"
    )
    parser.add_argument(
        "--cache-gib",
        type=float,
        help="memory for keys and values in GiB; half of what the device has free at the start unless given",
    )
    parser.add_argument(
        "--weight-version", default="default", help="version of the weights that the server starts with"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="one request is one decoding batch, never merged with others"
    )
    parser.add_argument(
        # The trainer's servers exit when standard input ends or the parent process dies.
        "--exit-with-parent",
        action="store_true",
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args(argv)
    # NaN is in no range.
    if args.cache_gib is not None and not 0 < args.cache_gib <= 1 << 20:
        parser.error(f"--cache-gib must be in (0, {1 << 20}], got {args.cache_gib}")
    if len(args.weight_version) > MAX_NAME_LENGTH:
        parser.error(f"--weight-version may have at most {MAX_NAME_LENGTH} characters, got {len(args.weight_version)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        serve(args)
    except (ListenError, ModelDirectoryError, ConfigError, access.AccessError) as error:
        print(f"dasd: error: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    return 0
