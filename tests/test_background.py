"""Background runs: they end with their parent, by STOP file, by signal, and tell why they failed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from biokit.config import RunConfig, load_config
from biokit.errors import RunError
from biokit.launch import background
from biokit.launch.background import BackgroundRun, start_module, start_training
from biokit.runs import RunFolder

REPOSITORY = Path(__file__).parents[1]
STAND_IN = '''
"""Writes metrics until it is stopped; argument 1: run folder, 2: how it behaves, 3: steps."""
import signal, subprocess, sys, time
from pathlib import Path
from biokit.runs import MetricsWriter, RunFolder

folder, behaviour, steps = RunFolder(sys.argv[1]), sys.argv[2], int(sys.argv[3])
stopping = []
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
if behaviour == "with_worker":
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder.path, "worker.pid").write_text(str(worker.pid))
writer = MetricsWriter(folder)
folder.write_manifest({"status": "running", "step": 0})
status = "finished"
for step in range(1, steps + 1):
    writer.write({"step": step, "loss": 6.0 / step, "lr": 1e-3, "tokens_per_s": 100.0})
    if behaviour == "fails" and step == 3:
        raise ValueError("the third step is cursed")
    if behaviour != "deaf" and (stopping or folder.stop_requested()):
        status = "stopped"
        break
    time.sleep(0.05)
folder.write_manifest({"status": status, "step": step})
'''
Start = Callable[..., BackgroundRun]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the stand-in training in a run folder of its own; what a test leaves running is killed."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    started: list[BackgroundRun] = []

    def start_stand_in(behaviour: str = "obedient", steps: int = 2000) -> BackgroundRun:
        folder = RunFolder(tmp_path / "run")
        started.append(start_module(folder, "stand_in", [str(folder.path), behaviour, str(steps)]))
        return started[-1]

    yield start_stand_in
    for run in started:
        background._kill_group(run._process, run._lock)
        run._process.wait()


def _wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_finishes(start: Start) -> None:
    run = start(steps=3)
    run.wait(60)
    assert run.poll() == 0 and not run.alive
    assert run.folder.read_manifest() == {"status": "finished", "step": 3}
    assert "exit code 0" in repr(run)


def test_stop_ends_at_a_step_boundary(start: Start) -> None:
    run = start()
    _wait_until(lambda: len(run.folder.read_metrics()) > 2)
    assert run.stop(30) == 0
    assert run.folder.read_manifest()["status"] == "stopped"
    run.wait(0)


def test_a_stale_stop_file_does_not_stop_the_next_run(start: Start) -> None:
    start(steps=1).wait(60)
    run = start(steps=3)
    run.folder.request_stop()
    run.stop(30)
    again = start(steps=3)
    again.wait(60)
    assert again.folder.read_manifest() == {"status": "finished", "step": 3}


def test_stop_kills_what_does_not_listen(start: Start) -> None:
    run = start("deaf")
    _wait_until(lambda: len(run.folder.read_metrics()) > 2)
    assert run.stop(0.2) == -signal.SIGKILL
    with pytest.raises(RunError, match="SIGKILL"):
        run.wait(0)


def test_sigterm_ends_where_stop_files_are_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    _wait_until(lambda: len(run.folder.read_metrics()) > 2)
    monkeypatch.setattr(run, "request_stop", lambda: None)
    assert run.stop(2.0) == 0
    assert run.folder.read_manifest()["status"] == "stopped"


def test_wait_says_why_a_run_failed(start: Start) -> None:
    run = start("fails")
    with pytest.raises(RunError, match=r"(?s)exit code 1.*ValueError: the third step is cursed.*train\.log"):
        run.wait(60)


def test_the_log_tail_is_of_this_run_only(start: Start) -> None:
    with pytest.raises(RunError):
        start("fails").wait(60)
    run = start(steps=1)
    run.wait(60)
    assert run.log_tail() == ""
    assert "cursed" in run.log_file.read_text()


def test_wait_gives_up_after_its_timeout(start: Start) -> None:
    run = start()
    with pytest.raises(RunError, match=r"still runs after 0\.2 s"):
        run.wait(0.2)
    assert run.alive


def test_a_second_training_in_the_same_folder_is_refused(start: Start) -> None:
    run = start()
    with pytest.raises(RunError, match=f"process {run.pid} is training there"):
        start()
    assert run.alive


def test_workers_go_with_the_training(start: Start) -> None:
    run = start("with_worker", steps=3)
    run.wait(60)
    worker = int((run.folder.path / "worker.pid").read_text())
    _wait_until(lambda: _is_gone(worker), 10)


def test_dropping_the_handle_ends_the_training(tmp_path: Path, start: Start) -> None:
    (tmp_path / "other").mkdir()
    folder = RunFolder(tmp_path / "other")
    run = start_module(folder, "stand_in", [str(folder.path), "obedient", "2000"])
    _wait_until(lambda: len(folder.read_metrics()) > 2)
    pid = run.pid
    del run
    gc.collect()
    assert _is_gone(pid)
    assert folder.read_manifest()["status"] == "stopped"


@pytest.mark.parametrize("behaviour", ["obedient", "deaf", "with_worker"])
def test_the_training_ends_when_its_parent_is_killed(tmp_path: Path, start: Start, behaviour: str) -> None:
    folder = RunFolder(tmp_path / "run")
    parent_code = (
        "import sys, time, threading\n"
        "from biokit.launch.background import start_module\n"
        "from biokit.runs import RunFolder\n"
        "runs = []\n"
        "def start():\n"  # from a thread that ends: that alone must not end the training
        f"    runs.append(start_module(RunFolder({str(folder.path)!r}), 'stand_in', "
        f"[{str(folder.path)!r}, {behaviour!r}, '2000']))\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
        "print(runs[0].pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        _wait_until(lambda: len(folder.read_metrics()) > 5)
        assert not _is_gone(child)
        parent.kill()
        parent.wait()
    _wait_until(lambda: _is_gone(child), timeout_s=10)
    if behaviour == "with_worker":
        worker = int((folder.path / "worker.pid").read_text())
        _wait_until(lambda: _is_gone(worker), timeout_s=10)
    if behaviour == "obedient":
        assert folder.read_manifest()["status"] == "stopped"


def test_a_child_whose_parent_is_already_gone_does_not_start(tmp_path: Path, start: Start) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "biokit.launch.background", "1999999999", "stand_in", str(tmp_path / "run"), "x", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "is gone" in done.stderr
    assert not (tmp_path / "run").exists()


def test_start_training_runs_biokit_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(background, "start_module", lambda *arguments: seen.update(zip("fma", arguments, strict=True)))
    config = RunConfig(run_dir=str(tmp_path / "run"), seed=7)
    start_training(config)
    command, path = seen["a"]
    assert (seen["m"], command) == ("biokit", "train")
    assert load_config(path) == config
    json.dumps(seen["a"])
