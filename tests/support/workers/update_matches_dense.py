"""Scoring and one update of the distributional objective against the formulas, computed densely by transformers from
the same weights. Some responses have no teacher.

The reference knows nothing of our statistics: logits of student and teacher, log-softmax, and the definitions. Most
responses have tokens that the policy did not sample, of which the formulas know nothing either.
"""

import copy
import json
import sys
from types import SimpleNamespace

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
from dasd_megatron.samples import Sample  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, batch_samples  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402
from dasd_megatron.training.passes import score, update  # noqa: E402
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets, loss_weights  # noqa: E402
from dasd_megatron.training.snapshots import WeightSnapshot  # noqa: E402
from dasd_megatron.training.teacher import score_teacher  # noqa: E402
from dasd_megatron.training.trainer import Learner  # noqa: E402
from tests.support.token_stats_reference import clipped_sum  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=1, updates_per_step=1)
half = config.precision.params_dtype == "bf16"
config.rollout.temperature = temperature = 0.7
# The frozen model of a mixture has the live one's weights times this.
FROZEN = 0.8
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
untaught = int(torch.randint(1, 7, (1,), generator=generator))
taught = [0 < index != untaught for index in range(7)]
samples = [
    Sample(
        index, 0, index, "", "", "", "", prompt, response, [], "", "stop", [], 0.0, None, False, mask,
        teacher_prompt_ids=teacher_prompt if has_teacher else None,
    )
    for index, (prompt, response, mask, teacher_prompt, has_teacher) in enumerate(
        zip(prompts, responses, masks, teacher_prompts, taught, strict=True)
    )
]  # fmt: skip
layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
batches = batch_samples(samples, prompts, layout)
top_k = config.algorithm.divergence_top_k
student = score(model, batches, config.loss, temperature=temperature, top_k=config.algorithm.top_k_of("student"))
start = None
if config.teacher.weights == "trust_region":
    start = WeightSnapshot(model, "start")
    for values in start.tensors:
        values.mul_(FROZEN)
trainer = SimpleNamespace(config=config, learner=Learner(model, optimizer, start, None))
teacher = score_teacher(trainer, samples, layout, student.top)
total = len(student.log_prob)
sizes = torch.tensor([len(sample.sampled) for sample in samples])
has_teacher = torch.tensor(taught).repeat_interleave(sizes)
assert teacher.ran and teacher.has_teacher.tolist() == taught
omega, advantage = torch.rand(total, generator=generator) * 2 - 1, torch.randn(total, generator=generator)
omega = torch.where(has_teacher, omega, 0.0)
# Off by a little, so that the ratio of the surrogate is not 1.
old_log_prob = student.log_prob + 0.05 * torch.randn(total, generator=generator)

reference = AutoModelForCausalLM.from_pretrained(arguments["path"], torch_dtype=torch.float64)
chosen = torch.cat(
    [
        torch.ones(len(response)) if mask is None else torch.tensor(mask)
        for response, mask in zip(responses, masks, strict=True)
    ]
).bool()


def dense_logits(of: torch.nn.Module, all_prompts: list[list[int]]) -> torch.Tensor:
    """[N, V] before the sampled tokens."""
    parts = [
        of(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        for prompt, response in zip(all_prompts, responses, strict=True)
    ]
    return torch.cat(parts)[chosen]


log_p = dense_logits(reference, prompts).log_softmax(-1)
with torch.no_grad():
    teacher_logits = dense_logits(reference, teacher_prompts)
    if start is not None:
        frozen = copy.deepcopy(reference)
        for parameter in frozen.parameters():
            parameter.mul_(FROZEN)
        mix = config.teacher.trust_region_mix
        teacher_logits = (1 - mix) * dense_logits(frozen, teacher_prompts) + mix * teacher_logits
    log_q = teacher_logits.log_softmax(-1)
targets = torch.tensor([token for response in responses for token in response])[chosen]
log_prob = log_p.gather(1, targets[:, None])[:, 0]


def on_entries(log_probs: torch.Tensor) -> torch.Tensor:
    """[N, k] or with the tail [N, k + 1], on the most probable entries."""
    of = log_q if config.algorithm.divergence_top_k_of == "teacher" else log_p.detach()
    order = of.topk(top_k, dim=1).indices
    chosen, rest = log_probs.gather(1, order), log_probs.scatter(1, order, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], 1) if config.algorithm.divergence_tail else chosen.log_softmax(-1)


divergence = clipped_sum(
    log_p if top_k is None else on_entries(log_p),
    log_q if top_k is None else on_entries(log_q),
    config.algorithm.divergence,
    weight=config.algorithm.jsd_weight,
    clip=config.algorithm.divergence_entry_clip or torch.inf,
)
# Below the median, which rounding would put on either side.
cap = 0.99 * float(divergence[omega < 0].median())
config.algorithm.divergence_cap = cap
pull_cap = 1.01 * float(divergence[omega > 0].median())
config.algorithm.divergence_pull_cap = pull_cap
lengths = torch.tensor([len(r) if mask is None else sum(mask) for r, mask in zip(responses, masks, strict=True)])
log_ratio = log_prob - old_log_prob
ratio = log_ratio.exp()
if config.loss.surrogate == "ppo":
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
elif config.loss.surrogate == "gspo":
    means = torch.cat([part.detach().mean().expand(len(part)) for part in log_ratio.split(lengths.tolist())])
    ratio = means.exp() * (log_prob - log_prob.detach()).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
else:
    surrogate = -ratio.detach().clamp(max=5.0) * advantage * log_prob
term = omega * torch.where(omega < 0, divergence.clamp(max=cap), divergence.clamp(max=pull_cap))
loss = surrogate + config.algorithm.divergence_weight * term
kept, expected_loss = None, loss.mean()
if config.loss.aggregation != "token_mean":
    # The first response is left out, and the last token of every other that has several.
    kept = torch.ones(total, dtype=torch.bool)
    kept[: lengths[0]] = False
    kept[(lengths.cumsum(0) - 1)[lengths > 1]] = False
    by_response = zip(loss.split(lengths.tolist()), kept.split(lengths.tolist()), strict=True)
    left = [losses[mask] for losses, mask in by_response if mask.any()]
    by_tokens = config.loss.aggregation == "seq_mean_token_mean"
    divisors = [len(losses) if by_tokens else config.rollout.max_new_tokens for losses in left]
    expected_loss = sum(losses.sum() / count for losses, count in zip(left, divisors, strict=True)) / len(left)
expected_loss.backward()
expected_norm = sum(float(parameter.grad.square().sum()) for parameter in reference.parameters()) ** 0.5
tolerance = dict(rel=0.05, abs=0.02) if half else dict(rel=1e-5, abs=1e-5)


def assert_near(found: float, expected: torch.Tensor, name: str) -> None:
    assert abs(found - float(expected)) <= tolerance["rel"] * abs(float(expected)) + tolerance["abs"], (
        name,
        found,
        float(expected),
    )


log_q_of_token = log_q.gather(1, targets[:, None])[:, 0]
for name, found, expected in (
    ("student", student.log_prob, log_prob),
    ("teacher", teacher.log_prob[has_teacher], log_q_of_token[has_teacher]),
    ("teacher's entropy", teacher.entropy[has_teacher], -(log_q.exp() * log_q).sum(-1)[has_teacher]),
):
    assert_near(float((found.double() - expected).abs().mean()), torch.tensor(0.0), name)
assert not teacher.log_prob[~has_teacher].any() and not teacher.entropy[~has_teacher].any()

before = [parameter.detach().clone() for parameter in model.parameters()]
targets = PolicyTargets(
    old_log_prob,
    advantage,
    weight=loss_weights(config.loss, lengths, kept, config.rollout.max_new_tokens),
    lengths=lengths,
    distillation=Distillation(omega, has_teacher, teacher.distribution, config.algorithm),
)
result = update(model, optimizer, batches, targets, config.loss, temperature=temperature)
assert_near(result.means["loss"], expected_loss, "loss")
assert_near(result.means["divergence"], divergence[has_teacher].mean(), "divergence")
capped_share = result.means["capped_share"]
capped = torch.where(omega < 0, divergence >= cap, divergence >= pull_cap)[has_teacher].double().mean()
assert abs(capped_share - float(capped)) <= (0.1 if half else 1.01 / int(has_teacher.sum())), (
    capped_share,
    float(capped),
)
# The whole gradient is that of the sampled tokens.
assert abs(result.grad_norm - expected_norm) <= (0.05 if half else 1e-4) * expected_norm, (
    result.grad_norm,
    expected_norm,
)
assert result.applied and result.grad_norm > 0
assert any(not torch.equal(old, parameter) for old, parameter in zip(before, model.parameters(), strict=True))
dist.barrier()
dist.destroy_process_group()
