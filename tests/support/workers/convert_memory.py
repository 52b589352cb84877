"""Anonymous memory that conversions in both directions need beyond what the process has before them; prints the two
peaks in bytes."""

import json
import re
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig

backend.select(BackendConfig(kind="cpu"))

from dasd_megatron.models.convert import hf_to_megatron, megatron_to_hf  # noqa: E402


def anonymous_bytes() -> int:
    # File pages that the process has mapped are cache, which the system takes back when it needs room.
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def peak_of(convert, *arguments) -> int:
    peak = 0

    def progress(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    start = anonymous_bytes()
    convert(*map(Path, arguments), progress=progress)
    return peak - start


source, scratch = json.loads(sys.argv[1])
# Once for what libraries keep from their first use.
hf_to_megatron(Path(source), Path(scratch) / "warm")
forward = peak_of(hf_to_megatron, source, f"{scratch}/megatron")
print(json.dumps([forward, peak_of(megatron_to_hf, f"{scratch}/megatron", f"{scratch}/hf")]))
