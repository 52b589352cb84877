"""The embedded server's command line."""

from __future__ import annotations

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.server import main, parse_args


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--threads", "0"],
        ["--max-batch-size", "-5"],
        ["--cache-gib", "0"],
        ["--cache-gib", "nan"],
        ["--cache-gib", "inf"],
        ["--weight-version", "x" * 257],
    ],
)
def test_an_option_out_of_range_is_named(options, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--model-path", "there", *options])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dasd: error: ") and options[0] in last and len(last) < 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path, capsys):
    model = make_tiny_model(tmp_path / "tiny", TinyModelConfig(hidden_size=32, num_layers=1), 0)
    assert main(["--model-path", str(model), "--port", "0", "--device", "cuda"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dasd: error" in line]
    assert "torch sees no GPU" in line and line.endswith("set rollout.device=cpu")


def test_options_have_defaults():
    args = parse_args(["--model-path", "there", "--cache-gib", "0.5"])
    assert (args.port, args.threads, args.cache_gib) == (30000, 1, 0.5)
    assert parse_args(["--model-path", "there"]).cache_gib is None
