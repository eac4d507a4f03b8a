"""Where a run stands, as its folder says it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from biokit.errors import RunError
from biokit.launch.orders import SLURM, Order, read_order, write_order
from biokit.launch.run import Run
from biokit.launch.slurm.jobs import Job, write_job
from biokit.launch.started import check_free
from biokit.launch.status import read_status
from biokit.runs import RunFolder
from tests.run_folders import say

CELL = Order("cell", ("cell.py",))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"state": "starting"}, "starting"),
        ({}, "running"),
        ({"state": "waiting", "life": 2}, "waiting for life 3"),
        ({"state": "ended", "outcome": "finished"}, "finished"),
        ({"state": "ended", "outcome": "timed out"}, "timed out"),
        ({"pid": 1999999999}, "lost"),
        ({"pid_started": 5.0}, "lost"),  # the id is another process's now
        ({"host": "elsewhere", "pid": 7}, "running"),
        ({"host": "elsewhere", "beat": time.time() - 31}, "lost"),
        ({"host": "elsewhere", "beat": time.time() - 31, "state": "ended", "outcome": "failed"}, "failed"),
    ],
)
def test_the_supervisor_says_it_and_is_looked_for(folder: RunFolder, said: dict[str, Any], status: str) -> None:
    write_order(folder, CELL)
    say(folder, **said)
    run = Run.attach(folder.path)
    assert run.status == status
    assert run.ended == (status in ("finished", "timed out", "lost", "failed")) == (not run.alive)


def test_a_stop_that_is_asked_for_shows_until_the_end(folder: RunFolder) -> None:
    say(folder)
    folder.request_stop()
    assert read_status(folder) == "stopping"
    say(folder, state="ended", outcome="stopped")
    assert read_status(folder) == "stopped"


def test_a_run_whose_supervisor_has_not_spoken(folder: RunFolder) -> None:
    write_order(folder, CELL)
    assert read_status(folder) == "starting"
    os.utime(folder.launch_file, (1.0, 1.0))
    assert read_status(folder) == "lost"
    write_order(folder, Order("train", ("x.py",), placement=SLURM))
    os.utime(folder.launch_file, (1.0, 1.0))
    assert read_status(folder) == "lost"  # nobody has submitted it
    write_job(folder, Job("train", "x", job_id="12", submitted=time.time()))
    assert read_status(folder) == "queued"


def test_a_training_without_a_supervisor(folder: RunFolder) -> None:
    folder.write_manifest({"status": "running", "step": 0})
    with folder.lock():
        assert read_status(folder) == "running"
        os.utime(folder.manifest_file, (1.0, 1.0))
        os.utime(folder.path / ".lock", (1.0, 1.0))
        assert read_status(folder) == "running"  # its lock is held
        say(folder, state="ended", outcome="failed")
        assert read_status(folder) == "running"  # by hand, after the supervised run had failed
        folder.supervisor_file().unlink()
        folder.request_stop()
        assert read_status(folder) == "stopping"
    assert read_status(folder) == "lost"
    folder.write_manifest({"status": "running", "step": 0})
    assert read_status(folder) == "stopping"  # it may be on another host: it was heard just now
    folder.write_manifest({"status": "stopped", "step": 3})
    assert read_status(folder) == "stopped"


def test_a_slow_training_on_another_host_is_not_lost(folder: RunFolder) -> None:
    folder.write_manifest({"status": "running", "step": 0})
    lines = [{"step": step, "loss": 1.0, "time": 100.0 * step} for step in range(1, 5)]
    folder.metrics_file().write_text("".join(json.dumps(line) + "\n" for line in lines))
    for ago, status in ((900, "running"), (1100, "lost")):
        for file in (folder.metrics_file(), folder.manifest_file):
            os.utime(file, (time.time() - ago,) * 2)
        assert read_status(folder) == status


def test_wrong_types_in_the_files_of_a_run_stop_nobody(folder: RunFolder) -> None:
    write_order(folder, Order("cell", ("cell.py",), facts={"versions": "x", "time": "x"}))
    say(folder, beat=None, max_lives=None, started="x", ended=1e300, state="ended", outcome="failed", host="elsewhere")
    folder.metrics_file().write_text('{"step": 1, "loss": "x"}\n{"step": 2, "loss": null, "time": 1e400}\n')
    folder.write_manifest({"train_iters": "x", "versions": 7})
    run = Run.attach(folder.path)
    assert run.status == "failed" and "FAILED" in run.card.text
    assert "step 1" in repr(run) and "no step" not in run.plot()._repr_mimebundle_()["text/plain"]


def test_a_run_is_not_started_inside_another(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_order(folder, CELL)
    check_free(RunFolder(folder.path / "second"))
    for part in ("lives/0001", "logs", "checkpoints/x"):
        with pytest.raises(RunError, match="it is a part of the run"):
            check_free(RunFolder(folder.path / part))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    with pytest.raises(RunError, match="holds a secret") as caught:
        check_free(RunFolder(folder.path / "of_hf_abcdefghijklmnop"))
    assert "abcdefgh" not in str(caught.value)


def test_output_is_read_from_plain_files_only(folder: RunFolder, tmp_path: Path) -> None:
    write_order(folder, CELL)
    folder.life(1).create()
    (tmp_path / "other").write_text("not of the run")
    folder.life(1).output_file(0).symlink_to(tmp_path / "other")
    os.mkfifo(folder.life(1).output_file(1))
    run = Run.attach(folder.path)
    assert run.logs(0) == run.logs(1) == ""
    folder.launch_file.unlink()
    os.mkfifo(folder.launch_file)
    with pytest.raises(RunError, match="no plain file"):
        read_order(folder)
