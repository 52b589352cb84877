"""Scoring and one update of the distributional objective against the formulas, computed densely by transformers from
the same weights.

The reference knows nothing of our statistics: logits of student and teacher, log-softmax, and the definitions. Most
responses have tokens that the policy did not sample, of which the formulas know nothing either.
"""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(
    ["experiment=quickstart", "batch.groups=16", f"model.path={arguments['path']}", *arguments["overrides"]]
)
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, make_micro_batches  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402
from dasd_megatron.training.passes import Distillation, score, update  # noqa: E402
from dasd_megatron.training.scores import TeacherStates  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=1, updates_per_step=1)
half = config.precision.params_dtype == "bf16"
temperature = 0.7
generator = torch.Generator().manual_seed(arguments["seed"])


def tokens(low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(0, model.vocab_size, (length,), generator=generator).tolist()


prompts, teacher_prompts, responses = (
    [tokens(low, high) for _ in range(7)] for low, high in ((1, 12), (8, 20), (1, 15))
)
masks: list[list[int] | None] = [
    torch.randint(0, 2, (len(response),), generator=generator).tolist() for response in responses
]
masks[0] = None
for mask in masks[1:]:
    mask[int(torch.randint(0, len(mask), (1,), generator=generator))] = 1
layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
batches, teacher_batches = (
    make_micro_batches(contexts, responses, layout, response_mask=masks) for contexts in (prompts, teacher_prompts)
)
student = score(model, batches, config.loss, temperature=temperature)
teacher = score(model, teacher_batches, config.loss, temperature=temperature, keep_hidden=True)
total = len(student.log_prob)
omega, advantage = torch.rand(total, generator=generator) * 2 - 1, torch.randn(total, generator=generator)
# Off by a little, so that the ratio of the surrogate is not 1.
old_log_prob = student.log_prob + 0.05 * torch.randn(total, generator=generator)

reference = AutoModelForCausalLM.from_pretrained(arguments["path"], torch_dtype=torch.float64)
chosen = torch.cat(
    [
        torch.ones(len(response)) if mask is None else torch.tensor(mask)
        for response, mask in zip(responses, masks, strict=True)
    ]
).bool()


def dense_log_probs(all_prompts: list[list[int]]) -> torch.Tensor:
    """[N, V] of the sampled tokens' distributions."""
    parts = [
        (reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        for prompt, response in zip(all_prompts, responses, strict=True)
    ]
    return torch.cat(parts)[chosen]


log_p, log_q = dense_log_probs(prompts), dense_log_probs(teacher_prompts).detach()
targets = torch.tensor([token for response in responses for token in response])[chosen]
log_prob = log_p.gather(1, targets[:, None])[:, 0]
p, q, w = log_p.exp(), log_q.exp(), config.algorithm.jsd_weight
log_m = (w * p + (1 - w) * q).log()
divergence = {
    "reverse_kl": (p * (log_p - log_q)).sum(-1),
    "forward_kl": (q * (log_q - log_p)).sum(-1),
    "jsd": w * (p * (log_p - log_m)).sum(-1) + (1 - w) * (q * (log_q - log_m)).sum(-1),
}[config.algorithm.divergence]
# Below the median, which rounding would put on either side.
cap = 0.99 * float(divergence[omega < 0].median())
config.algorithm.divergence_cap = cap
pull_cap = 1.01 * float(divergence[omega > 0].median())
config.algorithm.divergence_pull_cap = pull_cap
ratio = (log_prob - old_log_prob).exp()
surrogate = -torch.minimum(
    ratio * advantage, ratio.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high) * advantage
)
term = omega * torch.where(omega < 0, divergence.clamp(max=cap), divergence.clamp(max=pull_cap))
expected_loss = (surrogate + config.algorithm.divergence_weight * term).mean()
expected_loss.backward()
expected_norm = sum(float(parameter.grad.square().sum()) for parameter in reference.parameters()) ** 0.5
tolerance = dict(rel=0.05, abs=0.02) if half else dict(rel=1e-5, abs=1e-5)


def assert_near(found: float, expected: torch.Tensor, name: str) -> None:
    assert abs(found - float(expected)) <= tolerance["rel"] * abs(float(expected)) + tolerance["abs"], (
        name,
        found,
        float(expected),
    )


for name, found, expected in (
    ("student", student.log_prob, log_prob),
    ("teacher", teacher.log_prob, log_q.gather(1, targets[:, None])[:, 0]),
):
    assert_near(float((found.double() - expected).abs().mean()), torch.tensor(0.0), name)

states = None if teacher.hidden is None else TeacherStates(teacher.hidden, model.head_weight().detach().clone())
before = [parameter.detach().clone() for parameter in model.parameters()]
result = update(
    model, optimizer, batches, old_log_prob=old_log_prob, advantage=advantage, start_log_prob=None,
    distillation=Distillation(omega, states, config.algorithm), settings=config.loss, temperature=temperature,
)  # fmt: skip
assert_near(result.means["loss"], expected_loss, "loss")
assert_near(result.means["divergence"], divergence.mean(), "divergence")
capped_share = result.means["capped_share"]
capped = torch.where(omega < 0, divergence >= cap, divergence >= pull_cap).double().mean()
assert abs(capped_share - float(capped)) <= (0.1 if half else 1.01 / total), (capped_share, float(capped))
# The whole gradient is that of the sampled tokens.
assert abs(result.grad_norm - expected_norm) <= (0.05 if half else 1e-4) * expected_norm, (
    result.grad_norm,
    expected_norm,
)
assert result.applied and result.grad_norm > 0
assert any(not torch.equal(old, parameter) for old, parameter in zip(before, model.parameters(), strict=True))
dist.barrier()
dist.destroy_process_group()
