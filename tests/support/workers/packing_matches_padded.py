"""Packed micro-batches against padded ones of the same sequences: scores, one update's loss and gradient, and their
time.

Both are held against transformers in float64, so that what half precision costs is known: the packed ones may be no
further from it.
"""

import dataclasses
import json
import sys
import time

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(
    [
        "experiment=quickstart",
        "parallel=single",
        f"model.path={arguments['path']}",
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        *arguments["overrides"],
    ]
)
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, MicroBatch, make_micro_batches  # noqa: E402
from dasd_megatron.training.optimizer import build_optimizer  # noqa: E402
from dasd_megatron.training.passes import UpdateResult, hidden_states, score, update  # noqa: E402
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets  # noqa: E402
from dasd_megatron.training.scores import TeacherStates, TokenScores  # noqa: E402

parallel.initialize(config)
device = backend.current().device()
model = build_model(config, arguments["path"])
optimizer = build_optimizer(config.optimizer, model, steps=99, updates_per_step=1)
half = config.precision.params_dtype == "bf16"
generator = torch.Generator().manual_seed(arguments["seed"])


def tokens(low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(0, model.vocab_size, (length,), generator=generator).tolist()


longest = arguments["longest"]
prompts, teacher_prompts, responses = (
    [tokens(low, high) for _ in range(13)] for low, high in ((1, 20), (8, 40), (1, longest))
)
layout = dataclasses.replace(
    BatchLayout.of_this_rank(config.batch, config.parallel, config.precision),
    micro_batch_size=5,
    micro_batch_tokens=5 * longest,
)


def batches_of(which: list[list[int]], packing: bool) -> list[MicroBatch]:
    return make_micro_batches(which, responses, dataclasses.replace(layout, packing=packing))


reference = AutoModelForCausalLM.from_pretrained(arguments["path"], dtype=torch.float64).to(device)
with torch.no_grad():
    expected = torch.cat(
        [
            reference(torch.tensor([prompt + response], device=device)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
targets = torch.tensor([token for response in responses for token in response], device=device)
expected = TokenScores(expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1))

total = len(targets)
omega, advantage, noise = (torch.randn(total, generator=generator).to(device) for _ in range(3))


def run(packing: bool) -> tuple[TokenScores, torch.Tensor, UpdateResult]:
    batches = batches_of(prompts, packing)
    assert all((batch.starts is not None) == packing for batch in batches)
    student = score(model, batches, config.loss, temperature=1.0)
    teacher = hidden_states(model, batches_of(teacher_prompts, packing))
    distillation = Distillation(
        omega.clamp(-1, 1),
        torch.ones(total, dtype=torch.bool, device=device),
        TeacherStates((teacher,), model.head_weight().detach(), torch.arange(total, device=device)),
        config.algorithm,
    )
    targets = PolicyTargets(
        expected.log_prob.float() + 0.05 * noise,
        advantage,
        weight=torch.ones_like(advantage),
        lengths=torch.tensor([len(response) for response in responses], device=device),
        distillation=distillation if config.algorithm.is_distributional else None,
    )
    result = update(model, optimizer, batches, targets, config.loss, temperature=1.0)
    return student, torch.cat([parameter.main_grad.flatten().clone() for parameter in model.parameters()]), result


padded, padded_gradient, padded_result = run(packing=False)
packed, packed_gradient, packed_result = run(packing=True)
for name in ("log_prob", "entropy"):
    own, other, exact = (getattr(scores, name) for scores in (padded, packed, expected))
    errors = [float((values.double() - exact).abs().mean()) for values in (own, other)]
    print(f"{name}: mean error against float64: padded {errors[0]:.2e}, packed {errors[1]:.2e}", flush=True)
    assert errors[1] <= 1.25 * errors[0] + 1e-6, (name, errors)
    torch.testing.assert_close(own, other, rtol=0.02 if half else 1e-5, atol=0.1 if half else 2e-5)
gap = float((packed_gradient - padded_gradient).norm() / padded_gradient.norm())
packed_loss, padded_loss = packed_result.means["loss"], padded_result.means["loss"]
print(
    f"loss: padded {padded_loss:.6f}, packed {packed_loss:.6f}; gradients differ by {gap:.2e} of their norm", flush=True
)
assert gap < (0.05 if half else 1e-4) and padded_result.grad_norm > 1e-3
assert abs(packed_loss - padded_loss) < (0.02 if half else 1e-5)
assert abs(packed_result.grad_norm / padded_result.grad_norm - 1) < (0.02 if half else 1e-4)
# A token of one sequence does not act on another: the first sequence alone has the same scores as in the pack.
alone = score(
    model,
    make_micro_batches(prompts[:1], responses[:1], dataclasses.replace(layout, packing=True)),
    config.loss,
    temperature=1.0,
)
torch.testing.assert_close(
    alone.log_prob, packed.log_prob[: len(responses[0])], rtol=0.02 if half else 1e-5, atol=0.1 if half else 2e-5
)
for packing in (False, True):
    started = time.perf_counter()
    for _ in range(3):
        run(packing)
    print(f"{'packed' if packing else 'padded'}: {(time.perf_counter() - started) / 3:.3f} s", flush=True)
dist.barrier()
dist.destroy_process_group()
