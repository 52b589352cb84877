"""The order of what the loop does around the steps, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dasd_megatron.config import Config, load_config
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.stopping import StopRequested, WatchStopped
from dasd_megatron.training import loop
from dasd_megatron.training.checkpoint_search import TrainerState
from dasd_megatron.training.decisions import Signals
from dasd_megatron.training.rollout_plane import RolloutsUnavailableError, ServersUnavailableError

STEPS = 4


class FakeRun:
    """A run without ranks, model or servers: ``events`` are what the loop did, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        self.config: Config = load_config(
            ["experiment=quickstart", f"run.steps={STEPS}", "checkpoint.every=2", "evaluation.every=1", *overrides]
        )
        self.events: list[str] = []
        self.skipped_steps: set[int] = set()
        self.actions: dict[int, str] = {}
        self.stop_after: int | None = None
        self.unavailable_at: int | None = None
        self.state = TrainerState()
        self.trainer = SimpleNamespace(
            config=self.config,
            paths=RunPaths(Path("run")),
            state=self.state,
            rollout_writer=SimpleNamespace(failed=False, finish=lambda: None),
            saver=SimpleNamespace(stalled=0.0, pending=False, is_writing=lambda: False, finish=lambda: None),
            logger=None,
            learner=SimpleNamespace(model=None),
            memory=SimpleNamespace(measures=dict),
            plane=SimpleNamespace(regain_weights=lambda: self._note("regain weights")),
            hf_files=Path("hf"),
            failed_evaluations=0,
        )
        replaced = {
            "open_trainer": self._open,
            "train_step": self._step,
            "begin_checkpoint": lambda trainer: self._note("save"),
            "save_last_step": self._save_last_step,
            "roll_back": self._roll_back,
            "export_model": lambda *_, **__: self._note("export"),
            "flags_of_all_ranks": self._signals,
            "_sync": lambda trainer: self._note("sync") or 0.0,
            "_evaluate": lambda trainer, label: self._note(f"evaluate {label}"),
            "_log_step": self._log_step,
            "_pause": lambda trainer, reason: self._note(f"pause ({reason})"),
        }
        for name, function in replaced.items():
            monkeypatch.setattr(loop, name, function)

    def train(self) -> list[str]:
        loop.train(self.config, self.trainer.paths)
        return self.events

    def _note(self, event: str) -> None:
        self.events.append(event)

    @contextlib.contextmanager
    def _open(self, config: Config, paths: RunPaths) -> Iterator[Any]:
        yield self.trainer

    def _step(self, trainer: Any) -> dict[str, float]:
        if self.state.step + 1 == self.unavailable_at:
            raise RolloutsUnavailableError("the servers are gone")
        self.state.step += 1
        self._note(f"step {self.state.step}")
        return {"update/skipped": int(self.state.step in self.skipped_steps)}

    def _save_last_step(self, trainer: Any) -> bool:
        self._note("save last step")
        return self.state.step > 0

    def _roll_back(self, trainer: Any) -> None:
        self.state.step, self.state.skipped = 1, 0
        self.skipped_steps = set()
        self._note("roll back")

    def _log_step(self, trainer: Any, watch: Any, metrics: dict[str, float]) -> loop._Advice:
        action = self.actions.get(self.state.step)
        return loop._Advice(end=action == "stop", pause=action == "pause", reason="entropy_low" if action else "")

    def _signals(self, signals: Signals) -> Signals:
        return Signals(stop=self.state.step == self.stop_after, end=signals.end, pause=signals.pause)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(monkeypatch)


def test_a_step_is_synced_saved_and_evaluated_in_this_order(run: FakeRun) -> None:
    assert run.train() == [
        "sync", "evaluate before",
        "step 1", "sync", "evaluate step",
        "step 2", "sync", "save", "evaluate step",
        "step 3", "sync", "evaluate step",
        "step 4", "sync", "save",
        "evaluate after", "regain weights", "export",
    ]  # fmt: skip


def test_a_resumed_run_makes_up_the_evaluation_of_its_last_step(run: FakeRun) -> None:
    run.state.step = 3
    assert run.train() == [
        "sync",
        "evaluate step",
        "step 4",
        "sync",
        "save",
        "evaluate after",
        "regain weights",
        "export",
    ]


def test_a_run_that_is_done_is_only_concluded(run: FakeRun) -> None:
    run.state.step = STEPS
    assert run.train() == ["sync", "evaluate after", "regain weights", "export"]


def test_a_signal_saves_the_step_before_it_ends_the_run(run: FakeRun) -> None:
    run.stop_after = 1
    with pytest.raises(StopRequested, match=r"^stopped after step 1, which is saved; continue with resume=auto$"):
        run.train()
    assert run.events[-2:] == ["step 1", "save last step"]


def test_the_watch_ends_a_run_with_its_reason(run: FakeRun) -> None:
    run.actions = {2: "stop", STEPS: "stop"}
    with pytest.raises(WatchStopped, match=r"after step 2, which is saved; .* watch.action=stop: entropy_low$"):
        run.train()
    assert run.events[-2:] == ["step 2", "save last step"]
    # After the last step there is nothing to end.
    run.state.step = 2
    assert run.train()[-1] == "export"


def test_a_paused_run_is_evaluated_before(run: FakeRun) -> None:
    run.actions = {2: "pause"}
    events = run.train()
    at = events.index("step 2")
    assert events[at + 1 : at + 6] == ["sync", "save", "evaluate step", "pause (entropy_low)", "step 3"]


def test_skipped_steps_in_a_row_take_the_run_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, "loss.max_skipped_steps=1", "evaluation.every=0")
    run.skipped_steps = {3, 4}
    assert run.train() == [
        "sync", "evaluate before",
        "step 1", "sync",
        "step 2", "sync", "save",
        "step 3", "sync",
        "step 4", "roll back", "sync",
        "step 2", "sync", "save",
        "step 3", "sync",
        "step 4", "sync", "save",
        "evaluate after", "regain weights", "export",
    ]  # fmt: skip


def test_a_good_step_between_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(monkeypatch, "loss.max_skipped_steps=1")
    run.skipped_steps = {1, 3}
    assert "roll back" not in run.train()
    assert run.state.skipped == 0


def test_servers_that_are_gone_cost_no_finished_step(run: FakeRun) -> None:
    run.unavailable_at = 2
    with pytest.raises(RolloutsUnavailableError, match=r"^after step 1: the servers are gone; continue with resume="):
        run.train()
    assert run.events[-1] == "save last step"


@pytest.mark.parametrize(
    ("failure", "goes_on"),
    [
        (ServersUnavailableError("8,000 rollouts did not go on"), True),
        # A function of the user's own would fail in the next step too.
        (RolloutsUnavailableError("RewardError: my reward"), False),
    ],
)
def test_an_evaluation_that_the_servers_fail_at_does_not_end_the_run(
    failure: RolloutsUnavailableError, goes_on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warnings: list[str] = []

    def on_rank0(_work: Any) -> None:
        raise failure

    trainer: Any = SimpleNamespace(
        paths=RunPaths(tmp_path),
        state=TrainerState(step=3),
        logger=SimpleNamespace(log_evaluation=lambda metrics: pytest.fail("there is no result")),
        plane=SimpleNamespace(on_rank0=on_rank0),
        display=SimpleNamespace(phase=lambda _: contextlib.nullcontext(), warning=warnings.append),
        failed_evaluations=0,
    )
    monkeypatch.setattr(loop, "broadcast_from_rank0", lambda value: value)
    with contextlib.nullcontext() if goes_on else pytest.raises(RolloutsUnavailableError):
        loop._evaluate(trainer, "step")
    assert trainer.failed_evaluations == goes_on
    expected = f"evaluation step of step 3 failed, and the run goes on without it: {failure}"
    assert warnings == ([expected] if goes_on else [])
    # It is not among the results, so a run that is resumed here makes it up.
    assert not (tmp_path / "evaluation.jsonl").exists()
