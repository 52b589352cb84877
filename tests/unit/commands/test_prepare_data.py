"""tools/prepare_data.py: what is kept, what is dropped and why, from every kind of source."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dasd_megatron import files
from dasd_megatron.commands.prepare_data import main
from dasd_megatron.config import DataSourceConfig, TinyModelConfig
from dasd_megatron.data.prompts import DataError
from dasd_megatron.data.reader import load_problems
from dasd_megatron.models.tiny import make_tiny_model

LONG = "A farmer has seven fields and plants three rows of twenty trees in each of them how many trees"
ROWS = [
    {"q": "1 + 1 = ?", "a": "2", "s": "Two. #### 2", "id": "first"},
    {"q": "2 + 2 = ?", "a": 4, "s": "Four."},
    {"q": "2 +  2 = ?", "a": "4", "s": "Four, again."},
    {"q": "No answer?", "s": "None."},
    {"q": "", "a": "1", "s": "x"},
    {"q": "No solution?", "a": "1"},
    {"q": f"{LONG}, if one dies?", "a": "419", "s": "7*3*20-1"},
    {"q": "3 + 3 = ?", "a": "6", "s": "x" * 100},
    {"q": "An eval problem, verbatim!", "a": "1", "s": "y"},
    {"q": "5 + 5 = ?", "a": "10", "s": "Ten.", "id": "first"},
]
FIELDS = ["--problem-field", "q", "--answer-field", "a", "--solution-field", "s"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n\n[1]\n")
    return path


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    path.write_text(
        json.dumps({"problem": "an eval problem verbatim"}) + "\n" + json.dumps({"problem": f"Suppose {LONG}?"}) + "\n"
    )
    return path


def test_every_row_is_kept_or_dropped_for_a_reason(
    source: Path, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = make_tiny_model(tmp_path / "model", TinyModelConfig(hidden_size=16, num_layers=1), 1)
    output = tmp_path / "out" / "train.jsonl"
    limits = ["--tokenizer", str(tokenizer), "--max-solution-tokens", "50"]
    main(["--input", str(source), "--output", str(output), *FIELDS, "--contamination", str(heldout), *limits])
    kept = load_problems(DataSourceConfig(path=str(output)), "train")
    assert [(problem.id, problem.problem, problem.expected_answer) for problem in kept] == [
        ("first", "1 + 1 = ?", "2"),
        ("train-row-1", "2 + 2 = ?", "4"),
    ]
    rejected = [json.loads(line) for line in output.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert {entry["where"].split()[-1]: entry["reason"] for entry in rejected} == {
        "3": "duplicate",
        "4": "no answer",
        "5": "unusable",
        "6": "unusable",
        "7": "contamination",
        "8": "reference_solution too long",
        "9": "contamination",
        "10": "duplicate id",
        "11": "unusable",
        "13": "unusable",
    }
    assert "give --answer-field" in rejected[1]["detail"] and "column" in rejected[-2]["detail"]
    manifest = json.loads(output.with_suffix(".manifest.json").read_text())
    assert manifest["kept"] == 2 and sum(manifest["dropped"].values()) == len(rejected) == 10
    assert manifest["contamination_problems"] == 2
    printed = capsys.readouterr().out
    assert "kept 2" in printed and "dropped 4: unusable" in printed and "dropped 1: no answer" in printed


def test_missing_solutions_are_kept_on_request(source: Path, tmp_path: Path) -> None:
    main(["--input", str(source), "--output", str(tmp_path / "out.jsonl"), *FIELDS, "--allow-missing-solution"])
    assert "No solution?" in (tmp_path / "out.jsonl").read_text()


def test_parquet_and_saved_datasets_give_what_jsonl_gives(source: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": None, "s": None, **row, "a": str(row["a"])} for row in ROWS if "a" in row]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "source.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = []
    for name, arguments in {
        "parquet": ["--input", str(tmp_path / "source.parquet")],
        "saved": ["--dataset", str(tmp_path / "saved")],
        "jsonl": ["--input", str(plain)],
    }.items():
        output = tmp_path / name / "out.jsonl"
        main([*arguments, "--output", str(output), *FIELDS])
        outputs.append(output.read_text())
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].count("\n") == 5


def test_bad_calls_are_refused_with_one_line(source: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out.jsonl")]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_text("x")
    for arguments, named in (
        (["--input", str(tmp_path / "missing.jsonl"), *output], "missing.jsonl"),
        (["--input", str(source), *output], "nothing of"),
        (["--input", str(tmp_path / "empty.jsonl"), *output], "empty"),
        (["--input", str(tmp_path / "bad.parquet"), *output], "Parquet"),
        (["--dataset", str(tmp_path / "nowhere"), *output], "--dataset"),
        (["--input", str(source), *output, "--max-problem-tokens", "3"], "--tokenizer"),
        (["--input", str(source), *output, *FIELDS, "--ngram", "0"], "--ngram"),
        (["--input", str(source), "--output", str(source), *FIELDS], "exists"),
        (["--input", str(source), *output, *FIELDS, "--contamination", str(source)], "line 5"),
    ):
        with pytest.raises(DataError) as caught:
            main(arguments)
        assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_signs_are_another_problem_and_unspaced_scripts_have_words(tmp_path: Path) -> None:
    repeated = "小明有三十五个苹果和九十三个梨他又买了三十八个苹果请问一共"
    rows = ["What is 2-3?", "What is 2*3?", "What is 2+3", f"{repeated}有多少水果"]
    source, heldout, output = (tmp_path / f"{name}.jsonl" for name in ("source", "eval", "out"))
    source.write_text("".join(json.dumps({"problem": row, "expected_answer": "1"}) + "\n" for row in rows))
    heldout.write_text(
        "".join(json.dumps({"problem": text}) + "\n" for text in ("What is 2+3?", f"已知{repeated}几个"))
    )
    main(["--input", str(source), "--output", str(output), "--allow-missing-solution", "--contamination", str(heldout)])
    assert [json.loads(line)["problem"] for line in output.read_text().splitlines()] == rows[:2]


def test_an_id_that_looks_automatic_drops_nothing_else(tmp_path: Path) -> None:
    rows = [{"problem": f"{index} + 1", "expected_answer": "1"} for index in range(4)]
    rows[0]["id"] = "out-row-2"
    source, output = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--input", str(source), "--output", str(output), "--allow-missing-solution"])
    assert len(output.read_text().splitlines()) == 3


def test_a_pattern_that_fits_the_output_reads_the_sources_alone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": f"{name}?", "answer": "1"}) + "\n")
    output = tmp_path / "c.jsonl"
    main(["--input", str(tmp_path / "*.jsonl"), "--output", str(output), "--allow-missing-solution"])
    manifest = json.loads(output.with_suffix(".manifest.json").read_text())
    assert manifest["kept"] == 2 and len(manifest["source_sha256"]) == 64
    assert manifest["found"] == ["2 rows: problem from problem, answer from answer, no solution"]


def test_a_full_disk_is_one_line_and_leaves_no_part(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync_path", full)
    folder = tmp_path / "out"
    with pytest.raises(DataError, match=r"out.jsonl cannot be written \(No space left on device\); give another"):
        main(["--input", str(source), "--output", str(folder / "out.jsonl"), *FIELDS])
    assert list(folder.iterdir()) == []


def test_the_same_problem_with_another_answer_is_told(tmp_path: Path) -> None:
    source, output = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    rows = [{"problem": "p?", "answer": answer} for answer in ("1", "1.0", "2")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--input", str(source), "--output", str(output), "--allow-missing-solution"])
    details = [json.loads(line)["detail"] for line in output.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert details[0].endswith("line 1") and details[1].endswith("which has the answer '1' where this has '2'")


def test_words_for_a_missing_answer_are_kept_on_request(tmp_path: Path) -> None:
    source, output = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"problem": "p?", "answer": "None"}) + "\n")
    arguments = ["--input", str(source), "--output", str(output), "--allow-missing-solution"]
    with pytest.raises(DataError, match="line 1: no answer: answer is 'None', which stands for a missing one"):
        main(arguments)
    main([*arguments, "--no-answer"])
    assert json.loads(output.read_text())["expected_answer"] == "None"
