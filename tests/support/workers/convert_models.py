"""Convert several models in one process: a list of [direction, source, output, keywords]."""

import json
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import BackendConfig

backend.select(BackendConfig(kind="cpu"))

from dasd_megatron.models.convert import compare_logits, hf_to_megatron, megatron_to_hf  # noqa: E402

for direction, source, output, keywords in json.loads(sys.argv[1]):
    print(direction, source, flush=True)
    source, output = Path(source), Path(output)
    if direction == "hf_to_megatron":
        result = hf_to_megatron(source, output, **keywords)
        difference, largest, agreement = compare_logits(output, source, result.dtype)
    else:
        result = megatron_to_hf(source, output, **keywords)
        difference, largest, agreement = compare_logits(source, output, result.dtype)
    assert largest > 0.1 and difference < 1e-4 and agreement == 1.0, (difference, largest, agreement)
