"""What is said of runs that did not start, or did not end as they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from biokit.errors import RunError
from biokit.failures import collect_failure
from biokit.launch import started, status
from biokit.launch.failed_run import Interrupted, explain_end, told_shortly
from biokit.launch.orders import Order, write_order
from biokit.launch.run import Run, start_run
from biokit.launch.started import complete_order
from biokit.runs import RunFolder

CELL = Order("cell", ("cell.py",))


def test_a_folder_that_is_gone_promises_nothing(tmp_path: Path) -> None:
    error = explain_end(RunFolder(tmp_path / "gone"), "lost", "train")
    assert "Its folder is gone" in str(error) and "checkpoint" not in str(error)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="it cannot be made"):
        complete_order(RunFolder(tmp_path / "file"), Order("script", ("x.py",)))


def test_an_interrupt_is_told_in_one_line() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, told_shortly():
        raise KeyboardInterrupt
    assert isinstance(caught.value, Interrupted) and caught.value.__suppress_context__
    assert caught.value._render_traceback_() == ["KeyboardInterrupt: the cell was interrupted"]


def test_a_supervisor_that_is_slow_to_speak_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = []

    def start_asleep(where: RunFolder, order: Order, **_: Any) -> subprocess.Popen[bytes]:
        write_order(where, order)
        processes.append(subprocess.Popen(asleep))
        return processes[-1]

    monkeypatch.setattr(started, "start_supervisor", start_asleep)
    monkeypatch.setattr(status, "START_S", 0.0)
    run = start_run(folder, CELL)
    assert Run.attach(folder.path).status == "starting" and not run.ended
    processes[0].kill()
    processes[0].wait()
    assert run.status == "lost"


def test_logs_of_torchruns_own_output(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_order(folder, Order("script", ("x.py",), ("--tee", "3")))
    life = folder.life(1)
    life.create()
    life.agent_log(0).parent.mkdir(parents=True, exist_ok=True)
    life.agent_log(0).write_text("[default0]:hello\n")
    assert Run(folder).logs(0) == "[default0]:hello"
    life.error_file(0).write_text(json.dumps({"rank": 0, "kind": "ValueError", "message": "x", "time": 1.0}))
    failure = collect_failure(folder, 1)
    assert (failure.logs, failure.tail) == (str(life.agent_log(0)), "[default0]:hello")
