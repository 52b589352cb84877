"""Logits or gradients that are not finite: the step is skipped and counted, the weights stay, and a run of nothing else
stops."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.rollout_files import read_samples, rollouts_path, save_samples
from tests.support.runs import NO_EVALUATION, finish, reproducible, rows, start, train
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A model whose embedding of one character is NaN, rollouts that it can be trained on for four steps, and that
    character's token.

    The head is another tensor, so that only a prompt that holds the character has NaN logits.
    """
    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    sound = folder / "sound"
    model.save_pretrained(sound)
    tokenizer.save_pretrained(sound)
    train(*NO_EVALUATION, "run.steps=4", "model=hf", f"model.path={sound}", f"run.dir={folder / 'made'}")
    token = tokenizer.convert_tokens_to_ids("@")
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "made" / "rollouts", token


def replay(source: Path, target: Path, token: int, steps: tuple[int, ...]) -> Path:
    """A copy of saved rollouts in which one prompt of each of ``steps`` begins with ``token``, and which hold it
    nowhere else."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        samples = read_samples(path)
        for sample in samples:
            sample.response_ids = sample.response_ids - (sample.response_ids == token)
        if int(path.stem.removeprefix("step_")) in steps:
            # The others of its group keep their prompt.
            samples[5].prompt_ids = samples[5].prompt_ids.copy()
            samples[5].prompt_ids[0] = token
        save_samples(target / path.name, samples)
    return target


@pytest.mark.parametrize("layout", [[], ["parallel.tensor_model_parallel_size=2"], ["parallel.data_parallel_size=2"]])
def test_a_step_with_nan_logits_is_skipped_described_and_counted(
    layout: list[str], poisoned: tuple[Path, Path, int], tmp_path: Path
) -> None:
    model, rollouts, token = poisoned
    common = [*NO_EVALUATION, "model=hf", f"model.path={model}", *layout]
    folder = replay(rollouts, tmp_path / "replay", token, (2, 3))
    output = train(*common, "run.steps=3", f"rollout.replay={folder}", f"run.dir={tmp_path / 'run'}")
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["update/skipped"] for row in found] == [0, 1, 1]
    assert "update/loss" in found[0] and "update/loss" not in found[1] and found[1]["reward/mean"] is not None
    assert output.count("its logits are not finite") == 1
    assert "step 2 is skipped" in output and "first response token 0 of problem" in output and "sample 1" in output
    # Where its own shard holds the row, a rank names the parameter.
    assert "embedding.word_embeddings.weight is not finite" in output
    if layout:
        return
    # The skipped steps left no trace in the weights: they are those of the first step.
    train(*common, "run.steps=1", f"rollout.replay={folder}", f"run.dir={tmp_path / 'one'}")
    skipped, single = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "one"))
    assert all(torch.equal(tensor.nan_to_num(9.0), single[name].nan_to_num(9.0)) for name, tensor in skipped.items())


@pytest.mark.drill
def test_too_many_skipped_steps_in_a_row_take_the_run_back_once(
    poisoned: tuple[Path, Path, int], tmp_path: Path
) -> None:
    """Steps 3 and 4 are bad, so the run goes back to step 2 and on with what comes after them, as if they had never
    been; the second time there is nothing to go back to, and it stops. A step that a skipped one follows is no good
    checkpoint."""
    model, rollouts, token = poisoned
    common = [
        *NO_EVALUATION,
        "model=hf",
        f"model.path={model}",
        "loss.max_skipped_steps=1",
        "checkpoint.every=1",
        "checkpoint.keep_last=3",
    ]
    sound = replay(rollouts, tmp_path / "sound", token, ())
    for source, target in ((1, 5), (2, 6)):
        shutil.copy(rollouts_path(sound, source), rollouts_path(sound, target))
    bad = replay(sound, tmp_path / "bad", token, (3, 4))
    output = train(*common, "run.steps=4", f"rollout.replay={bad}", f"run.dir={tmp_path / 'run'}")
    assert (
        "not finite in 2 steps in a row, more than loss.max_skipped_steps=1: back to" in output
        and "step_000002" in output
    ), output
    for step, source in ((3, 5), (4, 6)):
        shutil.copy(rollouts_path(sound, source), rollouts_path(sound, step))
    train(*common, "run.steps=4", f"rollout.replay={sound}", f"run.dir={tmp_path / 'without'}")
    assert reproducible(tmp_path / "run" / "metrics.jsonl") == reproducible(tmp_path / "without" / "metrics.jsonl")
    assert [row["update/skipped"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0, 0, 0, 0]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000004" / "trainer.json").read_text())
    assert (state["rollbacks"], state["discarded"], state["rolled_back_to"], state["skipped"]) == (1, 2, 2, 0)
    # What comes after is bad again: the count of rollbacks has survived the end of the run, and so has that of skipped
    # steps.
    more = replay(sound, tmp_path / "more", token, (5, 6))
    for step, source in ((7, 5), (8, 6)):
        shutil.copy(rollouts_path(more, source), rollouts_path(more, step))
    resumed = [f"rollout.replay={more}", f"run.dir={tmp_path / 'run'}", "resume=auto"]
    train(*common, "run.steps=5", *resumed)
    assert json.loads((tmp_path / "run" / "checkpoints" / "step_000005" / "trainer.json").read_text())["skipped"] == 1
    status, output = finish(start(*common, "run.steps=8", *resumed))
    assert status == 1 and "Traceback" not in output, output
    assert (
        "not finite in 2 steps in a row, more than loss.max_skipped_steps=1, after 1 of loss.max_rollbacks=1" in output
    ), output


def test_servers_get_the_weights_gone_back_to(tmp_path: Path) -> None:
    """The prompts of steps 3 and 4 break the gradients; what is sampled after them is from the weights of step 2, with
    other prompts."""
    output = train(
        *NO_EVALUATION, "run.steps=4", "checkpoint.every=2", "loss.max_skipped_steps=1", "rollout.max_staleness=1",
        "verify.reward=tests.support.broken_reward:reward", "algorithm.normalize_std=false",
        "algorithm.verifier_weight=1e10",
        f"run.dir={tmp_path / 'run'}",
        environment={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert "not finite in 2 steps in a row" in output and "step_000002" in output, output
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["update/skipped"]) for row in found] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    # What had been sampled ahead, from the weights after step 3 or 4, is not used.
    assert found[2]["weight_version"] == "step_000002" and found[2]["rollout/staleness_max"] == 0
    assert found[2]["rollout/log_prob_diff_max"] < 1e-3
    positions = [
        {sample.position for sample in read_samples(rollouts_path(tmp_path / "run" / "rollouts", step))}
        for step in (1, 2, 3, 4)
    ]
    assert positions[0] | positions[1] == set(range(8))
    assert positions[2] | positions[3] == set(range(16, 24))


def test_a_reward_that_fails_in_an_evaluation_costs_no_step(tmp_path: Path) -> None:
    common = [
        "evaluation=none",
        "run.steps=3",
        "checkpoint.every=2",
        f"run.dir={tmp_path / 'run'}",
        "parallel=tp2",
        "rollout.max_staleness=0",
    ]
    broken = ["evaluation.every=2", "verify.reward=tests.support.broken_reward:fails_in_the_evaluation"]
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    status, output = finish(start(*common, *broken, environment=environment), timeout=120)
    assert status == 1 and "Traceback" not in output and "out of order" in output and "after step 2" in output, output[
        -4000:
    ]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_000002"


def test_without_a_checkpoint_before_them_skipped_steps_stop_the_run(
    poisoned: tuple[Path, Path, int], tmp_path: Path
) -> None:
    model, rollouts, token = poisoned
    folder = replay(rollouts, tmp_path / "replay", token, (2, 3))
    status, output = finish(
        start(
            *NO_EVALUATION, "model=hf", f"model.path={model}", "run.steps=4", f"rollout.replay={folder}",
            f"run.dir={tmp_path / 'run'}",
            "loss.max_skipped_steps=1",
        )
    )  # fmt: skip
    assert status != 0
    assert "not finite in 2 steps in a row, more than loss.max_skipped_steps=1" in output and "Traceback" not in output
    assert "there is no checkpoint before them" in output


def test_a_warm_start_from_weights_that_are_not_finite_stops_at_once(
    poisoned: tuple[Path, Path, int], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(poisoned[0].parent / "sound", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    status, output = finish(
        start(*NO_EVALUATION, "model=hf", f"model.path={broken}", "warm_start.steps=3", f"run.dir={tmp_path / 'run'}")
    )
    assert status != 0
    assert "warm start: loss nan" in output and "lower warm_start.lr" in output and "Traceback" not in output


@pytest.mark.parametrize(("processes", "overrides"), [(1, []), (2, ["parallel.data_parallel_size=2"])])
def test_gradients_that_are_not_finite_are_not_applied(
    processes: int, overrides: list[str], poisoned: tuple[Path, Path, int], tmp_path: Path
) -> None:
    torchrun("optimizer_step", processes, {"path": str(poisoned[0].parent / "sound"), "overrides": overrides})
