"""Log-probs and entropies of the sharded model against transformers, and a bit-exact export, for one layout and architecture."""

import json
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(["experiment=quickstart", "batch.groups=16", f"model.path={arguments['path']}", *arguments["overrides"]])
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import make_micro_batches  # noqa: E402
from dasd_megatron.training.export import export_model  # noqa: E402
from dasd_megatron.training.passes import score  # noqa: E402
from dasd_megatron.training.warm_start import micro_batch_layout  # noqa: E402

parallel.initialize(config)
path = Path(arguments["path"])
model = build_model(config, path)
generator = torch.Generator().manual_seed(arguments["seed"])
prompts, responses = [], []
for _ in range(7):
    lengths = torch.randint(1, 24, (2,), generator=generator).tolist()
    prompts.append(torch.randint(0, model.vocab_size, (lengths[0],), generator=generator).tolist())
    responses.append(torch.randint(0, model.vocab_size, (lengths[1],), generator=generator).tolist())
batches = make_micro_batches(prompts, responses, **(micro_batch_layout(config) | {"micro_batch_size": 3}))
temperature = 0.7
scores = score(model, batches, config.loss, temperature=temperature)

reference = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float64)
start = 0
with torch.no_grad():
    for prompt, response in zip(prompts, responses, strict=True):
        logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        log_probs = logits.log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        part = slice(start, start + len(response))
        torch.testing.assert_close(scores.log_prob[part].cpu().double(), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(scores.entropy[part].cpu().double(), entropy, rtol=1e-5, atol=2e-5)
        start += len(response)
assert start == len(scores.log_prob)

exported = Path(arguments["export"])
export_model(model, exported, template_dir=path)
if dist.get_rank() == 0:
    before, after = load_file(path / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    AutoModelForCausalLM.from_pretrained(exported)
dist.barrier()
dist.destroy_process_group()
