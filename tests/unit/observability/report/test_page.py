from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re

import pytest

from dasd_megatron.files import RunDirectoryError
from dasd_megatron.observability.report.curves import MOST_RUNS
from dasd_megatron.observability.report.page import TOKENS_IN_ALL, write_report
from dasd_megatron.observability.report.run_files import ReportError
from tests.support.report_runs import HOSTILE, inspected, load_page, make_run, metrics, rollout, two_runs, write_lines


def test_a_whole_run_has_every_section(tmp_path):
    text, page, data = load_page(make_run(tmp_path / "run"))
    assert {element.get("id") for element in page.all("section")} == {
        "results",
        "warm-start",
        "training",
        "tokens",
        "speed",
        "groups",
        "samples",
        "configuration",
    }
    words = page.text()
    for part in (
        "toy-run",
        "finished · 12 steps",
        "Avg@2",
        "+25.0 points",
        "Difference of average accuracy, paired over 8 problems: +50.0 points",
    ):
        assert part in words, part
    titles = {attributes["aria-label"] for attributes in page.all("svg")}
    assert titles >= {
        "Pass@k",
        "Loss of the warm start",
        "Reward: accuracy on training problems",
        "Student entropy H",
        "Response length",
        "Tokens pushed away from the teacher",
        "Direction weight ω",
        "Teacher–student gap δ",
        "KL to the rollout policy",
        "Clipped tokens",
        "Gradient norm",
        "Where a step's time goes",
    }
    assert "Warnings of the watch" not in words and "Not everything could be read" not in words
    assert "groups: 4" in page.text("pre") and "abc123" in page.text("pre")
    assert [rollout["step"] for rollout in data["rollouts"]] == list(range(1, 13))
    assert "All 12 rollouts whose token statistics were saved." in words and "Of 12 groups in 12 saved steps" in words
    assert len(text) < 1_000_000


def test_runs_are_overlaid_each_in_its_colour(tmp_path):
    _, page, data = load_page(*two_runs(tmp_path), output=tmp_path / "page.html")
    assert data["runs"] == [{"label": "toy-run", "colour": "run1"}, {"label": "other", "colour": "run2"}]
    charts = {element["aria-label"]: json.loads(element["data-chart"]) for element in page.all("svg")}
    for title in (
        "Pass@k",
        "Loss of the warm start",
        "Student entropy H: pushed tokens",
        "Gradient norm",
        "Throughput",
    ):
        assert [row[:2] for row in charts[title]["rows"]] == [["toy-run", "run1"], ["other", "run2"]], title
    lengths = [sum(bool(value) for value in row[2].split("|")) for row in charts["Gradient norm"]["rows"]]
    assert lengths == [12, 30]
    words = page.text()
    assert (
        "finished · 12 steps" in words
        and "not finished · step 30 of 40" not in words
        and "finished · 30 steps" in words
    )
    assert (
        {record["run"] for record in data["rollouts"]}
        == {0, 1}
        == {record["run"] for record in data["groups"]["worst"]}
    )


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / name / last) for name, last in (("x", "1"), ("x", "2"), ("y", "2"))]
    _, _, data = load_page(*paths, output=tmp_path / "page.html")
    assert [run["label"] for run in data["runs"]] == ["toy-run 1", "toy-run 2 (2)", "toy-run 2 (3)"]


def test_runs_that_lack_parts_still_share_a_page(tmp_path):
    first, second = two_runs(tmp_path)
    for name in ("evaluation.jsonl", "metrics.jsonl", "warm_start.jsonl"):
        (second / name).unlink()
    for folder in ("inspect", "rollouts", "evaluations"):
        (second / folder).rename(tmp_path / f"gone-{folder}")
    _, page, data = load_page(first, second, output=tmp_path / "page.html")
    assert {record["run"] for record in data["rollouts"]} == {0}
    assert "not finished · step 0 of 40" in page.text()


def test_many_long_runs_stay_small(tmp_path):
    noise = random.Random(0)
    paths = []
    for place in range(MOST_RUNS):
        path = make_run(tmp_path / f"run{place}", steps=2)
        write_lines(
            path / "metrics.jsonl", [metrics(step, noise) | {"entropy/mean": noise.random()} for step in range(1, 1001)]
        )
        paths.append(path)
    text, page, _ = load_page(*paths, output=tmp_path / "page.html")
    assert len(text.encode()) < 5_000_000
    assert "areas span their smallest and largest" in page.text()


def test_what_cannot_become_one_page_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    for arguments, words in (
        (([],), "no run is given"),
        (([run, run],), "more than once"),
        (([tmp_path / str(i) for i in range(17)],), "at most 16"),
        (([run], tmp_path / "absent" / "page.html"), "is not a directory"),
        (([run], tmp_path), "is a directory"),
        (([run, tmp_path / "absent"],), "absent is not a directory"),
    ):
        with pytest.raises(ReportError, match=words):
            write_report(*arguments)


def test_hostile_text_is_only_text(tmp_path):
    run = make_run(tmp_path / "run", text=HOSTILE, tokens=[HOSTILE, "x"])
    (run / "config.yaml").write_text(f"run:\n  name: {json.dumps(HOSTILE)}\n  steps: 12\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [{**row, "weight_version": HOSTILE, HOSTILE: 1.0} for row in rows])
    text, page, data = load_page(run)
    scripts = [part for tag, part in page.texts if tag == "script"]
    assert len(page.all("script")) == len(scripts) == 2 and "<" not in scripts[0] and "alert" not in scripts[1]
    assert all(HOSTILE[:20] in str(data[part]) for part in ("rollouts", "groups"))
    assert page.all("img") == [] and page.all("link") == [] and page.all("iframe") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert 'alert("x")' in page.text("pre") and "‹U+202E›txt‹U+001B›[2J‹U+0000› {{ 7*7 }} ‹U+D800›" in page.text("pre")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e]", text)


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
    text, page, data = load_page(make_run(tmp_path / "run"))
    loading = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    targets = [value for _, attributes in page.elements for name, value in attributes.items() if name in loading]
    assert targets and all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://|@import|url\(", text)
    (policy,) = [
        attributes["content"]
        for attributes in page.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (script,) = [part for tag, part in page.texts if tag == "script" and not part.startswith("{")]
    assert [element.get("type") for element in page.all("script")] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    "kept",
    [
        ["config.yaml"],
        ["metrics.jsonl"],
        ["config.yaml", "warm_start.jsonl"],
        ["config.yaml", "metrics.jsonl", "rollouts"],
        ["config.yaml", "metrics.jsonl", "inspect"],
        ["config.yaml", "evaluation.jsonl"],
        ["evaluation.jsonl", "evaluations"],
    ],
)
def test_partial_runs(tmp_path, kept):
    run = make_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name not in kept:
            path.rename(tmp_path / path.name)
    _, page, data = load_page(run)
    words = page.text()
    assert ("No evaluation yet" in words) == ("evaluation.jsonl" not in kept)
    assert ("No training step yet" in words) == ("metrics.jsonl" not in kept)
    assert ("No token statistics" in words) == ("inspect" not in kept)
    assert ("No held-out samples" in words) == (not {"evaluations", "evaluation.jsonl"} <= set(kept))
    assert ("No rollouts were saved" in words) == ("rollouts" not in kept)


def test_numbers_that_are_not_finite(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[5] |= {"update/grad_norm": "NaN", "update/loss": "Infinity", "entropy/mean": None}
    write_lines(run / "metrics.jsonl", rows)
    entry = inspected(
        "ab",
        ["a", "b"],
        teacher_log_prob=[-math.inf, -1.0],
        delta=[-math.inf, math.nan],
        omega=[math.nan, 0.5],
        tau=math.nan,
    )
    (run / "inspect" / "step_000001.json").write_text(json.dumps([entry]))
    write_lines(
        run / "watch.jsonl",
        [{"step": 6, "time": 1.0, "condition": "non_finite", "action": "warn", "text": "step 6, non_finite: <b>"}],
    )
    text, page, data = load_page(run)
    words = page.text()
    assert "Warnings of the watch" in words and "step 6, non_finite: <b>" in words
    assert "1 values were NaN or infinite" in words
    shown = data["rollouts"][0]
    assert (shown["d"], shown["w"], shown["q"][0], shown["tau"]) == (["−∞", "NaN"], ["NaN", 0.5], 0, "NaN")


def test_the_size_stays_bounded(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    noise = random.Random(0)
    write_lines(run / "metrics.jsonl", [metrics(step, noise) for step in range(1, 3001)])
    long = "word " * 8000
    for step in (1, 2, 3):
        entries = [inspected(long, ["word "] * 8000) for _ in range(20)]
        (run / "inspect" / f"step_{step:06d}.json").write_text(json.dumps(entries))
        write_lines(
            run / "rollouts" / f"step_{step:06d}.jsonl",
            [rollout(long, group=i // 16, sample=i % 16) for i in range(64)],
        )
    text, page, data = load_page(run)
    assert len(text) < 5_000_000
    shown = sum(len(rollout["t"]) for rollout in data["rollouts"])
    assert TOKENS_IN_ALL <= shown <= TOKENS_IN_ALL + 50
    assert {len(rollout["t"]) for rollout in data["rollouts"][:-1]} == {1500} and data["rollouts"][0]["length"] == 8000
    assert "32 of about 60 rollouts" in page.text() and "About 28 are left out." in page.text()
    assert "more characters in the file" in data["groups"]["best"][0]["samples"][0]["text"]


def test_an_unwritable_run_is_refused_clearly(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    old = write_report([run]).read_text()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*report.html: No space left on device"):
        write_report([run])
    assert (run / "report.html").read_text() == old
    assert not list(run.glob(".report.html*"))
