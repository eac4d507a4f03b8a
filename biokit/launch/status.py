"""Where a run stands, read from its folder alone, by any process on any host.

The supervisor's file says it; whether the supervisor is still there is looked up, not believed. A training that nobody
supervises (`biokit train` by hand) is known by its manifest, its lock and the time of its last words.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import psutil

from biokit.errors import RunError
from biokit.launch.slurm.job_status import find_job, status_of_job
from biokit.launch.slurm.jobs import read_job
from biokit.launch.states import (
    ENDED,
    EXIT_CODES,
    FAILED,
    FINISHED,
    INTERRUPTED,
    WAITING,
    SupervisorState,
    read_state,
    write_state,
)
from biokit.launch.tree import find_process
from biokit.runs import RunFolder
from biokit.view.training import FINAL_STATES

START_S = 60.0  # from an order to the supervisor's first word
SILENT_S = 30.0  # who is on another host, or nobody knows where, and has said nothing for so long is lost
STEPS_SILENT = 10  # a training without a supervisor may be silent for so many of its steps


def find_supervisor(folder: RunFolder, node: int = 0) -> psutil.Process | None:
    """The living process of a supervisor on this host; None where it is gone, or on another host."""
    said = read_state(folder, node)
    return find_process(said.pid, said.pid_started) if said is not None and said.host == socket.gethostname() else None


def is_supervised(folder: RunFolder, node: int = 0) -> bool:
    """Whether a supervisor works in the folder now: its process is there on this host, or beats on another."""
    said = read_state(folder, node)
    return said is not None and not said.is_over


def note_interrupted(folder: RunFolder, node: int = 0) -> None:
    """Say for a supervisor that was killed how its run ended."""
    if said := read_state(folder, node):
        said.state, said.outcome, said.code, said.ended = ENDED, INTERRUPTED, EXIT_CODES[INTERRUPTED], time.time()
        write_state(folder, said, node)


def read_status(folder: RunFolder) -> str:
    """One of: starting, queued, running, stopping, `waiting for life k`, finished, stopped, failed, timed out,
    interrupted, preprocessed, and lost: nobody has said how it ended, and nobody is there any more.
    """
    status, job = _status_here(folder), find_job(folder)
    return status if job is None else status_of_job(folder, job, status)


def _status_here(folder: RunFolder) -> str:
    """As far as the run folder and the processes of this host say."""
    said = read_state(folder)
    if said is None and (refused := _outcome_of_job(folder)):
        return refused
    if said is None:
        return _status_of_order(folder) if folder.launch_file.exists() else _status_of_training(folder)
    if said.is_over:
        if is_locked(folder):  # it was started again without a supervisor
            return _status_of_training(folder)
        return _outcome(folder, said) if said.state == ENDED else "lost"
    if folder.stop_requested():
        return "stopping"
    return f"waiting for life {said.life + 1}" if said.state == WAITING else said.state


def is_locked(folder: RunFolder) -> bool:
    """Whether a training on this host holds the run's lock, without touching the lock."""
    try:
        about = (folder.path / ".lock").stat()
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    key = f" {os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino} "
    return any("FLOCK" in line and key in line for line in table.splitlines())


def _outcome(folder: RunFolder, said: SupervisorState) -> str:
    """How the supervisor saw the run end; a training says itself whether it only preprocessed."""
    if said.outcome == FINISHED and _written(folder.manifest_file) >= said.started:
        with contextlib.suppress(RunError):
            return "preprocessed" if folder.read_manifest().get("status") == "preprocessed" else FINISHED
    return said.outcome or FAILED


def _outcome_of_job(folder: RunFolder) -> str:
    """How a job ended that Slurm has not taken; empty: there is none."""
    with contextlib.suppress(RunError):
        job = read_job(folder)
        return job.outcome if job is not None and not job.job_id else ""
    return ""


def _status_of_order(folder: RunFolder) -> str:
    """Of a run whose supervisor has not spoken yet."""
    if find_job(folder):
        return "queued"
    return "starting" if time.time() - _written(folder.launch_file) < START_S else "lost"


def _status_of_training(folder: RunFolder) -> str:
    """Of a training that nobody supervises."""
    try:
        status = str(folder.read_manifest().get("status", "running"))
    except RunError:
        status = "starting"
    locked = is_locked(folder)
    if status in FINAL_STATES and not locked:
        return status
    if not locked and not _was_heard(folder):
        return "lost"
    if folder.stop_requested():
        return "stopping"
    return "starting" if status == "starting" else "running"


def _was_heard(folder: RunFolder) -> bool:
    """Whether a training on another host (nobody here holds its lock) may still be there."""
    times = [float(line["time"]) for line in folder.read_metrics()[-STEPS_SILENT:] if "time" in line]
    patience_s = max(SILENT_S, STEPS_SILENT * (times[-1] - times[0]) / max(1, len(times) - 1)) if times else SILENT_S
    newest = max(map(_written, (folder.metrics_file(), folder.manifest_file, folder.path / ".lock")))
    return time.time() - newest < patience_s


def _written(path: Path) -> float:
    """When a file was last written, unix seconds; 0: there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
