"""Published problem sets are read as their authors publish them, by training, evaluation and preparation alike. The
rows are written for these tests in the form of each set."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.commands.prepare_data import main
from tests.support.documented import ROOT, commands
from tests.support.problem_files import USERS, prepare, train

COMMANDS = [
    shlex.split(command.text)[1:]
    for command in commands((ROOT / "docs" / "data.md").read_text())
    if " published/" in command.text.replace("'", "")
]

INSTRUCTED = "Work step by step and end with a line 'Answer: X'.\n\nWhat is {}?"
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": INSTRUCTED.format(sum_)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"u{answer}"},
    }
    for sum_, answer in (("3 plus 4", "7"), ("5 plus 6", "11"))
]
VERL_GSM8K = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 3 + 4? After ####."},
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {
            "split": "train",
            "index": 0,
            "answer": "It is <<3+4=7>>7.\n#### 7",
            "question": "What is 3 + 4?",
        },
    }
]
NUMINA = {"problem_type": "Algebra", "problem_is_valid": "Yes", "source": "own", "synthetic": False}

# By name: the rows, the kind of file, and what comes out of them.
SETS: dict[str, tuple[list[dict[str, Any]], str, list[tuple[str, str, str]]]] = {
    "DAPO-Math-17k": (
        DAPO,
        ".parquet",
        [(INSTRUCTED.format("3 plus 4"), "7", ""), (INSTRUCTED.format("5 plus 6"), "11", "")],
    ),
    "DAPO-Math-17k-Processed": (
        [{**DAPO[0], "prompt": "What is 3 + 4?", "source_prompt": DAPO[0]["prompt"], "solution": "7"}],
        ".parquet",
        # Its solution is the answer alone.
        [("What is 3 + 4?", "7", "")],
    ),
    "DeepScaleR": (
        [
            {"problem": "What is 3 + 4?", "answer": "7", "solution": "Add them: $7$."},
            {"problem": "What is half?", "answer": "\\frac{1}{2}", "solution": ""},
        ],
        ".json",
        [("What is 3 + 4?", "7", "Add them: $7$."), ("What is half?", "\\frac{1}{2}", "")],
    ),
    "NuminaMath-1.5": (
        [
            {"problem": "Compute 6*7.", "solution": "It is \\boxed{42}.", "answer": "42", **NUMINA},
            {"problem": "Which is larger? (A) 1 (B) 2", "solution": "Two is.", "answer": "B", **NUMINA},
            {"problem": "Compute 6*8.", "solution": "It is \\boxed{48}.", "answer": None, **NUMINA},
        ],
        ".parquet",
        [
            ("Compute 6*7.", "42", "It is \\boxed{42}."),
            ("Which is larger? (A) 1 (B) 2", "B", "Two is."),
            ("Compute 6*8.", "48", "It is \\boxed{48}."),
        ],
    ),
    "NuminaMath-CoT": (
        [
            {
                "source": "own",
                "problem": "Compute 6*7.",
                "solution": "It is $\\boxed{42}$.",
                "messages": [
                    {"role": "user", "content": "Compute 6*7."},
                    {"role": "assistant", "content": "It is $\\boxed{42}$."},
                ],
            }
        ],
        ".parquet",
        [("Compute 6*7.", "42", "It is $\\boxed{42}$.")],
    ),
    "OpenMathReasoning": (
        [
            {
                "problem": "Compute 6*7.",
                "generated_solution": "<think>\nSix times seven.\n</think>\nIt is \\(\\boxed{42}\\).",
                "expected_answer": "42",
                "problem_type": "has_answer_extracted",
                "problem_source": "own",
                "generation_model": "own",
                "pass_rate_72b_tir": "n/a",
                "inference_mode": "cot",
                "used_in_kaggle": True,
            }
        ],
        ".parquet",
        [("Compute 6*7.", "42", "<think>\nSix times seven.\n</think>\nIt is \\(\\boxed{42}\\).")],
    ),
    "Hendrycks MATH": (
        [
            {
                "problem": f"Compute {root} squared.",
                "level": "Level 1",
                "type": "Algebra",
                "solution": f"Multiplying, ${root}\\cdot {root}=\\boxed{{{root**2}}}$.",
            }
            for root in (11, 12, 13)
        ],
        ".jsonl",
        [
            (f"Compute {root} squared.", str(root**2), f"Multiplying, ${root}\\cdot {root}=\\boxed{{{root**2}}}$.")
            for root in (11, 12, 13)
        ],
    ),
    "OlympiadBench": (
        [
            {
                "id": 1,
                "question": "Find both roots of x^2-3x+2.",
                "solution": ["They are 1 and 2."],
                "final_answer": ["1", "2"],
                "context": None,
                "image_1": None,
                "is_multiple_answer": True,
                "unit": None,
                "answer_type": "Numerical",
                "error": None,
            },
            {
                "id": 2,
                "question": "Find the pair.",
                "solution": ["By symmetry.", "By trial."],
                "final_answer": ["$(1,2)$"],
                "context": "Both are positive.",
                "image_1": None,
                "is_multiple_answer": False,
                "unit": "m/s",
                "answer_type": "Tuple",
                "error": "1e-1",
            },
        ],
        ".json",
        [
            ("Find both roots of x^2-3x+2.", "1, 2", "They are 1 and 2."),
            ("Both are positive.\nFind the pair.", "(1,2)", "By symmetry.\nBy trial."),
        ],
    ),
    "Skywork-OR1": (
        [
            {
                "data_source": "train-math-own",
                "prompt": [{"role": "user", "content": "Find both roots. Put them into a box."}],
                "ability": "math",
                "reward_model": {"ground_truth": ground_truth, "style": "rule"},
                "extra_info": {"index": 5, "model_difficulty": {"own-7B": 3}},
            }
            for ground_truth in ('["1", "2"]',)
        ]
        + [
            {
                "data_source": "train-math-own",
                "prompt": [{"role": "user", "content": "What is a half?"}],
                "ability": "math",
                "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"},
                "extra_info": {"index": 6, "model_difficulty": {"own-7B": 3}},
            }
        ],
        ".parquet",
        [("Find both roots. Put them into a box.", "1, 2", ""), ("What is a half?", "\\frac{1}{2}", "")],
    ),
    "GSM8K": (
        [{"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>1,072.\n#### 1,072"}],
        ".jsonl",
        [("How many?", "1,072", "48/2 = 24 clips.\nIn all 1,072.\n#### 1,072")],
    ),
    "GSM8K by verl": (VERL_GSM8K, ".parquet", [("What is 3 + 4?", "7", "It is 7.\n#### 7")]),
}  # fmt: skip


def write(rows: list[dict[str, Any]], kind: str, folder: Path) -> Path:
    path = folder / f"set{kind}"
    if kind == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", SETS)
def test_a_published_set_is_read_as_it_is(name: str, user: str, tmp_path: Path) -> None:
    rows, kind, expected = SETS[name]
    outcome = USERS[user](write(rows, kind, tmp_path))
    assert outcome.error == "" and outcome.problems == expected
    assert len(outcome.said) >= 1 and all("problem from " in line for line in outcome.said)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_the_kind_of_file_makes_no_difference(kind: str, tmp_path: Path) -> None:
    for name, (rows, _, expected) in SETS.items():
        (tmp_path / name).mkdir()
        for user in USERS.values():
            assert user(write(rows, kind, tmp_path / name)).problems == expected


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[1])
def test_the_documented_command_of_each_set(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(arguments[1])
    rows, _, expected = SETS["Hendrycks MATH" if source.parts[1] == "MATH" else source.parts[1]]
    folder, kind = (source, ".json") if source.suffix == "" else (source.parent, source.suffix)
    folder.mkdir(parents=True)
    # Repeated, as DAPO-Math-17k is.
    write(rows * 2, kind, folder).rename(folder / f"{source.stem}{kind}".replace("*", "00000-of-00001"))
    main(arguments)
    assert train(Path(arguments[-1])).problems == expected


def test_each_set_has_a_command() -> None:
    assert {Path(arguments[1]).parts[1] for arguments in COMMANDS} == {
        "DAPO-Math-17k",
        "DeepScaleR",
        "NuminaMath-1.5",
        "OpenMathReasoning",
        "MATH",
        "OlympiadBench",
        "Skywork-OR1",
        "GSM8K",
    }


@pytest.mark.parametrize("user", USERS)
def test_a_folder_with_a_file_for_each_problem_is_a_set(user: str, tmp_path: Path) -> None:
    rows, _, expected = SETS["Hendrycks MATH"]
    for number, row in enumerate(rows):
        file = tmp_path / "MATH" / "train" / "algebra" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=4))
    assert USERS[user](tmp_path / "MATH" / "train").problems == expected


def test_rows_without_an_answer_are_dropped_or_refused(tmp_path: Path) -> None:
    proof = {"problem": "Prove it.", "solution": "So it is. \\boxed{QED}", "answer": "proof", **NUMINA}
    path = write([*SETS["NuminaMath-1.5"][0], proof], ".jsonl", tmp_path)
    assert prepare(path).problems == SETS["NuminaMath-1.5"][2]
    for user in ("training", "evaluation"):
        assert "line 4: no answer: answer is 'proof'" in USERS[user](path).error
