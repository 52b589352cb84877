"""``dasd serve``: a rollout server in the foreground, the embedded one or SGLang."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from dasd_megatron.arguments import Parser, at_least, port, seconds, share
from dasd_megatron.config import RolloutConfig, SGLangConfig, check_sglang_arguments
from dasd_megatron.models.hf_config import check_complete_directory
from dasd_megatron.rollout.embedded import server
from dasd_megatron.rollout.local_server import LocalServer, ServerStartError

FOLLOW_SECONDS = 0.2


def _parser() -> Parser:
    parser = Parser(
        prog="dasd serve --engine sglang",
        description="Serve a Hugging Face directory with SGLang; its log goes to standard output. Arguments after -- "
        "are SGLang's own.",
    )
    parser.add_argument("--model-path", required=True, help="Hugging Face model directory")
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--python",
        help="interpreter of the environment that has SGLang (default: this one; cpu: .venv-sglang/bin/python)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=30000, help="default: 30000; 0: any free one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (default: bfloat16)"
    )
    parser.add_argument("--weight-version", default="default", help="version that the weights are served under")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--max-running-requests", type=at_least(1), default=256, help="sequences decoded at once (default: 256)"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="heed sampling_seed: equal seeds give equal samples"
    )
    parser.add_argument("--tp-size", type=at_least(1), default=1, help="GPUs that share each replica of the model")
    parser.add_argument("--dp-size", type=at_least(1), default=1, help="replicas behind the address")
    parser.add_argument("--mem-fraction-static", type=share, help="share of GPU memory for weights and key-value cache")
    parser.add_argument("--max-total-tokens", type=at_least(1), help="tokens in the key-value cache (cpu: 65536)")
    parser.add_argument(
        "--context-length", type=at_least(1), help="longest prompt and response together, tokens (default: the model's)"
    )
    parser.add_argument("--quantization", help="of the served weights, like fp8")
    parser.add_argument(
        "--startup-timeout", type=seconds, default=1800.0, metavar="SECONDS", help="to become healthy (default: 1800)"
    )
    return parser


def serve(arguments: list[str]) -> None:
    """Serve until SIGTERM or an interrupt.

    Raises:
        ServerStartError: the server did not become healthy, or ended by itself; with the end of its log.
        ConfigError: the model directory is none, or an argument of SGLang's is refused.
    """
    own, separator, passed_on = _split(arguments)
    engine = Parser(prog="dasd serve", add_help=False)
    engine.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    chosen, rest = engine.parse_known_args(own)
    if chosen.engine == "embedded":
        status = server.main(rest + separator + passed_on)
        if status:
            raise SystemExit(status)
        return
    options = _parser().parse_args(rest)
    check_complete_directory(options.model_path, "--model-path")
    cpu = options.backend == "cpu"
    rollout = RolloutConfig(
        engine="sglang",
        host=options.host,
        port=options.port,
        threads=options.threads,
        dtype=options.dtype,
        max_batch_size=options.max_running_requests,
        deterministic=options.deterministic,
        startup_timeout_seconds=options.startup_timeout,
        sglang=SGLangConfig(
            backend=options.backend,
            python=options.python or (".venv-sglang/bin/python" if cpu else None),
            tensor_parallel_size=options.tp_size,
            data_parallel_size=options.dp_size,
            mem_fraction_static=options.mem_fraction_static,
            max_total_tokens=options.max_total_tokens or (65536 if cpu else None),
            context_length=options.context_length,
            quantization=options.quantization,
            arguments=passed_on,
        ),
    )
    check_sglang_arguments(rollout.sglang)
    with tempfile.TemporaryDirectory() as folder:
        _serve_sglang(LocalServer(options.model_path, options.weight_version, rollout, Path(folder) / "sglang.log"))


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    if "--" not in arguments:
        return arguments, [], []
    index = arguments.index("--")
    return arguments[:index], ["--"], arguments[index + 1 :]


def _serve_sglang(sglang: LocalServer) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A signal may come while the server starts: the exception then ends the wait and the server.
        signal.signal(number, lambda *_: sys.exit(0) if not stop.is_set() else None)
    follower = threading.Thread(target=_follow, args=(sglang.log_path, stop), daemon=True)
    follower.start()
    try:
        with sglang:
            print(f"serving {sglang.model_path} on {sglang.url}", flush=True)
            while sglang.alive():
                time.sleep(FOLLOW_SECONDS)
            raise ServerStartError(f"SGLang has ended by itself. {sglang.log_tail()}")
    finally:
        stop.set()
        follower.join(2)


def _follow(path: Path, stop: threading.Event) -> None:
    """Copy what is appended to a file to standard output."""
    position = 0
    while True:
        ending = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if ending:
            return
        stop.wait(FOLLOW_SECONDS)
