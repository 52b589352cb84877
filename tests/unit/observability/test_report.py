from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dasd_megatron.files import RunDirectoryError
from dasd_megatron.observability import report, run_files
from dasd_megatron.observability.report import write_report
from dasd_megatron.observability.run_files import ReportError, halving_order

HOSTILE = (
    '</pre></script><script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>'
    '&amp; "quoted" \u202etxt\x1b[2J\x00 {{ 7*7 }} \ud800'
)
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """The page's elements, with their attributes and the text inside them; checks that elements are nested soundly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1][0] if self.open else "", data))

    def text(self, *tags: str) -> str:
        return "".join(data for tag, data in self.texts if (tag in tags if tags else tag not in ("script", "style")))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def metrics(step: int, noise: random.Random) -> dict:
    accuracy, entropy = 0.5 + 0.01 * step, 0.4
    return {
        "step": step,
        "time": 1.7e9 + step,
        "reward/mean": accuracy,
        "reward/accuracy": accuracy,
        "reward/groups_all_correct": 0.2,
        "reward/groups_all_wrong": 0.1,
        "response/length_mean": 20.0,
        "response/length_max": 60,
        "response/truncated_share": 0.0,
        "entropy/mean": entropy,
        "entropy/pushed": 3 * entropy,
        "entropy/pulled": entropy / 3,
        "credit/pushed_share": 0.2,
        "credit/omega_mean": 0.1,
        "credit/omega_std": 0.2,
        "credit/omega_min": -0.6,
        "credit/omega_max": 0.5,
        "credit/delta_mean": -0.02,
        "credit/delta_abs_mean": 0.3,
        "rollout/kl": 1e-7 * noise.random(),
        "update/loss": 0.1,
        "update/clip_share": 0.01,
        "update/grad_norm": 1.0,
        "update/lr": 1e-4,
        "verify/timeouts": 1,
        "throughput/tokens_per_second": 900.0,
        "seconds/rollout": 1.0,
        "seconds/verify": 0.1,
        "seconds/score": 0.5,
        "seconds/update": 1.0,
        "seconds/sync": 0.2,
        "seconds/checkpoint": 0.0,
        "seconds/total": 3.0,
        "weight_version": str(step),
    }


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def inspected(text: str, tokens: list[str], **changes) -> dict:
    count = len(tokens)
    entry = {
        "problem_id": "p1",
        "problem": "What is 1 + 1?",
        "text": text,
        "reward": 1.0,
        "advantage": 0.5,
        "tokens": tokens,
        "tau": 0.5,
        "sigma": 0.2,
    }
    entry |= {"entropy": [0.25] * count, "delta": [-0.125] * count, "omega": [(-1) ** i * 0.4 for i in range(count)]}
    entry |= {"token_advantage": [0.5 + 0.1 * i for i in range(count)]}
    entry |= {"student_log_prob": [math.log(0.5)] * count, "teacher_log_prob": [math.log(0.75)] * count}
    return entry | changes


def rollout(text: str, **changes) -> dict:
    row = {
        "group": 0,
        "sample": 0,
        "problem_id": "p1",
        "problem": "What is 1 + 1?",
        "expected_answer": "2",
        "reference_solution": "1 + 1 = 2",
    }
    row |= {
        "text": text,
        "finish_reason": "stop",
        "reward": 1.0,
        "predicted_answer": "2",
        "timed_out": False,
        "weight_version": "0",
    }
    return row | changes


def make_run(path: Path, steps: int = 12, text: str = "1+1=2\n\\boxed{2}", tokens: list[str] | None = None) -> Path:
    noise = random.Random(0)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        "run:\n  name: toy-run\n  seed: 3\n  steps: 12\nalgorithm:\n  name: dasd\n  beta: 0.1\nbatch:\n  groups: 4\n"
    )
    (path / "environment.json").write_text(json.dumps({"git_revision": "abc123", "packages": {"torch": "2.13.0"}}))
    lines(path / "metrics.jsonl", [metrics(step, noise) for step in range(1, steps + 1)])
    lines(
        path / "warm_start.jsonl",
        [{"step": step, "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0} for step in range(1, 9)],
    )
    results = {
        "num_problems": 8,
        "num_samples": 2,
        "pass@1": 0.5,
        "pass@2": 0.75,
        "maj@2": 0.5,
        "response/length_mean": 20.0,
        "nll_mean": 0.3,
        "seconds": 1.0,
    }
    lines(
        path / "evaluation.jsonl",
        [
            {"step": 0, "label": "before", "avg@2": 0.5, **results},
            {"step": steps, "label": "after", "avg@2": 0.75, **results},
        ],
    )
    for label, step, right in (("before", 0, 1), ("after", steps, 2)):
        samples = [
            {
                "problem_id": f"h{p}",
                "sample": s,
                "problem": f"What is {p} + 1?",
                "expected_answer": str(p + 1),
                "generation": text,
            }
            | {"predicted_answer": str(p + 1), "symbolic_correct": s < right, "finish_reason": "stop", "num_tokens": 9}
            for p in range(8)
            for s in range(2)
        ]
        lines(path / "evaluations" / f"{label}-step_{step:06d}" / "samples.jsonl", samples)
    for step in range(1, steps + 1):
        lines(path / "rollouts" / f"step_{step:06d}.jsonl", [rollout(text, sample=i) for i in range(5)])
        (path / "inspect").mkdir(exist_ok=True)
        (path / "inspect" / f"step_{step:06d}.json").write_text(json.dumps([inspected(text, tokens or list(text))]))
    return path


def load(*runs: Path, output: Path | None = None) -> tuple[str, Page, dict]:
    """The page as text, as elements, and the data that its script shows."""
    text = write_report(runs, output).read_text(encoding="utf-8")
    page = Page(text)
    (data,) = [data for tag, data in page.texts if tag == "script" and data.startswith("{")]
    return text, page, json.loads(data)


def test_a_whole_run_has_every_section(tmp_path):
    text, page, data = load(make_run(tmp_path / "run"))
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


def test_charts_of_some_runs_only(tmp_path):
    run = make_run(tmp_path / "run")
    rare = {"Divergence from the teacher", "Updates skipped"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for fields, shown in (
        ({"update/skipped": 0}, set()),
        ({"update/skipped": 1}, {"Updates skipped"}),
        ({"update/divergence": 0.1}, {"Divergence from the teacher"}),
    ):
        lines(run / "metrics.jsonl", [*rows[:-1], {**rows[-1], **fields}])
        _, page, data = load(run)
        assert {attributes["aria-label"] for attributes in page.all("svg")} & rare == shown


def test_tokens_carry_their_numbers(tmp_path):
    _, _, data = load(make_run(tmp_path / "run", text="a\nb", tokens=["a", "\n", "b"]))
    shown = data["rollouts"][0]
    assert (shown["t"], shown["h"], shown["d"], shown["w"]) == (
        ["a", "\n", "b"],
        [0.25] * 3,
        [-0.125] * 3,
        [0.4, -0.4, 0.4],
    )
    assert (shown["a"], shown["p"], shown["q"]) == ([0.5, 0.6, 0.7], [0.5] * 3, [0.75] * 3)
    assert (shown["tau"], shown["sigma"], shown["advantage"], shown["whole"]) == (0.5, 0.2, 0.5, True)


def test_runs_without_advantages_of_tokens_show_the_verifiers(tmp_path):
    run = make_run(tmp_path / "run")
    entry = inspected("ab", ["a", "b"])
    del entry["token_advantage"]
    (run / "inspect" / "step_000001.json").write_text(json.dumps([entry]))
    _, _, data = load(run)
    assert data["rollouts"][0]["a"] == [0.5, 0.5] and not data["rollouts"][0]["whole"] and data["rollouts"][1]["whole"]


def test_the_heat_map_shows_the_sample_behind_it(tmp_path):
    run = make_run(tmp_path / "run")
    lines(
        run / "rollouts" / "step_000001.jsonl",
        [rollout("other"), rollout("1+1=2\n\\boxed{2}", predicted_answer="the-answer", finish_reason="length")],
    )
    _, _, data = load(run)
    assert (data["rollouts"][0]["answer"], data["rollouts"][0]["end"]) == ("the-answer", "length")


def test_best_and_worst_groups(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    noise = random.Random(3)
    means = {}
    for step in (1, 2):
        rows = []
        for group in range(50):
            rewards = [float(noise.random() < 0.5) for _ in range(6)]
            means[step, group] = sum(rewards) / 6
            rows += [
                rollout(
                    f"sample {i} of {group}",
                    group=group,
                    sample=i,
                    reward=reward,
                    response_ids=[0] * (i + 1),
                    problem=f"p{step}-{group}",
                )
                for i, reward in enumerate(rewards)
            ]
        noise.shuffle(rows)
        lines(run / "rollouts" / f"step_{step:06d}.jsonl", rows)
    _, page, data = load(run)
    found = {end: [(group["step"], group["group"]) for group in data["groups"][end]] for end in ("best", "worst")}
    assert found["best"] == sorted(means, key=lambda key: (-means[key], -key[0], key[1]))[:30]
    assert found["worst"] == sorted(means, key=lambda key: (means[key], -key[0], key[1]))[:30]
    first = data["groups"]["best"][0]
    assert first["count"] == 6 and len(first["samples"]) == 4 and first["tokens"] == 21 and len(first["rewards"]) == 6
    assert "Of 100 groups in 2 saved steps, the 60 with the highest or lowest mean reward" in page.text()
    assert "40 groups between them are left out" in page.text()


def test_large_rollouts_are_read_in_part_and_it_is_said(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=9)
    size = (run / "rollouts" / "step_000001.jsonl").stat().st_size
    groups = run_files.extreme_groups(run_files.read_run(run), max_bytes=3 * size)
    assert (groups.steps_read, groups.steps_saved, groups.count) == (3, 9, 3)
    assert {group["step"] for group in groups.best + groups.worst} == {1, 5, 9}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 101])
def test_any_first_part_of_the_order_is_spread_evenly(count):
    order = halving_order(count)
    assert sorted(order) == list(range(count))
    for length in range(2, count):
        gaps = [
            later - earlier for earlier, later in zip(sorted(order[:length]), sorted(order[:length])[1:], strict=False)
        ]
        assert max(gaps) <= 4 * count / length


def test_phases_have_their_share_and_their_tokens(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    row = {**metrics(1, random.Random(0)), "throughput/tokens_per_second": 100.0, "seconds/health": 0.1}
    lines(run / "metrics.jsonl", [row])
    rows = {row["phase"]: row for row in report._phase_table([run_files.read_run(run)])}
    # 300 tokens; 3 s of the step and 0.2 s of sync.
    assert rows["rollout"]["rate"] == "300" and rows["sync"]["rate"] == "1,500" and rows["all"]["seconds"] == "3.200"
    assert (
        rows["rollout"]["share"] == "31.2%"
        and rows["health"]["seconds"] == "0.100"
        and rows["other"]["seconds"] == "0.300"
        and "checkpoint" not in rows
    )


# ---- several runs
# ------------------------------------------------------------------------------------------------------------------------


def two_runs(tmp_path: Path) -> list[Path]:
    first, second = make_run(tmp_path / "a", steps=12), make_run(tmp_path / "b", steps=30)
    (second / "config.yaml").write_text(
        "run:\n  name: other\n  seed: 3\n  steps: 40\n  dir: elsewhere\nalgorithm:\n  name: grpo\nbatch:\n  groups: 4\n"
    )
    return [first, second]


def test_runs_are_overlaid_each_in_its_colour(tmp_path):
    _, page, data = load(*two_runs(tmp_path), output=tmp_path / "page.html")
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
    assert {one["run"] for one in data["rollouts"]} == {0, 1} == {one["run"] for one in data["groups"]["worst"]}


def test_only_what_differs_is_listed(tmp_path):
    runs = [run_files.read_run(path) for path in two_runs(tmp_path)]
    assert report.differences(runs) == [
        ("algorithm.beta", ["0.1", "–"]),
        ("algorithm.name", ["dasd", "grpo"]),
        ("run.name", ["toy-run", "other"]),
        ("run.steps", ["12", "40"]),
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / name / last) for name, last in (("x", "1"), ("x", "2"), ("y", "2"))]
    _, _, data = load(*paths, output=tmp_path / "page.html")
    assert [run["label"] for run in data["runs"]] == ["toy-run 1", "toy-run 2 (2)", "toy-run 2 (3)"]


def test_runs_that_lack_parts_still_share_a_page(tmp_path):
    first, second = two_runs(tmp_path)
    for name in ("evaluation.jsonl", "metrics.jsonl", "warm_start.jsonl"):
        (second / name).unlink()
    for folder in ("inspect", "rollouts", "evaluations"):
        (second / folder).rename(tmp_path / f"gone-{folder}")
    _, page, data = load(first, second, output=tmp_path / "page.html")
    assert {one["run"] for one in data["rollouts"]} == {0}
    assert "not finished · step 0 of 40" in page.text()


def test_many_long_runs_stay_small(tmp_path):
    noise = random.Random(0)
    paths = []
    for place in range(report.MOST_RUNS):
        path = make_run(tmp_path / f"run{place}", steps=2)
        lines(
            path / "metrics.jsonl", [metrics(step, noise) | {"entropy/mean": noise.random()} for step in range(1, 1001)]
        )
        paths.append(path)
    text, page, _ = load(*paths, output=tmp_path / "page.html")
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
    lines(run / "metrics.jsonl", [{**row, "weight_version": HOSTILE, HOSTILE: 1.0} for row in rows])
    text, page, data = load(run)
    scripts = [part for tag, part in page.texts if tag == "script"]
    assert len(page.all("script")) == len(scripts) == 2 and "<" not in scripts[0] and "alert" not in scripts[1]
    assert all(HOSTILE[:20] in str(data[part]) for part in ("rollouts", "groups"))
    assert page.all("img") == [] and page.all("link") == [] and page.all("iframe") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert 'alert("x")' in page.text("pre") and "‹U+202E›txt‹U+001B›[2J‹U+0000› {{ 7*7 }} ‹U+D800›" in page.text("pre")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e]", text)


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
    text, page, data = load(make_run(tmp_path / "run"))
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
    _, page, data = load(run)
    words = page.text()
    assert ("No evaluation yet" in words) == ("evaluation.jsonl" not in kept)
    assert ("No training step yet" in words) == ("metrics.jsonl" not in kept)
    assert ("No token statistics" in words) == ("inspect" not in kept)
    assert ("No held-out samples" in words) == (not {"evaluations", "evaluation.jsonl"} <= set(kept))
    assert ("No rollouts were saved" in words) == ("rollouts" not in kept)


def test_a_run_that_was_killed(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = (run / "evaluation.jsonl").read_text().splitlines()
    (run / "evaluation.jsonl").write_text(rows[0] + "\n" + rows[1][:20])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "reward/acc')
    (run / "inspect" / "step_000005.json").write_text('[{"problem_id": "p')
    with open(run / "rollouts" / "step_000005.jsonl", "a") as file:
        file.write('{"group": ')
    _, page, data = load(run)
    words = page.text()
    assert "not finished · step 5 of 12" in words and "no comparison yet" in words
    assert "inspect/step_000005.json could not be read" in words and "1 unreadable lines were left out" in words


def test_a_run_that_was_made_longer_is_not_finished(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    lines(run / "evaluation.jsonl", [row | {"step": min(row["step"], 3)} for row in rows])
    assert "not finished · step 5 of 12" in load(run)[1].text()


def test_rewards_that_are_no_numbers_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    path = run / "rollouts" / "step_000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, reward in zip(rows, ("NaN", "Infinity", 10**400, [1]), strict=False):
        row["reward"] = reward
    rows[-1]["group"] = [0]
    lines(path, rows)
    load(run)


def test_damage_is_listed_not_hidden(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [1,\n")
    (run / "environment.json").write_text("[1, 2]")
    (run / "warm_start.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    bad = [
        inspected("x", ["x"], omega=[0.1, 0.2]),
        inspected("x", ["x"]) | {"tokens": None},
        {"tokens": ["x"]},
        inspected("fine", ["fine"]),
    ]
    (run / "inspect" / "step_000001.json").write_text(json.dumps(bad))
    _, page, data = load(run)
    words = page.text()
    for part in (
        "config.yaml could not be read",
        "environment.json could not be read",
        "warm_start.jsonl: 1 unreadable lines",
        "inspect/step_000001.json, rollout 1 was left out",
        "inspect/step_000001.json, rollout 3 was left out",
    ):
        assert part in words, part
    assert [one["place"] for one in data["rollouts"] if one["step"] == 1] == [4]


def test_numbers_that_are_not_finite(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[5] |= {"update/grad_norm": "NaN", "update/loss": "Infinity", "entropy/mean": None}
    lines(run / "metrics.jsonl", rows)
    entry = inspected(
        "ab",
        ["a", "b"],
        teacher_log_prob=[-math.inf, -1.0],
        delta=[-math.inf, math.nan],
        omega=[math.nan, 0.5],
        tau=math.nan,
    )
    (run / "inspect" / "step_000001.json").write_text(json.dumps([entry]))
    lines(
        run / "watch.jsonl",
        [{"step": 6, "time": 1.0, "condition": "non_finite", "action": "warn", "text": "step 6, non_finite: <b>"}],
    )
    text, page, data = load(run)
    words = page.text()
    assert "Warnings of the watch" in words and "step 6, non_finite: <b>" in words
    assert "1 values were NaN or infinite" in words
    shown = data["rollouts"][0]
    assert (shown["d"], shown["w"], shown["q"][0], shown["tau"]) == (["−∞", "NaN"], ["NaN", 0.5], 0, "NaN")


def test_the_size_stays_bounded(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    noise = random.Random(0)
    lines(run / "metrics.jsonl", [metrics(step, noise) for step in range(1, 3001)])
    long = "word " * 8000
    for step in (1, 2, 3):
        entries = [inspected(long, ["word "] * 8000) for _ in range(20)]
        (run / "inspect" / f"step_{step:06d}.json").write_text(json.dumps(entries))
        lines(
            run / "rollouts" / f"step_{step:06d}.jsonl",
            [rollout(long, group=i // 16, sample=i % 16) for i in range(64)],
        )
    text, page, data = load(run)
    assert len(text) < 5_000_000
    shown = sum(len(rollout["t"]) for rollout in data["rollouts"])
    assert report.TOKENS_IN_ALL <= shown <= report.TOKENS_IN_ALL + 50
    assert {len(rollout["t"]) for rollout in data["rollouts"][:-1]} == {1500} and data["rollouts"][0]["length"] == 8000
    assert "32 of about 60 rollouts" in page.text() and "About 28 are left out." in page.text()
    assert "more characters in the file" in data["groups"]["best"][0]["samples"][0]["text"]


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ReportError, match="is not a directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(ReportError, match="holds no run"):
        write_report([tmp_path])


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
