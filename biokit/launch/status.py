"""Where a run stands, read from its folder alone, by any process on any host.

The supervisor's file says it; whether the supervisor is still there is looked up, not believed. A training that nobody
supervises (`biokit train` by hand) is known by its manifest, its lock and the time of its last words.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from biokit.errors import RunError
from biokit.launch.orders import SLURM, read_order
from biokit.launch.states import ENDED, EXIT_CODES, FAILED, FINISHED, INTERRUPTED, WAITING
from biokit.launch.tree import find_process
from biokit.runs import RunFolder, write_atomically
from biokit.view.training import FINAL_STATES

START_S = 60.0  # from an order to the supervisor's first word
SILENT_S = 30.0  # who is on another host, or nobody knows where, and has said nothing for so long is lost
STEPS_SILENT = 10  # a training without a supervisor may be silent for so many of its steps


def read_supervisor(folder: RunFolder, node: int = 0) -> dict[str, Any]:
    """What a node's supervisor says of itself (`SupervisorState`); empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(folder.supervisor_file(node).read_text(encoding="utf-8"))
        if isinstance(said, dict):
            return said
    return {}


def find_supervisor(folder: RunFolder, node: int = 0) -> psutil.Process | None:
    """The living process of a supervisor on this host; None where it is gone, or on another host."""
    said = read_supervisor(folder, node)
    if said.get("host") != socket.gethostname():
        return None
    return find_process(int(said.get("pid", 0)), float(said.get("pid_started", 0.0)))


def is_supervised(folder: RunFolder, node: int = 0) -> bool:
    """Whether a supervisor works in the folder now: its process is there on this host, or beats on another."""
    said = read_supervisor(folder, node)
    if not said or said.get("state") == ENDED:
        return False
    if said.get("host") == socket.gethostname():
        return find_supervisor(folder, node) is not None
    return time.time() - float(said.get("beat", 0.0)) < SILENT_S


def note_interrupted(folder: RunFolder, node: int = 0) -> None:
    """Say for a supervisor that was killed how its run ended."""
    said = read_supervisor(folder, node)
    said |= {"state": ENDED, "outcome": INTERRUPTED, "ended": time.time(), "code": EXIT_CODES[INTERRUPTED]}
    write_atomically(folder.supervisor_file(node), json.dumps(said, indent=1) + "\n")


def read_status(folder: RunFolder) -> str:
    """One of: starting, queued, running, stopping, `waiting for life k`, finished, stopped, failed, timed out,
    interrupted, preprocessed, and lost: nobody has said how it ended, and nobody is there any more.
    """
    said = read_supervisor(folder)
    if not said:
        return _status_of_order(folder) if folder.launch_file.exists() else _status_of_training(folder)
    if not is_supervised(folder):
        if is_locked(folder):  # it was started again without a supervisor
            return _status_of_training(folder)
        return _outcome(folder, said) if said.get("state") == ENDED else "lost"
    if folder.stop_requested():
        return "stopping"
    return f"waiting for life {said['life'] + 1}" if said["state"] == WAITING else str(said["state"])


def is_locked(folder: RunFolder) -> bool:
    """Whether a training on this host holds the run's lock, without touching the lock."""
    try:
        about = (folder.path / ".lock").stat()
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    key = f" {os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino} "
    return any("FLOCK" in line and key in line and "->" not in line for line in table.splitlines())


def _outcome(folder: RunFolder, said: Mapping[str, Any]) -> str:
    """How the supervisor saw the run end; a training says itself whether it only preprocessed."""
    outcome = str(said.get("outcome") or FAILED)
    if outcome == FINISHED and _written(folder.manifest_file) >= float(said.get("started", 0.0)):
        with contextlib.suppress(RunError):
            return "preprocessed" if folder.read_manifest().get("status") == "preprocessed" else FINISHED
    return outcome


def _status_of_order(folder: RunFolder) -> str:
    """Of a run whose supervisor has not spoken yet."""
    with contextlib.suppress(RunError):
        if read_order(folder).placement == SLURM:
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
