"""Configurations are composed of groups and overrides, saved, and read back."""

from __future__ import annotations

import pathlib

import pytest

from dasd_megatron.config import load_config, read_config, save_config
from dasd_megatron.errors import ConfigError

QUICK = "experiment=quickstart"


def test_the_nodes_of_a_job_are_read_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST_HET_GROUP_1", "gpu[01-04,07]")
    nodes = ["rollout.nodes=${oc.env:SLURM_JOB_NODELIST_HET_GROUP_1}", "rollout.port=30000"]
    assert load_config([QUICK, "rollout=external", *nodes]).rollout.nodes == "gpu[01-04,07]"


def test_required_fields_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="is required"):
        load_config([])


def test_saved_configuration_reads_back_equal(tmp_path: pathlib.Path) -> None:
    config = load_config([QUICK, "optimizer.lr=3e-5", "evaluation.ks=[1,4]"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_one_source_of_the_teachers_text_is_a_list_of_it(tmp_path: pathlib.Path) -> None:
    """As it was written before there were lists: on the command line, in a group, and in the file of a run."""
    listed = load_config([QUICK, "teacher.privileged=[answer]"])
    assert load_config([QUICK, "teacher.privileged=answer"]) == listed
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - quickstart\n  - _self_\nteacher:\n  privileged: answer\n"
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text(text)
    assert load_config(["experiment=mine"], tmp_path / "mine") == listed
    save_config(listed, tmp_path / "config.yaml")
    saved = (tmp_path / "config.yaml").read_text()
    old = saved.replace("  privileged:\n  - answer\n", "  privileged: answer\n")
    assert old != saved
    (tmp_path / "config.yaml").write_text(old)
    assert read_config(tmp_path / "config.yaml") == listed
    assert load_config([QUICK]).teacher.privileged == ["solution"]


def test_saved_configuration_outlives_the_paths_it_names(tmp_path: pathlib.Path) -> None:
    checkpoint, data, rollouts = tmp_path / "step_000001", tmp_path / "train.jsonl", tmp_path / "rollouts"
    checkpoint.mkdir()
    rollouts.mkdir()
    data.touch()
    overrides = [
        QUICK,
        "evaluation=none",
        f"resume={checkpoint}",
        f"rollout.replay={rollouts}",
        "data.train.generator=null",
    ]
    config = load_config([*overrides, f"data.train.path={data}"])
    save_config(config, tmp_path / "config.yaml")
    checkpoint.rmdir()
    rollouts.rmdir()
    data.unlink()
    assert read_config(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match="no such file"):
        load_config([*overrides, f"data.train.path={data}"])


def test_groups_of_a_directory_of_ones_own(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "o'er, there=1"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\nrun:\n  name: mine\n  steps: 7\n"
    )
    config = load_config(["experiment=mine", "run.steps=8"], folder)
    assert (config.run.name, config.run.steps, config.warm_start.steps) == ("mine", 8, 400)
    assert load_config([QUICK], folder).run.name == "quickstart"
    with pytest.raises(ConfigError, match="mine"):
        load_config(["experiment=mine"])
    with pytest.raises(ConfigError, match="--config-dir .* is no directory"):
        load_config([QUICK], folder / "experiment" / "mine.yaml")


def test_entries_of_mappings_are_given_like_fields() -> None:
    given = ["data.chat_template_kwargs={enable_thinking: false}", "data.chat_template_kwargs.effort=low"]
    config = load_config(["experiment=quickstart", *given, "data.date=2026-11-29"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "effort": "low"}
    assert config.data.date == "2026-11-29"


@pytest.mark.parametrize("preset", ["qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b"])
def test_presets_of_models_that_think_ask_for_no_thought(preset: str, tmp_path: pathlib.Path) -> None:
    # In an evaluation too.
    for experiment in (["quickstart"], ["evaluate", "evaluation.benchmarks=[gsm8k]"]):
        arguments = [f"experiment={experiment[0]}", *experiment[1:], f"model={preset}", f"model.path={tmp_path}"]
        config = load_config(arguments)
        assert config.data.chat_template_kwargs == {"enable_thinking": False}
        assert config.model.architecture["model_type"] == "qwen3" and config.model.path == str(tmp_path)
        thinking = load_config([*arguments, "data.chat_template_kwargs.enable_thinking=true"])
        assert thinking.data.chat_template_kwargs == {"enable_thinking": True}


def test_the_embedded_server_computes_where_the_trainer_does_unless_told(tmp_path: pathlib.Path) -> None:
    gpu = ["backend.kind=cuda"]
    for overrides, device in (([], "cpu"), (gpu, "cuda"), ([*gpu, "rollout.device=cpu"], "cpu")):
        config = load_config([QUICK, *overrides])
        assert config.rollout.device == device
        save_config(config, tmp_path / "config.yaml")
        assert read_config(tmp_path / "config.yaml").rollout.device == device
    other = load_config([QUICK, *gpu, "rollout=external", "rollout.servers=[http://a:1]"])
    save_config(other, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").rollout.device == "auto"


@pytest.mark.parametrize("override", ["algorithm.beta_schedule=linear", "loss=ppo"])
def test_a_section_that_is_given_a_value_names_its_fields(override: str) -> None:
    section = override.partition("=")[0]
    with pytest.raises(
        ConfigError, match=rf"^{section} is a section and takes no value: write {section}\.FIELD="
    ) as refused:
        load_config(["experiment=quickstart", override])
    assert ("style, final, steps" if "schedule" in section else "surrogate, ") in str(refused.value)
