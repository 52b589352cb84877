"""W&B and MLflow: each gets the run's numbers from the run's own files, in a process of its own.

The process follows metrics.jsonl, evaluation.jsonl and warm_start.jsonl and sends the lines that it has not sent yet.
So nothing that happens to it, to its library, its disk or its network can end, block or slow a run. The process tries
again with growing pauses. The trainer warns once, and at the end waits for it a bounded time. The number of lines sent
and the id of the service's run stand in ``<run>/trackers/<name>.json``: a resumed run goes on under the same id, and no
step is sent twice.

``python -m dasd_megatron.observability.trackers wandb RUN`` sends the rest of a run by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from dasd_megatron import access
from dasd_megatron.files import replace_file
from dasd_megatron.observability.metric_files import EVALUATION, METRICS, WARM_START, restore_non_finite
from dasd_megatron.reading import MalformedError, UnreadableError, parse_json, read_json, read_yaml

CLOSE_SECONDS = 60.0
_LONGEST_PAUSE = 60.0
_PREFIXES = {WARM_START: "warm_start/", METRICS: "", EVALUATION: "evaluation/"}

# The libraries send no telemetry about us. MLflow stores in files, since its small distribution has nothing else.
_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_SECRET_NAME = re.compile(r"(api|access|auth)[-_]?key|token(?!s|_|ize)|secret|passw|credential", re.IGNORECASE)


class State(TypedDict):
    """The contents of ``trackers/<name>.json``."""

    id: str | None
    """The service's id of the run."""
    sent: dict[str, int]
    """Last step sent, by file and label."""
    lines: int
    """The number of lines sent."""
    trouble: str
    """The trouble that lasts now; empty when there is none."""


class Service(Protocol):
    """A run at the service. ``log`` sends numbers at a step of their axis, which is ``warm_start`` or empty; it may
    raise anything."""

    def log(self, values: Mapping[str, float], axis: str, step: int, seconds: float) -> None:
        """Log values at ``step`` of ``axis`` (empty: training), measured at ``seconds`` since the epoch."""

    def close(self) -> None:
        """End the service's run, after everything has been sent."""


Connect = Callable[[Mapping[str, Any], str, Path, State, Mapping[str, Any]], tuple[Service, str]]
"""Function of the ``logging`` section, the run's name and directory, the state and the public configuration. It returns
the service's run and its id."""


class Tracker:
    """The process that follows the run directory for one service. Nothing here raises for what goes wrong there.

    ``fresh`` starts another run at the service, as for a run that begins again at step 1.
    """

    def __init__(self, name: str, run_dir: Path, *, fresh: bool) -> None:
        self.name, self._run_dir, self._warned = name, run_dir, False
        folder = run_dir / "trackers"
        folder.mkdir(exist_ok=True)
        if fresh:
            _state_path(run_dir, name).unlink(missing_ok=True)
        # The process neither gets nor needs the key of the rollout servers.
        environment = {key: value for key, value in os.environ.items() if key != access.VARIABLE}
        command = [
            sys.executable,
            "-m",
            "dasd_megatron.observability.trackers",
            name,
            str(run_dir.absolute()),
            "--follow",
        ]
        with open(folder / f"{name}.log", "a") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environment, **_ENVIRONMENT},
                start_new_session=True,
            )

    def trouble(self) -> str | None:
        """Return a one-line warning the first time that something is wrong, else None."""
        if self._warned:
            return None
        status = self._process.poll()
        try:
            reason = _read_state(self._run_dir, self.name)["trouble"]
        except UnreadableError as error:
            reason = str(error)
        if status is None and not reason:
            return None
        self._warned = True
        failure = f"{self.name} gets no numbers: {reason or f'its process ended with status {status}'}"
        later = "it has ended" if status is not None else "it tries again"
        return (
            f"{failure}; {later}, training goes on, and {METRICS} has everything (see "
            f"{self._run_dir / 'trackers' / self.name}.log)"
        )

    def close(self) -> str | None:
        """Let the process send the rest, for at most a minute; return a one-line warning if it has not sent all."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            status = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
            # The library's helper processes are in the same session, so they end too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if status == 0:
            return None
        return (
            f"{self.name} has not got all numbers: `python -m dasd_megatron.observability.trackers {self.name} "
            f"{self._run_dir}` sends the rest"
        )


def public_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the configuration by dotted names. Possible secrets are left out: fields and arguments with such names,
    and passwords in URLs."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= public_settings(value, f"{name}.")
        elif _SECRET_NAME.search(str(key)) or (
            isinstance(value, list) and any(_SECRET_NAME.search(str(item)) for item in value)
        ):
            found[name] = "(left out)"
        else:
            found[name] = (
                value if isinstance(value, (bool, int, float)) else re.sub(r"//[^/@\s]+@", "//(left out)@", str(value))
            )
    return found


def follow(name: str, run_dir: Path, ended: Callable[[], bool], connect: Connect, pause: float = 1.0) -> None:
    """Send the lines of the run's files until ``ended`` says that no more come and all are sent.

    After a failure it tries again, with growing pauses; once ``ended``, the failure is raised.
    """
    state = _read_state(run_dir, name)
    files = {file: _Follower(run_dir / file) for file in _PREFIXES}
    service: Service | None = None
    wait = pause
    while True:
        last = ended()
        try:
            if service is None:
                service, state["id"] = _connect(run_dir, state, connect)
                _write_state(run_dir, name, state)
            for file, row in _new_rows(files):
                sequence = _sequence_name(file, row)
                if row["step"] > state["sent"].get(sequence, -1):
                    _send(service, file, row)
                    state["sent"][sequence] = row["step"]
                    state["lines"] += 1
                _write_state(run_dir, name, state)
            wait = pause
            if state["trouble"]:
                state["trouble"] = ""
                _write_state(run_dir, name, state)
        except Exception as error:
            # Libraries raise errors of their own. Whatever it is, the run's files have the numbers for the next
            # attempt.
            print(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}", flush=True)
            if last:
                raise
            state["trouble"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            with contextlib.suppress(Exception):
                _write_state(run_dir, name, state)
            files = {file: _Follower(run_dir / file) for file in _PREFIXES}
            wait = min(2 * wait, _LONGEST_PAUSE)
        if last:
            if service is not None:
                service.close()
            return
        _sleep(wait, ended)


def _sleep(seconds: float, ended: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ended():
        time.sleep(min(0.2, seconds))


def _connect(run_dir: Path, state: State, connect: Connect) -> tuple[Service, str]:
    config = read_yaml(run_dir / "config.yaml", advice="restore it")
    return connect(config["logging"], config["run"]["name"], run_dir, state, public_settings(config))


def _sequence_name(file: str, row: Mapping[str, Any]) -> str:
    """Return the name under which the last step sent is counted: evaluations of one step differ by their label."""
    return f"{file} {row.get('label', '')}".strip()


def _send(service: Service, file: str, row: dict[str, Any]) -> None:
    """Send one line."""
    prefix = _PREFIXES[file]
    values = {
        f"{prefix}{key}": float(value)
        for key, value in restore_non_finite(row).items()
        if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    service.log(values, "warm_start" if file == WARM_START else "", row["step"], row.get("time", time.time()))


class _Follower:
    """Reader of the whole lines that have been added to a file since the last read; all of them again once the file has
    been replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._inode: int | None = None

    def new_rows(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    row = parse_json(line, {"step": int, "time?": float})
                except MalformedError:
                    # A resume refuses a damaged line, and names it. Here the lines behind it count.
                    continue
                yield row


def _new_rows(files: Mapping[str, _Follower]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows that were added to the files since the last read, each with the name of its file."""
    for file, follower in files.items():
        for row in follower.new_rows():
            yield file, row


def _state_path(run_dir: Path, name: str) -> Path:
    return run_dir / "trackers" / f"{name}.json"


def _read_state(run_dir: Path, name: str) -> State:
    state = State(id=None, sent={}, lines=0, trouble="")
    path = _state_path(run_dir, name)
    if os.path.lexists(path):
        shape = {"id": (None, str), "sent": {str: int}, "lines": int, "trouble": str}
        found: State = read_json(path, shape, advice="remove it to send all numbers again, as a run of its own")
        state.update(found)
    return state


def _write_state(run_dir: Path, name: str, state: State) -> None:
    replace_file(_state_path(run_dir, name), json.dumps(state))


def connect_wandb(
    settings: Mapping[str, Any], run_name: str, run_dir: Path, state: State, config: Mapping[str, Any]
) -> tuple[Service, str]:
    """Begin or resume the run at Weights & Biases."""
    import wandb

    run = wandb.init(
        project=settings["wandb_project"],
        name=run_name,
        id=state["id"] or secrets.token_hex(4),
        resume="allow",
        mode=settings["wandb"],
        dir=run_dir,
        config=dict(config) if state["id"] is None else None,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=60,
        ),
    )
    for axis, names in (("step", "*"), ("warm_start/step", "warm_start/*")):
        run.define_metric(axis)
        run.define_metric(names, step_metric=axis)

    class WandbRun:
        def log(self, values: Mapping[str, float], axis: str, step: int, seconds: float) -> None:
            # W&B drops lines whose count is not above the last one. This count grows over all sessions.
            run.log({**values, f"{axis}/step" if axis else "step": step}, step=state["lines"])

        def close(self) -> None:
            run.finish()

    return WandbRun(), run.id


def connect_mlflow(
    settings: Mapping[str, Any], run_name: str, run_dir: Path, state: State, config: Mapping[str, Any]
) -> tuple[Service, str]:
    """Begin or resume the run at MLflow."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=settings["mlflow_uri"] or (run_dir / "mlruns").as_uri())
    known_id = state["id"]
    if known_id is None:
        experiment = client.get_experiment_by_name(settings["mlflow_experiment"])
        number = (
            client.create_experiment(settings["mlflow_experiment"]) if experiment is None else experiment.experiment_id
        )
        run_id: str = client.create_run(number, run_name=run_name).info.run_id
        # A request takes a hundred parameters.
        params = [Param(_mlflow_name(key), str(value)[:500]) for key, value in config.items()]
        for first in range(0, len(params), 100):
            client.log_batch(run_id, params=params[first : first + 100])
    else:
        run_id = known_id
        client.update_run(run_id, status="RUNNING")

    class MlflowRun:
        def log(self, values: Mapping[str, float], axis: str, step: int, seconds: float) -> None:
            client.log_batch(
                run_id,
                metrics=[Metric(_mlflow_name(key), value, int(1000 * seconds), step) for key, value in values.items()],
            )

        def close(self) -> None:
            client.set_terminated(run_id)

    return MlflowRun(), run_id


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


CONNECT: dict[str, Connect] = {"wandb": connect_wandb, "mlflow": connect_mlflow}


def main(arguments: list[str]) -> None:
    """Send what a run has (``NAME RUN``), with ``--follow`` for as long as standard input is open and the parent is
    alive."""
    name, run_dir, *options = arguments
    parent = os.getppid()
    if options == ["--follow"]:
        # Schedulers send these signals to all processes of a job. The trainer may still write lines to be sent.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.set_blocking(sys.stdin.fileno(), False)

        def ended() -> bool:
            try:
                return os.getppid() != parent or os.read(sys.stdin.fileno(), 1) == b""
            except BlockingIOError:
                return False
    else:
        os.environ.update(_ENVIRONMENT)

        def ended() -> bool:
            return True

    follow(name, Path(run_dir), ended, CONNECT[name])


if __name__ == "__main__":
    main(sys.argv[1:])
