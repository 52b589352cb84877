from __future__ import annotations

import io
import math
import re

import pytest

from dasd_megatron.observability.progress import ProgressDisplay, format_duration, format_step, summary_table

METRICS = {
    "step": 7,
    "reward/accuracy": 0.625,
    "entropy/mean": 0.31234,
    "response/length_mean": 18.25,
    "credit/pushed_share": 0.2,
    "update/grad_norm": 0.8431,
    "throughput/tokens_per_second": 4123.4,
    "seconds/total": 3.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_step_line_holds_the_headline():
    line = format_step(METRICS, 100, eta_seconds=279)
    assert line.startswith("step   7/100  ")
    for part in ("acc  62.5%", "H 0.312", "len   18.2", "push 20.0%", "|g| 0.843", "4,123 tok/s", "3.0s", "eta 4m39s"):
        assert part in line
    assert "acc" not in format_step({"step": 1}, 10)
    assert "nan" in format_step({**METRICS, "update/grad_norm": math.nan}, 100)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.42, "3.4s"), (59.97, "1m00s"), (125, "2m05s"), (4020, "1h07m"), (math.nan, "?")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def run_everything(display: ProgressDisplay) -> None:
    with display:
        with display.phase("data"):
            pass
        with display.phase("warm start", total=200) as phase:
            for step in range(200):
                phase.advance(loss=2.0 - step / 100)
        for step in range(1, 6):
            display.step({**METRICS, "step": step})
        display.warning("bad\x1b[2J\r\nnews\x07")


def test_a_log_file_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run_everything(ProgressDisplay(total_steps=5, stream=stream, lines_per_phase=10))
    text = stream.getvalue()
    lines = text.splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines)
    assert sum("step " in line and "acc" in line for line in lines) == 5
    assert 10 <= sum("warm start" in line for line in lines) <= 12
    assert any("warm start: 200/200 done in" in line for line in lines)
    assert any("WARNING: bad [2J news" in line for line in lines)
    assert "eta 12.0s" in next(line for line in lines if "step 1/5" in line)
    assert "eta 0.0s" in next(line for line in lines if "step 5/5" in line)


def test_a_log_file_of_another_encoding_does_not_stop_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ProgressDisplay(total_steps=1, stream=stream).message("δ and ω")
    assert raw.getvalue().endswith(b" ? and ?\n")


def test_a_terminal_gets_bars_and_the_same_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    display = ProgressDisplay(total_steps=5, stream=stream)
    assert display.live
    run_everything(display)
    text = visible(stream.getvalue())
    assert "\x1b" in stream.getvalue()
    assert "step 5/5  acc  62.5%" in text and "warm start: 200/200 done in" in text and "train" in text
    assert "[2J" in text and "\x1b[2J" not in stream.getvalue() and "\x07" not in text


def test_a_dumb_terminal_counts_as_a_log_file(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not ProgressDisplay(total_steps=5, stream=Terminal()).live


def test_a_failing_phase_says_so_and_lets_the_error_through():
    stream = io.StringIO()
    with (
        pytest.raises(KeyError),
        ProgressDisplay(total_steps=1, stream=stream) as display,
        display.phase("evaluate before", total=4) as phase,
    ):
        phase.advance(3)
        raise KeyError("x")
    assert "evaluate before: 3/4 stopped by an error after" in stream.getvalue()


def test_time_left_counts_from_the_last_steps():
    stream = io.StringIO()
    display = ProgressDisplay(total_steps=100, stream=stream)
    display.step({"step": 1, "seconds/total": 100.0})
    for step in range(2, 12):
        display.step({"step": step, "seconds/total": 2.0})
    assert stream.getvalue().splitlines()[-1].endswith("eta 2m58s")


def test_the_table_shows_before_after_and_difference(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    before = {
        "step": 0,
        "label": "before",
        "avg@16": 0.5,
        "pass@1": 0.5,
        "pass@16": 0.9,
        "pass@2": 0.6,
        "maj@16": 0.55,
        "response/length_mean": 20.0,
    }
    after = {
        "step": 100,
        "label": "after",
        "avg@16": 0.625,
        "pass@1": 0.625,
        "pass@16": 0.95,
        "pass@2": 0.7,
        "maj@16": 0.7,
        "response/length_mean": 18.5,
    }
    stream = io.StringIO()
    report = "/a/long/path/" + "x" * 150 + "/report.html"
    summary_table(before, after, {"Report": report, "Steps": 100}, stream=stream)
    text = stream.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert ["Avg@16", "50.0%", "62.5%", "+12.5", "points"] in rows
    assert ["Mean", "length", "20.0", "tokens", "18.5", "tokens", "-1.5", "tokens"] in rows
    assert [row[0] for row in rows if row and "@" in row[0]] == ["Avg@16", "Pass@1", "Pass@2", "Pass@16", "Maj@16"]
    assert ["Report", report] in rows and "\x1b" not in text


@pytest.mark.parametrize(
    ("before", "after", "row"),
    [(None, {"avg@4": 0.5}, "- 50.0% -"), ({"avg@4": 0.5}, None, "50.0% - -"), (None, None, "- - -")],
)
def test_the_table_of_a_run_without_evaluations(before, after, row):
    stream = io.StringIO()
    summary_table(before, after, {}, stream=stream)
    assert any(" ".join(line.split()).endswith(row) for line in stream.getvalue().splitlines())


def test_the_table_on_a_terminal_is_styled(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    summary_table({"avg@4": 0.5}, {"avg@4": 0.6}, {}, stream=stream)
    assert "\x1b[1m" in stream.getvalue() and "+10.0 points" in visible(stream.getvalue())
