"""The embedded server's command line."""

from __future__ import annotations

import pytest

from dasd_megatron.rollout.embedded.server import parse_args


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


def test_options_have_defaults():
    args = parse_args(["--model-path", "there", "--cache-gib", "0.5"])
    assert (args.port, args.threads, args.cache_gib) == (30000, 1, 0.5)
    assert parse_args(["--model-path", "there"]).cache_gib is None
