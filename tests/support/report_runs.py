"""Run directories made in code for tests of the report, and the page taken apart."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

from dasd_megatron.observability.report.page import write_report

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


def write_lines(path: Path, rows: list[dict]) -> None:
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
    write_lines(path / "metrics.jsonl", [metrics(step, noise) for step in range(1, steps + 1)])
    write_lines(
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
    write_lines(
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
        write_lines(path / "evaluations" / f"{label}-step_{step:06d}" / "samples.jsonl", samples)
    for step in range(1, steps + 1):
        write_lines(path / "rollouts" / f"step_{step:06d}.jsonl", [rollout(text, sample=i) for i in range(5)])
        (path / "inspect").mkdir(exist_ok=True)
        (path / "inspect" / f"step_{step:06d}.json").write_text(json.dumps([inspected(text, tokens or list(text))]))
    return path


def load_page(*runs: Path, output: Path | None = None) -> tuple[str, Page, dict]:
    """The page as text, as elements, and the data that its script shows."""
    text = write_report(runs, output).read_text(encoding="utf-8")
    page = Page(text)
    (data,) = [data for tag, data in page.texts if tag == "script" and data.startswith("{")]
    return text, page, json.loads(data)


def two_runs(tmp_path: Path) -> list[Path]:
    first, second = make_run(tmp_path / "a", steps=12), make_run(tmp_path / "b", steps=30)
    (second / "config.yaml").write_text(
        "run:\n  name: other\n  seed: 3\n  steps: 40\n  dir: elsewhere\nalgorithm:\n  name: grpo\nbatch:\n  groups: 4\n"
    )
    return [first, second]
