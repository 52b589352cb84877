"""Samples on disk: resumed where a kill left them, the same bytes as of one run, and never mixed with others."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from dasd_megatron.config import Config
from dasd_megatron.evaluation.sampling import (
    EvaluationError,
    _read_journal,
    check_settings,
    finished_samples,
    model_digest,
)
from dasd_megatron.files import RunDirectoryError
from dasd_megatron.rollout.transport import RolloutServerError
from tests.support.damage import listed_damage
from tests.support.evaluation_samples import PROBLEMS, Engine, draw


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resumed_twice_is_as_never_stopped(config: Config, tmp_path: Path) -> None:
    whole = Engine()
    records = draw(config, tmp_path / "whole", whole)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "output-rs0.jsonl",
        "output-rs1.jsonl",
        "output-rs2.jsonl",
    ]
    assert len({seed for seeds in whole.requests for seed in seeds}) == 21
    assert list(records[0][0])[:5] == [
        "problem",
        "expected_answer",
        "generation",
        "predicted_answer",
        "symbolic_correct",
    ]

    folder = tmp_path / "stopped"
    for last in (2, 3):
        with pytest.raises(RolloutServerError, match="gone"):
            draw(config, folder, Engine(last))
        journal = folder / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        # Killed in the middle of a line: this sample and no other is drawn again.
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: random.randrange(1, len(lines[-1]))])
    rest = Engine()
    assert draw(config, folder, rest) == records
    assert contents(folder) == contents(tmp_path / "whole")
    # Answers that came before the failure are kept, but for the one that was torn each time.
    assert len(rest.requests) == len(whole.requests) - (2 - 1) - (3 - 1)

    again = Engine()
    assert draw(config, folder, again) == records and again.requests == []
    # Killed between the final files and the journal's end.
    (folder / "journal.jsonl").write_bytes(
        b"".join(json.dumps({"place": [p, s], **records[p][s]}).encode() + b"\n" for p in range(7) for s in range(3))
    )
    assert draw(config, folder, again) == records and again.requests == []
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_journal_of_something_else_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RolloutServerError):
        draw(config, tmp_path, Engine(2))
    journal = tmp_path / "journal.jsonl"
    good = journal.read_text()
    for bad in ("[]", "{}", '{"place": [99, 0], "problem_id": "p0"}', '{"place": [1, 0], "problem_id": "p0"}', "\0\0"):
        journal.write_text(good + bad + "\n")
        with pytest.raises(EvaluationError, match=r"journal.jsonl line \d+ is no sample of this evaluation"):
            draw(config, tmp_path, Engine())


def test_final_files_that_are_not_whole_are_refused(config: Config, tmp_path: Path) -> None:
    draw(config, tmp_path, Engine())
    file = tmp_path / "output-rs1.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(EvaluationError, match="output-rs1.jsonl does not have each problem once"):
        draw(config, tmp_path, Engine())


def test_final_files_may_hold_any_character_that_json_allows(config: Config, tmp_path: Path) -> None:
    records = draw(config, tmp_path, Engine())
    for sample in range(3):
        rows = [{**row[sample], "generation": "a\u2028b\x85c"} for row in records]
        lines = [json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows]
        (tmp_path / f"output-rs{sample}.jsonl").write_bytes("".join(lines).encode())
    assert {record["generation"] for row in draw(config, tmp_path, Engine()) for record in row} == {"a\u2028b\x85c"}


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b"7" * 5_000, b"[]", b"{"])
def test_damaged_final_files_are_named(config: Config, tmp_path: Path, line: bytes) -> None:
    draw(config, tmp_path, Engine())
    file = tmp_path / "output-rs1.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(EvaluationError, match="output-rs1.jsonl line 8 is .*: remove .* to sample anew") as caught:
        draw(config, tmp_path, Engine())
    assert "\n" not in str(caught.value)


def test_a_policy_that_has_collapsed_is_no_fault_of_the_server(config: Config, tmp_path: Path) -> None:
    records = draw(config, tmp_path, Engine(same=True, log_prob=-0.01))
    assert all(len({record["generation"] for record in row}) == 1 for row in records)


def test_samples_that_are_all_the_same_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        EvaluationError, match="all 3 samples of each problem are the same, so the server heeds no seed"
    ):
        draw(config, tmp_path / "sampled", Engine(same=True))
    assert not list((tmp_path / "sampled").glob("output*"))
    greedy = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, temperature=0.0))
    draw(greedy, tmp_path / "greedy", Engine(same=True))


def test_other_settings_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    check_settings(folder, {"evaluation.temperature": 1.0, "run.seed": 1})
    check_settings(folder, {"run.seed": 1, "evaluation.temperature": 1.0})
    with pytest.raises(
        EvaluationError,
        match=r"other settings \(evaluation.temperature was 1.0 and is 0.6\): remove it, or give another",
    ):
        check_settings(folder, {"evaluation.temperature": 0.6, "run.seed": 1})
    (folder / "settings.json").unlink()
    (folder / "output-rs0.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="no settings.json"):
        check_settings(folder, {})


def test_a_changed_model_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    before = model_digest(tmp_path)
    (tmp_path / "logs.log").write_text("not the model")
    assert model_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert model_digest(tmp_path) != before


@pytest.mark.parametrize("name", ["settings.json", "journal.jsonl", "output-rs1.jsonl"])
def test_damaged_files_of_an_evaluation_are_named_and_kept(name: str, config: Config, tmp_path: Path) -> None:
    """Whatever is in their place: one line, or the samples that a sound folder gives."""
    sound = tmp_path / "sound"
    check_settings(sound, {"run.seed": 1, "model": "a"})
    if name == "journal.jsonl":
        with pytest.raises(RolloutServerError):
            draw(config, sound, Engine(2))
    else:
        draw(config, sound, Engine())
    lines = (sound / name).read_bytes().count(b"\n")
    for number, (kind, damage) in enumerate(listed_damage(1, flips=12).items()):
        folder = shutil.copytree(sound, tmp_path / str(number))
        damage(folder / name)
        try:
            check_settings(folder, {"run.seed": 1, "model": "a"})
            if name == "journal.jsonl":
                assert len(_read_journal(folder / name, PROBLEMS, 3)) <= lines
            else:
                finished_samples(folder, PROBLEMS, 3)
        except EvaluationError as error:
            assert "\n" not in str(error) and str(folder) in str(error), kind
        left = {path.name for path in folder.iterdir()} | ({name} if kind == "missing" else set())
        assert left == {path.name for path in sound.iterdir()}, kind


def test_a_full_disk_keeps_the_samples_that_are_there(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match="cannot write .*journal.jsonl: No space left on device"):
            draw(config, tmp_path, Engine())
    assert len(_read_journal(tmp_path / "journal.jsonl", PROBLEMS, 3)) > 0
    draw(config, tmp_path, Engine())
