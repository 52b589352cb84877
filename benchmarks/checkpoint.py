"""Time that a checkpoint takes, and time that training stands still for it: written while training waits, and in the
background.

    python benchmarks/checkpoint.py                  # SmolLM2-135M's sizes with random weights, one process
    python benchmarks/checkpoint.py --layers 2       # a quick look

The trainer has taken one optimizer step. It computes matrix products on one thread while a checkpoint is written. The
length of a checkpoint is from the call to the rename. ``slower`` is by how much the same products took longer beside
the writing process than alone. Figures are medians of ``--rounds`` after three that are not counted: the ranks work out
in these what does not change from one checkpoint to the next. Writes ``benchmarks/results/checkpoint.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from machine import describe
from record import write_record

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig, Config, load_config

_UNCOUNTED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; default: a temporary directory")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    options = parser.parse_args()
    environment = backend.process_environment(BackendConfig())
    if not environment.items() <= os.environ.items():
        # The launcher starts a trainer with these variables: the C library reads them before Python runs.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
    os.environ.update(
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29678"}
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = make_model(options.layers, Path(folder))
        backend.select(config.backend)
        record = measure(config, options.rounds, Path(folder))
    print(f"{record['bytes'] / 1e9:.2f} GB in a checkpoint")
    print("| | length, s | training waits, s | share | slower |\n|---|---|---|---|---|")
    for name, row in record["ways"].items():
        slower = "" if row["slower"] is None else f"{row['slower']:.1%}"
        print(f"| {name} | {row['length']:.2f} | {row['stall']:.2f} | {row['stall'] / row['length']:.1%} | {slower} |")
    write_record(options.output, {"machine": describe(), "layers": options.layers, **record})


def make_model(layers: int, folder: Path) -> Config:
    """Write a random model of SmolLM2-135M's sizes as a Hugging Face directory; return the configuration that trains
    it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dasd_megatron.models.tiny import character_tokenizer

    sizes = dict(
        load_config(["experiment=quickstart", "model=smollm2_135m", "model.path=/"]).model.architecture,
        num_hidden_layers=layers,
    )
    sizes.pop("model_type")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    return load_config(["experiment=quickstart", "parallel=single", "model=hf", f"model.path={folder / 'model'}"])


def measure(config: Config, rounds: int, folder: Path) -> dict:
    import torch

    from dasd_megatron.models.gpt import build_model
    from dasd_megatron.training import parallel
    from dasd_megatron.training.checkpoint import CheckpointSaver
    from dasd_megatron.training.checkpoint_files import checkpoint_path
    from dasd_megatron.training.checkpoint_search import TrainerState
    from dasd_megatron.training.optimizer import build_optimizer

    parallel.initialize(config)
    model = build_model(config, folder / "model")
    optimizer = build_optimizer(config.optimizer, model, steps=10, updates_per_step=1)
    optimizer.step()
    factors = torch.rand(512, 512)

    def compute() -> float:
        started = time.perf_counter()
        for _ in range(20):
            factors @ factors
        return time.perf_counter() - started

    alone = statistics.median(compute() for _ in range(20))
    step, ways = 0, {}
    for name, background in (("training waits", False), ("in the background", True)):
        settings = dataclasses.replace(config.checkpoint, async_save=background, keep_last=1)
        found = []
        with CheckpointSaver(
            folder, settings, model, optimizer, None, template_dir=folder / "model", timeout_seconds=600
        ) as saver:
            for _ in range(_UNCOUNTED + rounds):
                step += 1
                started, stalled = time.perf_counter(), saver.stalled
                saver.save(TrainerState(step))
                beside = []
                while saver.is_writing():
                    beside.append(compute())
                saver.finish()
                slower = statistics.median(beside) / alone - 1 if beside else None
                found.append((time.perf_counter() - started, saver.stalled - stalled, slower))
                # Steps go by between two checkpoints.
                time.sleep(1.0)
        length, stall, slower = zip(*found[_UNCOUNTED:], strict=True)
        ways[name] = {
            "length": statistics.median(length),
            "stall": statistics.median(stall),
            "slower": statistics.median(slower) if background else None,
            "rounds": found[_UNCOUNTED:],
        }
    written = sum(path.stat().st_size for path in checkpoint_path(folder, step).rglob("*"))
    return {"bytes": written, "ways": ways}


if __name__ == "__main__":
    main()
