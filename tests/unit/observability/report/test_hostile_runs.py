"""A report is made of anything, or one line says why not: run directories that are damaged, hostile, or very large."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron import reading
from dasd_megatron.commands.report import report
from dasd_megatron.files import RunDirectoryError
from dasd_megatron.observability.report import page as page_module
from dasd_megatron.observability.report import rollouts, run_files
from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.report.rollouts import extreme_groups
from dasd_megatron.observability.report.run_files import MOST_NOTES, ReportError, read_run
from tests.support.report_runs import HOSTILE, Page, inspected, load_page, make_run, rollout, write_lines

EXAMPLES = int(os.environ.get("REPORT_EXAMPLES", "50"))
SAMPLES = "evaluations/before-step_000000/samples.jsonl"
DEEP = "[" * 100_000 + "]" * 100_000
NESTED = json.loads("[" * 900 + "]" * 900)
BILLION_LAUGHS = (
    "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    + "run: {name: *a9, steps: *a9}\nalgorithm: {name: *a9}\n"
)
ODD = [
    *(1e300, -1e300, 1e308, 5e-324, -0.0, 10**400, -(10**400), 2**63, -1, 0, True, False, None),
    *("NaN", "Infinity", "-Infinity", "1e300", "", HOSTILE, "\u2028\u2029\ud800", "x" * 5000, "../../etc"),
    *([], {}, [1, [2, [3]]], {"a": {"b": None}}, NESTED),
]
"""Values that no metric has."""


def change_rows(path: Path, name: str, value: Any) -> None:
    """Set a field of every line."""
    write_lines(path, [json.loads(line) | {name: value} for line in path.read_text().splitlines()])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", BILLION_LAUGHS, "config.yaml could not be read: line 2 has an alias"),
        ("config.yaml", "a: &a [*a]\n", "config.yaml could not be read: line 1 has an alias"),
        ("config.yaml", "a: " + DEEP, "config.yaml could not be read: nested too deeply"),
        (
            "config.yaml",
            "".join(f"{' ' * n}a:\n" for n in range(500)),
            "config.yaml could not be read: nested too deeply",
        ),
        ("config.yaml", "a: !!python/object/apply:os.system [id]\n", "config.yaml could not be read: line 1 has a tag"),
        ("config.yaml", "a: [{2024-01-01: b}]\n", "config.yaml could not be read: a key is neither text nor a number"),
        (
            "config.yaml",
            f"run: {{steps: 0x{'f' * 5000}}}\n",
            "config.yaml could not be read: an integer has 20000 bits",
        ),
        ("config.yaml", "# " + "x" * 1_100_000, "config.yaml could not be read: it is damaged (1100002 bytes"),
        ("environment.json", f'{{"a": {DEEP}}}', "environment.json could not be read: nested too deeply"),
        (
            "environment.json",
            f'{{"a": {"[" * 200}{"]" * 200}}}',
            "environment.json could not be read: nested too deeply",
        ),
        ("metrics.jsonl", f'{{"step": 1, "a": {DEEP}}}\n', "metrics.jsonl: 1 unreadable lines were left out"),
        ("evaluation.jsonl", f"{DEEP}\n", "evaluation.jsonl: 1 unreadable lines were left out"),
        ("watch.jsonl", f"{DEEP}\n", "watch.jsonl: 1 unreadable lines were left out"),
        ("rollouts/step_000001.jsonl", f"{DEEP}\n", "rollouts/step_000001.jsonl: 1 unreadable lines were left out"),
        (
            "inspect/step_000001.json",
            DEEP,
            "inspect/step_000001.json could not be read: it is damaged (nested too deeply",
        ),
        (
            "evaluations/before-step_000000/samples.jsonl",
            f"{DEEP}\n",
            "samples.jsonl: 1 unreadable lines were left out",
        ),
    ],
)
def test_what_expands_or_is_nested_becomes_a_note(tmp_path: Path, name: str, text: str, words: str) -> None:
    run = make_run(tmp_path / "run", steps=3)
    other = make_run(tmp_path / "other", steps=3)
    (run / name).write_text(text)
    begun = time.process_time()
    _, page, _ = load_page(run)
    assert words in page.text()
    # Several runs are compared field by field.
    load_page(run, other, output=tmp_path / "both.html")
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_metrics_may_have_any_value_and_type(tmp_path: Path, value: Any) -> None:
    run = make_run(tmp_path / "run", steps=3)
    names = [name for name in json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) if name != "step"]
    write_lines(
        run / "metrics.jsonl",
        [{"step": step, **({name: value for name in names} if step == 2 else {})} for step in range(1, 5)],
    )
    for file, fields in (
        ("evaluation.jsonl", ["avg@2", "pass@1", "maj@2", "response/length_mean", "nll_mean", "num_problems"]),
        ("warm_start.jsonl", ["loss", "lr", "grad_norm"]),
    ):
        for field in fields:
            change_rows(run / file, field, value)
    write_lines(run / "watch.jsonl", [{"step": 1, "text": value}])
    samples = run / SAMPLES
    for field in ("problem_id", "problem", "symbolic_correct", "generation", "predicted_answer", "expected_answer"):
        change_rows(samples, field, value)
    write_lines(run / "rollouts" / "step_000001.jsonl", [{name: value for name in rollout("x")}, rollout("y")])
    entries = [inspected("x", ["x"]) | {name: value} for name in inspected("x", ["x"])]
    entries += [inspected("x", ["x"]) | {name: [value]} for name in ("tokens", "entropy", "delta", "token_advantage")]
    (run / "inspect" / "step_000001.json").write_text(json.dumps(entries))
    text, _, _ = load_page(run)
    assert len(text) < 5_000_000
    change_rows(run / "metrics.jsonl", "time", value)
    load_page(run, make_run(tmp_path / "other", steps=3), output=tmp_path / "both.html")


@pytest.mark.parametrize(
    ("steps", "state", "words"),
    [
        ([5, 3, 9, 1], "step 9 of 12", "metrics.jsonl: its lines are not in the order of the steps"),
        ([1, 2, 2, 3], "step 3 of 12", "metrics.jsonl: 1 lines repeat a step"),
        ([-7, -3, 0], "step 0 of 12", ""),
        ([1, 10**400, 2**53, True, 2], "step 2 of 12", "metrics.jsonl: 3 lines without a step were left out"),
        ([2**53 - 1, -(2**53 - 1)], f"finished · {2**53 - 1} steps", "not in the order"),
        ([], "step 0 of 12", "No training step yet"),
    ],
)
def test_steps_may_be_of_any_size_and_order(tmp_path: Path, steps: list[int], state: str, words: str) -> None:
    run = make_run(tmp_path / "run", steps=3)
    (run / "evaluation.jsonl").unlink()
    rows = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) | {"step": step} for step in steps]
    write_lines(run / "metrics.jsonl", rows)
    _, page, _ = load_page(run)
    assert state in page.text() and words in page.text()


def test_results_may_be_of_any_name_and_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    odd = {f"pass@{'9' * 5000}": 0.5, "pass@\u0663": 0.5, "avg@\ud800": 0.5, "avg@<img src=x>": 0.5, "maj@": 0.5}
    rows = [json.loads(line) | odd for line in (run / "evaluation.jsonl").read_text().splitlines()]
    many = {f"pass@{k}": 0.5 for k in range(1, 3000)}
    write_lines(
        run / "evaluation.jsonl", [rows[0], {**rows[0], "label": ["before"]}, rows[1] | many, {"step": 1, **odd}]
    )
    text, page, _ = load_page(run)
    assert "Pass@2999" in page.text() and "<img" not in text and len(text) < 1_000_000


KINDS: dict[str, Callable[[Path], None]] = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("absent"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "missing": lambda path: None,
    "empty": Path.touch,
    "blank": lambda path: path.write_text("\n\n \n") and None,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20) and None,
    "utf-16": lambda path: path.write_bytes('{"step": 1}\n'.encode("utf-16")) and None,
    "mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + b'{"step": 1}\n') and None,
}
FILES = (
    ("config.yaml", "warm_start.jsonl", "rollouts", "inspect/step_000001.json", SAMPLES),
    ("metrics.jsonl", "environment.json", "rollouts/step_000001.jsonl", "evaluations"),
    ("evaluation.jsonl", "watch.jsonl", "inspect"),
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_files_may_be_of_any_kind(tmp_path: Path, kind: str) -> None:
    for place, names in enumerate(FILES):
        run = make_run(tmp_path / str(place), steps=2)
        write_lines(run / "watch.jsonl", [{"step": 1, "text": "warning"}])
        for name in names:
            replaced = run / name
            shutil.rmtree(replaced) if replaced.is_dir() else replaced.unlink()
            KINDS[kind](replaced)
        _, page, _ = load_page(run)
        for name in names:
            if kind in ("directory", "pipe", "loop", "device") and "." in name:
                assert f"{name} could not be read: it " in page.text(), name


def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("loop", "pipe", "file"):
        with pytest.raises(
            ReportError, match="^[^\n]+: give the directory of a run|^[^\n]+; give the directory of a run"
        ):
            write_report([tmp_path / name])
    run = make_run(tmp_path / "run", steps=1)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ReportError, match="cannot be read: Permission denied; give"):
        write_report([run])


def test_a_run_that_is_being_written_has_its_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    for path in run.rglob("*.json*"):
        path.write_bytes(path.read_bytes()[:-20])
    _, page, _ = load_page(run)
    assert "step 2 of 12" in page.text()


def test_hostile_names_and_texts_are_only_text(tmp_path: Path) -> None:
    run = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff<b>\xe2\x80\xa8")), steps=2, text=HOSTILE)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [row | {HOSTILE: 1.0, "a/b" * 1000: 2.0} for row in rows])
    (run / "config.yaml").write_text(f"run: {{name: {json.dumps(HOSTILE[:-1])}, steps: {json.dumps(HOSTILE[:-1])}}}\n")
    write_lines(run / "watch.jsonl", [{"step": 1, "text": HOSTILE}])
    text, page, _ = load_page(run)
    scripts = [attributes for tag, attributes in page.elements if tag in ("script", "img", "b")]
    assert sum("src" in attributes for attributes in scripts) == 0 and text.count("<script") == 2
    assert "\u2028" not in text and "\u202e" not in text and "\x1b" not in text


def test_very_long_runs_are_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "MOST_ROWS", 50)
    run = make_run(tmp_path / "run", steps=1)
    steps = 3000
    write_lines(run / "metrics.jsonl", [{"step": step, "seconds/total": 2.0} for step in range(1, steps + 1)])
    tracemalloc.start()
    found = read_run(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.metrics) <= 51 and found.metrics[-1]["step"] == steps and found.metrics_every == 64
    assert peak < 2_000_000
    assert found.notes == ["metrics.jsonl: of 3,000 lines, each 64th is read, and the last"]
    _, page, _ = load_page(run)
    assert "3000 steps in 1h4" in page.text()  # 6,000 seconds, to the nearest line

    # Few long lines are as many bytes.
    monkeypatch.setattr(run_files, "ROW_CHARS", 10_000)
    write_lines(run / "watch.jsonl", [{"step": step, "text": "x" * 3000} for step in range(40)])
    assert len(read_run(run).warnings) <= 4


def test_a_single_large_file_of_rollouts_is_read_in_part(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=1))
    path = run.path / "rollouts" / "step_000001.jsonl"
    write_lines(path, [rollout("x", group=group) for group in range(100)])
    assert 0 < extreme_groups(run, max_bytes=path.stat().st_size // 10).count <= 10
    assert run.notes[-1].startswith("rollouts/step_000001.jsonl: the rest after ")


def test_a_line_of_any_length_is_no_danger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LINE_BYTES", 2000)
    run = make_run(tmp_path / "run", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "text": "x" * 3000}) + "\n")
    _, page, _ = load_page(run)
    assert "finished · 3 steps" in page.text()
    assert "metrics.jsonl could not be read: line 4 has more than 2000 bytes" in page.text()


def test_rollouts_without_tokens_do_not_fill_the_page(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=1))
    (run.path / "inspect" / "step_000001.json").write_text(json.dumps([inspected("x", [])] * 3000))
    found = rollouts.token_rollouts(run, 48_000)
    assert len(found.chosen) == 48_000 // rollouts.LEAST_TOKENS and found.count == 3000


def test_of_very_many_saved_steps_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MOST_STEPS_READ", 4)
    run = read_run(make_run(tmp_path / "run", steps=9))
    groups, tokens = extreme_groups(run), rollouts.token_rollouts(run, 48_000)
    assert (groups.steps_read, groups.steps_saved) == (tokens.steps_read, tokens.steps_saved) == (4, 9)
    assert "4 evenly spaced of 9 saved steps" in rollouts.groups_rule([groups])


def test_the_command_prints_any_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[2J")), steps=1)
    report([str(run)])
    assert capsys.readouterr().out.endswith("/‹U+DCFF›‹U+001B›[2J/report.html\n")


def test_notes_warnings_and_texts_are_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    long = "<&" * 20_000
    (run / "inspect" / "step_000001.json").write_text(json.dumps([{"tokens": long[:1000]}] * 500))
    write_lines(run / "watch.jsonl", [{"step": step, "text": long[:10_000]} for step in range(300)])
    (run / "inspect" / "step_000002.json").write_text(json.dumps([inspected("x", [long] * 50)]))
    fields = ("finish_reason", "predicted_answer", "expected_answer", "problem")
    write_lines(run / "rollouts" / "step_000001.jsonl", [rollout("x", **dict.fromkeys(fields, long)) for _ in range(9)])
    for field in (*fields, "generation"):
        change_rows(run / SAMPLES, field, long)
    (run / "config.yaml").write_text(f"run: {{name: {long}}}\nalgorithm: {{name: {long}}}\n")
    write_lines(run / "rollouts" / "step_000002.jsonl", [rollout("x", group=7) for _ in range(2000)])
    found = read_run(run)
    text = page_module.render([found])
    assert all(len(group["rewards"]) <= 1000 for group in extreme_groups(found).best)
    assert len(found.notes) == MOST_NOTES + 1 and found.notes[-1].endswith("more notes are left out")
    assert len(text) < 3_000_000 and "200 earlier warnings are left out" in text


def mutate_bytes(data: st.DataObject, content: bytes) -> bytes:
    place = data.draw(st.integers(0, len(content)))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
    if how == "cut":
        return content[:place]
    if how == "repeat":
        return content + content[place:]
    middle = data.draw(st.binary(max_size=8)) if how == "insert" else bytes([data.draw(st.integers(0, 255))])
    return content[:place] + middle + content[place + (how == "flip") :]


def mutate_values(data: st.DataObject, content: bytes) -> bytes:
    """Give fields of some lines other values."""
    lines = []
    for line in content.splitlines():
        value = json.loads(line)
        for row in value if isinstance(value, list) else [value]:
            name = data.draw(st.sampled_from(sorted(row)))
            if data.draw(st.booleans()):
                row[name] = data.draw(st.sampled_from(ODD) | st.floats() | st.integers() | st.text(max_size=5))
        lines.append(json.dumps(value).encode())
    return b"\n".join(lines) + b"\n"


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_run_directory_gives_a_page_or_a_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", steps=2)
        write_lines(run / "watch.jsonl", [{"step": 1, "text": "warning"}])
        files = sorted(path for path in run.rglob("*") if path.is_file())
        for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
            content = path.read_bytes()
            if path.suffix == ".yaml" or data.draw(st.booleans()):
                path.write_bytes(mutate_bytes(data, content))
            else:
                path.write_bytes(mutate_values(data, content))
        try:
            target = write_report([run])
        except (ReportError, RunDirectoryError) as error:
            assert "\n" not in str(error)
        else:
            Page(target.read_text(encoding="utf-8"))
