"""Tokens that the policy did not sample are context: an update on masked responses has the gradient of one in which
every sampled token is a response of its own behind all that came before it, and masked tokens that no sampled one
follows do not act at all."""

import json
import sys

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
# At this rate two updates have the same weights before them.
still = ["optimizer.lr=0", "optimizer.min_lr=0"]
config = load_config(["experiment=quickstart", f"model.path={arguments['path']}", *still, *arguments["overrides"]])
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, make_micro_batches  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402
from dasd_megatron.training.passes import UpdateResult, score, update  # noqa: E402
from dasd_megatron.training.policy_loss import PolicyTargets  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=9, updates_per_step=1)
generator = torch.Generator().manual_seed(arguments["seed"])


def draw(low: int, high: int, length: int) -> list[int]:
    return torch.randint(low, high, (length,), generator=generator).tolist()


prompts = [draw(0, model.vocab_size, length) for length in draw(1, 12, 6)]
responses = [draw(0, model.vocab_size, length) for length in draw(5, 15, 6)]
# The last two tokens of each are none of the policy's.
masks = [[1, 0, 1, *draw(0, 2, len(response) - 5), 0, 0] for response in responses]
sampled = [(row, place) for row, mask in enumerate(masks) for place, counts in enumerate(mask) if counts]
advantage = torch.randn(len(sampled), generator=generator)
old_noise = 0.05 * torch.randn(len(sampled), generator=generator)


Tokens = list[list[int]]


def updated(
    prompts: Tokens, responses: Tokens, masks: Tokens | None
) -> tuple[torch.Tensor, torch.Tensor, UpdateResult]:
    """Log-probs, the gradient of the whole model on this rank, and what was reported."""
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = make_micro_batches(prompts, responses, layout, response_mask=masks)
    log_prob = score(model, batches, config.loss, temperature=0.7).log_prob
    counts = [len(response) for response in responses] if masks is None else [sum(mask) for mask in masks]
    targets = PolicyTargets(log_prob + old_noise, advantage, torch.ones(len(log_prob)), torch.tensor(counts))
    result = update(model, optimizer, batches, targets, config.loss, temperature=0.7)
    return log_prob, torch.cat([parameter.main_grad.flatten().clone() for parameter in model.parameters()]), result


log_prob, gradient, result = updated(prompts, responses, masks)
alone_log_prob, alone_gradient, alone_result = updated(
    [prompts[row] + responses[row][:place] for row, place in sampled],
    [[responses[row][place]] for row, place in sampled],
    None,
)
assert len(log_prob) == len(sampled) and result.grad_norm > 1e-3
torch.testing.assert_close(log_prob, alone_log_prob, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(gradient, alone_gradient, rtol=1e-4, atol=1e-4 * float(alone_gradient.abs().max()))
assert (
    abs(result.means["loss"] - alone_result.means["loss"]) < 1e-5
    and abs(result.grad_norm - alone_result.grad_norm) < 1e-4 * result.grad_norm
)

others = [response[:-2] + [(token + 1) % model.vocab_size for token in response[-2:]] for response in responses]
_, other_gradient, _ = updated(prompts, others, masks)
assert torch.equal(gradient, other_gradient)
# A masked token that others follow does act, through them.
others = [[response[0], (response[1] + 1) % model.vocab_size, *response[2:]] for response in responses]
_, other_gradient, _ = updated(prompts, others, masks)
assert not torch.allclose(gradient, other_gradient)
dist.barrier()
dist.destroy_process_group()
