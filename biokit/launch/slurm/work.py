"""The two kinds of work that a Slurm job does: a training under its supervisor, a notebook under papermill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from biokit.errors import BiokitError, RunError
from biokit.failures import read_failure
from biokit.launch import states
from biokit.launch.orders import read_order
from biokit.launch.slurm.jobs import Job, read_job, write_job
from biokit.launch.starting import start_supervisor
from biokit.launch.status import is_locked, is_supervised
from biokit.launch.tree import end_tree, end_with
from biokit.runs import RunFolder

PREDECESSOR_S = 60.0  # in which a supervisor that was lost with its node falls silent


class Work(Protocol):
    """What a job looks after."""

    def await_predecessor(self) -> None:
        """Return when nothing of an earlier start of the job is at work any more, as far as can be seen."""

    def start(self) -> None: ...

    def is_over(self) -> bool:
        """Whether it has ended, or has saved all that it was asked to save."""

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint at the next step boundary, and the end."""

    def terminate(self) -> None:
        """Say that there is less than half a minute left."""

    def cut(self) -> None:
        """End it now."""

    def saved_steps(self) -> dict[str, int]:
        """The newest checkpoint of each of its runs, by the run's path."""

    def outcome(self) -> tuple[str, str]:
        """How it ended (finished, stopped, failed, timed out, interrupted), and why it failed."""


class TrainingWork:
    """A training, carried out by a supervisor."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes]

    def await_predecessor(self) -> None:
        _wait_until_silent(self.folder)

    def start(self) -> None:
        for file in (self.folder.failure_file, self.folder.hang_file):
            file.unlink(missing_ok=True)
        self._process = start_supervisor(self.folder, read_order(self.folder))

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def ask_to_stop(self) -> None:
        self.folder.request_stop()

    def terminate(self) -> None:
        self._process.terminate()

    def cut(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def saved_steps(self) -> dict[str, int]:
        return _newest([self.folder])

    def outcome(self) -> tuple[str, str]:
        state = states.read_state(self.folder)
        outcome = state.outcome if state is not None and state.outcome else states.FAILED
        if self._process.returncode == 0:
            return outcome, ""
        with contextlib.suppress(RunError):
            if failure := read_failure(self.folder):
                return outcome, failure.headline
        return outcome, f"see {self.folder.logs / 'supervisor.log'}"


class NotebookWork:
    """A notebook, executed in a process of its own; the runs that it makes are those inside the job's run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes]
        self._before: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._asked = False

    def await_predecessor(self) -> None:
        for folder in self._runs():
            _wait_until_silent(folder)

    def start(self) -> None:
        self._before = self.saved_steps()
        command = [sys.executable, "-m", "biokit.launch.slurm.job", str(self.folder.path), "--notebook"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def is_over(self) -> bool:
        if self._process.poll() is not None:
            return True
        return self._asked and not self._alive() and self.saved_steps() != self._before

    def ask_to_stop(self) -> None:
        self._asked = True
        for folder in self._alive():
            self._stopped.add(str(folder.path))
            folder.request_stop()

    def terminate(self) -> None:
        """Nothing more: `cut` follows in time."""

    def cut(self) -> None:
        end_tree(self._process.pid, grace_s=2.0)

    def saved_steps(self) -> dict[str, int]:
        return _newest(self._runs())

    def outcome(self) -> tuple[str, str]:
        if self._process.poll() is None:
            end_tree(self._process.pid, grace_s=2.0)
            self._process.wait()
            return states.STOPPED, ""
        if self._process.returncode == 0:  # of a run that was asked to stop, it may have gone on with what there was
            return (states.STOPPED if self._stopped else states.FINISHED), ""
        job = read_job(self.folder)
        return states.FAILED, (job.error if job else "") or f"papermill ended with {self._process.returncode}"

    def _runs(self) -> list[RunFolder]:
        """Runs inside the job's folder: those that had a supervisor or a training's lock."""
        found = {path.parent for name in ("launch.json", ".lock") for path in self.folder.path.rglob(name)}
        return [RunFolder(path) for path in sorted(found)]

    def _alive(self) -> list[RunFolder]:
        return [folder for folder in self._runs() if is_supervised(folder) or is_locked(folder)]


def execute_notebook(folder: RunFolder, job: Job) -> int:
    """Execute a job's notebook in this process, which ends with the one that started it; returns the exit code."""
    from biokit.launch.notebooks import run_notebook

    end_with(os.getppid())
    try:
        print(run_notebook(Path(job.program), folder.path, job.parameters, cwd=Path(job.notebook).parent), flush=True)
    except BiokitError as error:
        print(f"biokit: {error}", flush=True)
        write_job(folder, replace(job, error=str(error)))
        return 1
    return 0


def _newest(folders: list[RunFolder]) -> dict[str, int]:
    return {str(folder.path): max(folder.checkpoint_steps(), default=0) for folder in folders}


def _wait_until_silent(folder: RunFolder) -> None:
    """A supervisor that went down with its node leaves a file that looks alive until its last beat is old."""
    end = time.monotonic() + PREDECESSOR_S
    while is_supervised(folder) and time.monotonic() < end:
        time.sleep(1.0)
