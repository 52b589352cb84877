"""A command whose work fails says why and returns an exit status."""

from __future__ import annotations

import pytest

from dasd_megatron.errors import ConfigError, enumerate_names, first_line, printable, printable_lines, report_errors
from dasd_megatron.stopping import StopRequested, WatchStopped


class SharedError(ConfigError):
    """An error that every rank raises."""

    __module__ = "dasd_megatron.made_up"
    on_all_ranks = True


def failing(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "rank", "status", "text"),
    [
        (ConfigError("run.steps=-1"), None, 1, "dasd: error: run.steps=-1\n"),
        (ConfigError("run.steps=-1"), "0", 1, "dasd: error: run.steps=-1\n"),
        (ConfigError("run.steps=-1"), "3", 1, "dasd: error on rank 3: run.steps=-1\n"),
        (SharedError("gone"), "0", 1, "dasd: error: gone\n"),
        (SharedError("gone"), "3", 1, ""),
        (StopRequested("a signal"), "0", 75, "dasd: a signal\n"),
        (StopRequested("a signal"), "3", 75, ""),
        (WatchStopped("entropy_low"), None, 76, "dasd: entropy_low\n"),
    ],
)
def test_errors_that_can_be_mended_are_one_line(
    error: Exception,
    rank: str | None,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert report_errors(failing(error)) == status
    assert capfd.readouterr() == ("", text)


def test_work_that_ends_has_status_0(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    assert report_errors(lambda: done.append(1)) == 0
    assert done == [1] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), SystemExit(3)])
def test_defects_keep_their_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        report_errors(failing(error))


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_names_as_people_list_them() -> None:
    assert enumerate_names(["a", "b", "c"], "or") == "a, b or c"
    assert enumerate_names(["a", "b"], "and") == "a and b"
    assert enumerate_names(["a"], "or") == "a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äöü 数 🙂", "plain äöü 数 🙂"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("a\r\n\tb\x00\x07c", "a b c"),
        ("\x9b31m \u202ereversed\u2028line", "31m  reversed line"),
        ("half \ud800 pair", "half   pair"),
    ],
)
def test_printable_text_moves_no_cursor(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_what_unicode_has_not_assigned_is_not_printed() -> None:
    assert printable("a\U00018cd6\xadb") == "a b"


def test_printable_text_is_cut() -> None:
    assert printable("x" * 10**6, 10) == "x" * 10 + "..." and printable("x" * 10, 10) == "x" * 10


def test_lines_stay_lines() -> None:
    assert printable_lines("a\n\tb\x1b[2J\n  c\r\n") == "a\n        b [2J\n  c\n"


def test_an_error_on_the_terminal_is_printable(capfd: pytest.CaptureFixture) -> None:
    assert report_errors(failing(ConfigError("bad \x1b]0;title\x07 \ud800 file"))) == 1
    assert capfd.readouterr().err == "dasd: error: bad  ]0;title    file\n"
