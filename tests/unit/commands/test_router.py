"""The command line of sglang-router."""

from __future__ import annotations

from pathlib import Path

from dasd_megatron.commands.router import router_command


def test_the_script_that_starts_the_router_is_there() -> None:
    python, script, *arguments = router_command("python", ["http://a:1", "http://b:2"], host="127.0.0.1", port=31000)
    assert python == "python" and Path(script).is_file()
    assert arguments[-3:] == ["--worker-urls", "http://a:1", "http://b:2"]
