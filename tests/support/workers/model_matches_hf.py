"""Log-probs and entropies of sharded models against transformers, a bit-exact export, and a checkpoint, in one layout
for all models.

Each model is an object with ``path`` (Hugging Face directory), ``load`` (what the weights come from), ``export`` and
``save``.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(["experiment=quickstart", "batch.groups=16", *arguments["overrides"]])
backend.select(config.backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.batching import BatchLayout, make_micro_batches  # noqa: E402
from dasd_megatron.training.export import export_model  # noqa: E402
from dasd_megatron.training.passes import score  # noqa: E402

TEMPERATURE = 0.7


def check(path: Path, load: Path, export: Path, save: Path, seed: int) -> None:
    model = build_model(config, load)
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [], []
    for _ in range(7):
        lengths = torch.randint(1, 24, (2,), generator=generator).tolist()
        prompts.append(torch.randint(0, model.vocab_size, (lengths[0],), generator=generator).tolist())
        responses.append(torch.randint(0, model.vocab_size, (lengths[1],), generator=generator).tolist())
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = make_micro_batches(prompts, responses, dataclasses.replace(layout, micro_batch_size=3))
    scores = score(model, batches, config.loss, temperature=TEMPERATURE)

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    start = 0
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            log_probs = logits.log_softmax(-1)
            expected = log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            part = slice(start, start + len(response))
            torch.testing.assert_close(
                scores.log_prob[part].cpu().double(), expected, rtol=1e-5, atol=arguments["tolerance"]
            )
            torch.testing.assert_close(
                scores.entropy[part].cpu().double(), entropy, rtol=1e-5, atol=arguments["tolerance"]
            )
            start += len(response)
    assert start == len(scores.log_prob)

    export_model(model, export, template_dir=path)
    quantised = export.with_name(export.name + "-fp8")
    form = WEIGHT_FORMATS["fp8_blockwise"]
    export_model(model, quantised, template_dir=path, manifest=False, form=form)
    if dist.get_rank() == 0:
        # Blocks reach over the shards of tensor-parallel ranks.
        whole, found = load_file(export / "model.safetensors"), load_file(quantised / "model.safetensors")
        expected = {part: value for name, tensor in whole.items() for part, value in form.convert(name, tensor)}
        assert found.keys() == expected.keys() and len(found) > len(whole)
        for name, tensor in expected.items():
            assert torch.equal(tensor.flatten().view(torch.uint8), found[name].flatten().view(torch.uint8)), name
        before, after = load_file(path / "model.safetensors"), load_file(export / "model.safetensors")
        before.pop("lm_head.weight", None) if reference.config.tie_word_embeddings else None
        assert before.keys() == after.keys(), before.keys() ^ after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
        save.mkdir()
    dist.barrier()
    state = {f"model{index}": unwrap_model(chunk).sharded_state_dict() for index, chunk in enumerate(model.chunks)}
    dist_checkpointing.save(state, str(save))
    if dist.get_rank() == 0:
        shutil.copytree(path, save / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    dist.barrier()


# Saving a checkpoint spawns processes, which import this file again.
if __name__ == "__main__":
    parallel.initialize(config)
    for entry in arguments["models"]:
        if dist.get_rank() == 0:
            print(entry["load"], flush=True)
        check(*(Path(entry[name]) for name in ("path", "load", "export", "save")), arguments["seed"])
    dist.destroy_process_group()
