"""One model in bf16 and in FP8 on one GPU: log-probs, losses of five updates on one batch, and the exported weights."""

import dataclasses
import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
QUICK = [
    "experiment=quickstart",
    f"model.path={arguments['path']}",
    "optimizer.lr=1e-3",
    "optimizer.adam_eps=1e-8",
    "run.steps=50",
]
configs = {name: load_config([*QUICK, *arguments[name]]) for name in ("bf16", "fp8")}
backend.select(configs["fp8"].backend).check_precision(configs["fp8"].precision)

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, make_micro_batches  # noqa: E402
from dasd_megatron.training.export import export_model  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402
from dasd_megatron.training.passes import score, supervised_update  # noqa: E402

parallel.initialize(configs["fp8"])
generator = torch.Generator().manual_seed(torch.seed() % 2**31)
print("seed", generator.initial_seed())
prompts, responses = (
    [
        torch.randint(0, 100, (int(torch.randint(5, 60, (1,), generator=generator)),), generator=generator).tolist()
        for _ in range(12)
    ]
    for _ in range(2)
)
found = {}
for name, config in configs.items():
    model = build_model(config, arguments["path"])
    optimizer = build_optimizer(config.optimizer, model, steps=50, updates_per_step=1)
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = make_micro_batches(prompts, responses, dataclasses.replace(layout, micro_batch_size=5))
    before = score(model, batches, config.loss, temperature=0.8)
    with model.without_fp8():
        plain = score(model, batches, config.loss, temperature=0.8)
    updates = [supervised_update(model, optimizer, batches, config.loss) for _ in range(5)]
    losses = [(result.means["loss"], result.grad_norm) for result in updates]
    after = score(model, batches, config.loss, temperature=0.8)
    found[name] = (before, plain, losses, after)
bf16, fp8 = found["bf16"], found["fp8"]
assert torch.equal(bf16[0].log_prob, bf16[1].log_prob)
gaps = {
    "before": (bf16[0].log_prob - fp8[0].log_prob).abs().mean(),
    "without fp8": (bf16[0].log_prob - fp8[1].log_prob).abs().mean(),
    "after": (bf16[3].log_prob - fp8[3].log_prob).abs().mean(),
}
print({key: float(gap) for key, gap in gaps.items()}, "losses", bf16[2], fp8[2], flush=True)
assert 0 < gaps["before"] < 0.05
assert gaps["without fp8"] == 0
# Five large updates have moved them by more than a nat.
assert gaps["after"] < 0.3
for (loss, norm), (other_loss, other_norm) in zip(bf16[2], fp8[2], strict=True):
    assert abs(loss - other_loss) < 0.02 * loss and abs(norm - other_norm) < 0.1 * norm
assert fp8[2][-1][0] < fp8[2][0][0] - 0.05

# What is exported is what the layers compute with.
export_model(model, Path(arguments["export"]), template_dir=Path(arguments["path"]))
reference = AutoModelForCausalLM.from_pretrained(arguments["export"], torch_dtype=torch.float32).cuda()
total = torch.zeros((), device="cuda")
with torch.no_grad():
    with model.without_fp8():
        own = score(model, batches, configs["fp8"].loss, temperature=1.0).log_prob
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = reference(torch.tensor([prompt + response], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(response, device="cuda")[:, None])[:, 0])
gap = (own - torch.cat(expected)).abs().mean()
print("exported", float(gap))
assert gap < 0.02
dist.destroy_process_group()
