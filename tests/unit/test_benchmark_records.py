"""Results of benchmarks name models and settings, and no place of the machine that measured."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import ABSOLUTE_PATH, without_places, write_record

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# Documents may speak of places in an image, and of this one on any machine.
PLACES = re.compile(r"(?<![\w.<}])/(?:home|root|work|Users|mnt|scratch|tmp)/[\w.-]+")
OF_NOBODY = {"/tmp/replayed"}


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield name
            yield from texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from texts(entry)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_no_result_holds_a_path(path: Path) -> None:
    assert [text for text in texts(json.loads(path.read_text())) if ABSOLUTE_PATH.search(text)] == []


def test_no_document_holds_a_path_of_one_machine() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    found = {match.group(0) for page in pages for match in PLACES.finditer(page.read_text())}
    assert found <= OF_NOBODY


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("/tmp/w/smollm2-bench", "smollm2-bench"),
        ("/tmp/w/smollm2-bench/", "smollm2-bench"),
        (Path("/scratch/me/qwen3"), "qwen3"),
        ("~/models/qwen3", "qwen3"),
        ("model.path=/data/qwen3", "model.path=qwen3"),
        ("[/data/a,/data/b.jsonl]", "[a,b.jsonl]"),
        ("python /opt/x/run.py --out=/tmp/y 1/2", "python run.py --out=y 1/2"),
        ("models/smollm2", "models/smollm2"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("1/2 of the tokens / s", "1/2 of the tokens / s"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_a_path_becomes_its_last_name(written: Any, kept: Any, tmp_path: Path) -> None:
    assert without_places({"a": [written, (written,)]}) == {"a": [kept, [kept]]}
    write_record(tmp_path / "record.json", {"a": written})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": kept}


def test_every_benchmark_writes_its_results_without_places() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        source = path.read_text()
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        own = [call for call in calls if re.match(r"(\w+\.)?(output|path)\.write_text\(", call)]
        assert own == [] or path.name == "record.py", (path.name, own)
