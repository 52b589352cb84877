from __future__ import annotations

import re
from pathlib import Path

import pytest

from dasd_megatron.observability.metric_docs import FILES
from dasd_megatron.observability.metric_pages import explain, find_metric, markdown

ROOT = Path(__file__).parents[3]


def test_the_page_is_that_of_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown(), (
        "python -m dasd_megatron.observability.metric_docs > docs/metrics.md"
    )


@pytest.mark.parametrize("file", FILES)
def test_names_are_named_once_and_explained(file):
    names = [metric.name for metric in FILES[file]]
    assert len(names) == len(set(names))
    for metric in FILES[file]:
        assert re.fullmatch(r"([a-z]+/)?([a-z0-9_]+(@?<k>)?|<name>)", metric.name), metric.name
        assert metric.unit and metric.meaning
        assert not metric.action or metric.healthy, f"{metric.name}: what to do outside which range?"


def test_what_not_every_run_writes_is_in_the_code():
    """The metrics that every run writes are compared with a run, in tests/integration/test_cli.py."""
    source = "".join(
        path.read_text()
        for path in (ROOT / "dasd_megatron").rglob("*.py")
        if path.name not in ("metric_docs.py", "curves.py")
    )
    literals = set(re.findall(r'"[^"\n]*"', source))
    conditional = [
        metric.name.removesuffix("<name>") for metrics in FILES.values() for metric in metrics if metric.when
    ]
    assert len(conditional) > 10
    # A loss reports its means without the group: "clip_share" becomes update/clip_share.
    assert [name for name in conditional if not {f'"{name}"', f'"{name.removeprefix("update/")}"'} & literals] == []


def test_advice_names_fields_that_exist():
    from dasd_megatron.config import known_fields

    fields = known_fields()
    sections = {name.split(".")[0] for name in fields if "." in name}
    texts = " ".join(
        f"{metric.healthy} {metric.action} {metric.when}" for metrics in FILES.values() for metric in metrics
    )
    named = [name for name in re.findall(r"\b[a-z_]+\.[a-z0-9_]+\b", texts) if name.split(".")[0] in sections]
    assert len(named) > 30
    assert [
        name for name in named if name not in fields and not any(field.startswith(f"{name}.") for field in fields)
    ] == []


def test_numbers_in_names_match_any():
    assert (
        find_metric("avg@16", "evaluation.jsonl").name == "avg@<k>" and find_metric("avg@x", "evaluation.jsonl") is None
    )
    assert find_metric("measure/thinks").name == "measure/<name>" and find_metric("measure/") is None
    assert explain("reward/mean", "nonsense").startswith("reward/mean: mean reward")
