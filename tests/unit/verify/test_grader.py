from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dasd_megatron.config import VerifyConfig
from dasd_megatron.verify import Grader, GraderError, Verdict
from dasd_megatron.verify import grader as grader_module
from dasd_megatron.verify.symbolic import MEMORY_LIMIT_BYTES

REPOSITORY = Path(__file__).parents[3]
# To find the sine, the power is computed as an integer, in C, for far longer than any test runs.
HANGS = r"\sin(9^{9^{9}})"
ALGEBRA = (r"\boxed{x+x}", "2x")
# Two answers in a row may each cost a worker, and the next one waits until both have started anew.
BUSY_SECONDS = 6.0


def workers() -> list:
    return [child for child in multiprocessing.active_children() if child.name == "pebble_pool_worker"]


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def grader():
    with Grader(VerifyConfig(workers=1, timeout_seconds=1.0)) as grader:
        yield grader
    assert workers() == []


def test_plain_answers_start_no_worker(grader):
    verdicts = grader.grade(["#### 12", r"\boxed{-4}", "= 12", "#### 3+9"], ["12", "4", "12", "12"])
    assert verdicts == [
        Verdict(True, "12", False),
        Verdict(False, "-4", False),
        Verdict(False, None, False),
        Verdict(False, "3+9", False),
    ]
    assert workers() == []


def test_algebra_is_graded_in_workers():
    answers = [
        (r"\frac{1}{2}", "0.5"),
        ("x+1", "1+x"),
        ("x+1", "x+2"),
        ("2^3", "8"),
        (r"\text{B}", "B"),
        ("(1,2)", "(2,1)"),
        (r"\frac{", "1"),
    ]
    # Time enough on a busy machine: the limit has tests of its own.
    with Grader(VerifyConfig(workers=1, timeout_seconds=20)) as grader:
        verdicts = grader.grade(
            [f"#### {predicted}" for predicted, _ in answers], [expected for _, expected in answers]
        )
        assert len(workers()) == 1
    assert [verdict.correct for verdict in verdicts] == [True, True, False, True, True, False, False]
    assert not any(verdict.timed_out for verdict in verdicts)


def test_workers_import_no_torch(grader):
    grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    (worker,) = workers()
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()


def test_hanging_answer_is_killed_at_the_limit_and_others_are_graded(grader):
    grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    started = time.monotonic()
    verdicts = grader.grade([f"\\boxed{{{HANGS}}}", ALGEBRA[0], f"\\boxed{{{HANGS}}}"], ["7", ALGEBRA[1], "7"])
    assert time.monotonic() - started < 5
    assert verdicts == [Verdict(False, HANGS, True), Verdict(True, "x+x", False), Verdict(False, HANGS, True)]


def test_a_worker_has_a_limit_of_memory(grader):
    grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    (worker,) = workers()
    (line,) = re.findall("Max address space +([0-9]+)", Path(f"/proc/{worker.pid}/limits").read_text())
    assert int(line) == MEMORY_LIMIT_BYTES


NASTY = {
    "40,000 digits": "\\boxed{" + "9" * 40_000 + "}",
    "40,000 digits and a letter": "\\boxed{" + "9" * 40_000 + "x}",
    "a tower of powers": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "a long power": f"\\boxed{{{HANGS}}}",
    "a factorial": "\\boxed{99999999!}",
    "a factorial of a power": "\\boxed{(10^{9})!}",
    "a power of a power": "\\boxed{2^{2^{40}}}",
    "a sum of 10^12 terms": "\\boxed{\\sum_{k=1}^{10^{12}} k}",
    "10,000 fractions": "\\boxed{" + r"\frac{1}{" * 10_000 + "2" + "}" * 10_000 + "}",
    "a nest of braces": "\\boxed{" + "{" * 20_000 + "}" * 20_000 + "}",
    "a nest of powers": "\\boxed{" + "x^{" * 5_000 + "}" * 5_000 + "}",
    "a nest of fractions": "\\boxed{" + r"\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "unbalanced braces": "\\boxed{" * 100_000,
    "closing braces": r"\boxed{" + "}" * 100_000,
    "1 MB of text": "the answer is " * 75_000,
    "1 MB in a box": "\\boxed{" + "lorem ipsum " * 87_000 + "}",
    "1 MB of marks": "#### 7\n" * 150_000,
    "1 MB of signs": "\\boxed{" + "-" * 1_000_000 + "7}",
    "brackets": "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "digits and commas": "\\boxed{" + "1,000" * 8_000 + "}",
}


@pytest.mark.parametrize(
    "settings",
    [VerifyConfig(workers=2), VerifyConfig(workers=2, timeout_seconds=1.5, max_answer_chars=2_000_000)],
    ids=["default", "long answers graded"],
)
def test_nasty_answers_are_decided_in_time_and_disturb_nobody(settings):
    """Each is decided or given up within its time and a little, which makes 3 s by default, long answers graded or
    not."""
    assert VerifyConfig().timeout_seconds == 2.5
    with Grader(settings) as grader:
        grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
        for name, response in NASTY.items():
            started = time.monotonic()
            verdict, other = grader.grade([response, ALGEBRA[0]], ["8", ALGEBRA[1]])
            seconds = time.monotonic() - started
            assert seconds < settings.timeout_seconds + 0.5 + BUSY_SECONDS, f"{name}: {seconds:.2f} s"
            assert not verdict.correct, name
            assert other == Verdict(True, "x+x", False), name


def test_a_worker_that_does_not_react_to_termination_is_killed(grader):
    grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    (worker,) = workers()
    before = cpu_seconds(worker.pid)
    with ThreadPoolExecutor(1) as executor:
        verdict = executor.submit(grader.grade, [f"#### {HANGS}"], ["7"])
        assert wait_until(lambda: cpu_seconds(worker.pid) > before + 0.2)
        os.kill(worker.pid, signal.SIGSTOP)
        assert verdict.result(timeout=20) == [Verdict(False, HANGS, True)]
    assert not alive(worker.pid)
    assert grader.grade(["#### x+y"], ["y+x"]) == [Verdict(True, "x+y", False)]


def test_length_cap_comes_before_grading():
    with Grader(VerifyConfig(workers=1, max_answer_chars=10)) as grader:
        started = time.monotonic()
        assert grader.grade(
            ["#### " + "9" * 40_000 + "x", "#### " + "0" * 10 + "1", "#### " + "0" * 9 + "1"], ["1", "1", "1"]
        ) == [
            Verdict(False, None, False),
            Verdict(False, None, False),
            Verdict(True, "0" * 9 + "1", False),
        ]
        assert time.monotonic() - started < 1
        assert workers() == []


def test_a_worker_killed_while_idle_is_replaced(grader):
    grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    (worker,) = workers()
    os.kill(worker.pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(worker.pid))
    assert grader.grade(["#### x+y"], ["y+x"]) == [Verdict(True, "x+y", False)]


def kill_workers_while(done: threading.Event, seen: set[int], limit: int) -> None:
    """Kill each busy worker once it has started to compute, ``limit`` times."""
    while not done.is_set() and len(seen) < limit:
        for worker in workers():
            if worker.pid not in seen and len(seen) < limit and cpu_seconds(worker.pid) > 1.2:
                seen.add(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_killed_twice_over_one_answer_costs_only_that_answer():
    with Grader(VerifyConfig(workers=1, timeout_seconds=20)) as grader:
        done, killed = threading.Event(), set()
        killer = threading.Thread(target=kill_workers_while, args=(done, killed, 2))
        killer.start()
        try:
            verdicts = grader.grade([f"#### {HANGS}", ALGEBRA[0]], ["7", ALGEBRA[1]])
        finally:
            done.set()
            killer.join()
        assert len(killed) == 2
        assert verdicts == [Verdict(False, HANGS, True), Verdict(True, "x+x", False)]


def test_no_workers_configured_means_plain_comparison_only():
    with Grader(VerifyConfig(workers=0)) as grader:
        assert grader.grade(["#### 12.0", ALGEBRA[0]], ["12", ALGEBRA[1]]) == [
            Verdict(True, "12.0", False),
            Verdict(False, "x+x", False),
        ]
        assert workers() == []


def test_threads_may_grade_at_once(grader):
    with ThreadPoolExecutor(4) as executor:
        verdicts = list(executor.map(lambda i: grader.grade([f"#### x+{i}"], [f"{i}+x"])[0], range(1, 13)))
    assert verdicts == [Verdict(True, f"x+{i}", False) for i in range(1, 13)]
    assert len(workers()) == 1


def test_equal_pairs_are_compared_once(grader):
    started = time.monotonic()
    verdicts = grader.grade([f"#### {HANGS}"] * 30, ["7"] * 30)
    assert verdicts == [Verdict(False, HANGS, True)] * 30
    # One by one they would take 30 s.
    assert time.monotonic() - started < 15


def test_a_closed_grader_and_unequal_lengths_are_refused():
    grader = Grader(VerifyConfig())
    with pytest.raises(ValueError, match="2 responses, but 1 expected"):
        grader.grade(["a", "b"], ["a"])
    grader.close()
    grader.close()
    with pytest.raises(GraderError, match="closed"):
        grader.grade(["#### 1"], ["1"])


@pytest.mark.parametrize(("field", "value"), [("workers", -1), ("timeout_seconds", 0.0), ("max_answer_chars", 0)])
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"verify.{field}"):
        Grader(VerifyConfig(**{field: value}))


def test_workers_that_cannot_start_stop_the_run(tmp_path, monkeypatch):
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken installation')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(grader_module, "STARTUP_TIMEOUT_SECONDS", 20.0)
    with Grader(VerifyConfig(workers=1)) as grader, pytest.raises(GraderError, match="math-verify"):
        grader.grade([ALGEBRA[0]], [ALGEBRA[1]])
    assert workers() == []


SCRIPT = """
    import multiprocessing, os, sys, threading, time
    open("imported", "a").write(f"{__name__}\\n")
    from dasd_megatron.config import VerifyConfig
    from dasd_megatron.verify import Grader

    if __name__ == "__main__":
        with Grader(VerifyConfig(workers=2, timeout_seconds=1.0)) as grader:
            assert grader.grade([r"#### x+x"], ["2x"])[0].correct
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            ENDING
"""


def run_script(tmp_path: Path, ending: str, **environment: str) -> subprocess.Popen:
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("ENDING", ending))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)


def test_workers_do_not_import_the_main_module_and_end_with_it(tmp_path):
    # The environment is what torchrun sets.
    script = run_script(
        tmp_path, "pass", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0
    assert (tmp_path / "imported").read_text() == "__main__\n"
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2 and not any(map(alive, pids))


def test_an_exception_or_exit_without_close_leaves_no_worker(tmp_path):
    script = run_script(tmp_path, "grader.__exit__ = None; sys.exit(3)")
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 3
    assert output.split() and not any(alive(int(pid)) for pid in output.split())


def test_no_worker_outlives_a_killed_trainer(tmp_path):
    hang = (
        f"threading.Thread(target=grader.grade, args=([r'#### {HANGS}'], ['7'])).start(); time.sleep(0.3); "
        "os.kill(os.getpid(), 9)"
    )
    script = run_script(tmp_path, hang)
    output, _ = script.communicate(timeout=60)
    assert script.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(alive, pids)), seconds=15)
