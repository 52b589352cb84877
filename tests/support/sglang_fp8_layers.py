"""Let SGLang's own FP8 layers load a directory; run by the interpreter of SGLang's environment.

    python sglang_fp8_layers.py STARTER DIRECTORY OUTPUT

STARTER: start_server.py, whose stand-ins SGLang needs on a CPU. For one process and for each of two that share the
layers, OUTPUT gets what the layers hold then, and what SGLang takes their weights for.
"""

import importlib.util
import json
import sys
from pathlib import Path

starter, directory, output = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("start_server", starter)
start_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(start_server)
definitions = start_server.prepare_cpu()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear  # noqa: E402
from sglang.srt.layers.quantization.fp8 import Fp8Config  # noqa: E402
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402

config = json.loads((directory / "config.json").read_text())
quantization = Fp8Config.from_config(config["quantization_config"])
assert quantization.is_checkpoint_fp8_serialized and quantization.weight_block_size == [128, 128]
weights = load_file(directory / "model.safetensors")
hidden, heads, kv_heads, head_dim, middle = (
    config[name]
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
)
found = {}
for rank, size in ((0, 1), (0, 2), (1, 2)):
    with get_parallel().override(tp_rank=rank, tp_size=size):
        common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quantization}
        layers = {
            "qkv": QKVParallelLinear(hidden, head_dim, heads, kv_heads, prefix="a.qkv_proj", **common),
            "gate_up": MergedColumnParallelLinear(hidden, [middle] * 2, prefix="a.gate_up_proj", **common),
            "down": RowParallelLinear(middle, hidden, prefix="a.down_proj", **common),
        }
    shards = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "down": "down"}
    for part, layer in shards.items():
        names = {"qkv": (part,), "gate_up": (("gate", "up").index(part),) if layer == "gate_up" else (), "down": ()}
        for kind in ("weight", "weight_scale_inv"):
            parameter = getattr(layers[layer], kind)
            parameter.weight_loader(parameter, weights[f"{part}_proj.{kind}"], *names[layer])
    for name, layer in layers.items():
        held = {"weight": layer.weight.data, "weight_scale_inv": layer.weight_scale_inv.data}
        held["meant"] = block_quant_dequant(held["weight"], held["weight_scale_inv"], [128, 128], torch.float32)
        found |= {f"{size}.{rank}.{name}.{kind}": tensor.contiguous().clone() for kind, tensor in held.items()}
save_file(found, output)
