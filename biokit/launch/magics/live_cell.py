"""A run that a cell waits for: its output as it comes, its end as the cell's end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time

from biokit.errors import RunError
from biokit.launch.orders import read_order
from biokit.launch.output import OutputTail
from biokit.launch.run import AT_ONCE_S, Run
from biokit.launch.started import Started, find_started
from biokit.launch.status import note_interrupted
from biokit.launch.tree import end_tree
from biokit.runs import RunFolder

LOOK_S = 0.05  # between two looks at the output
ENDED_S = 0.2  # between two looks at whether the run has ended


def follow_run(run: Run, tail: OutputTail) -> None:
    """Show what the ranks print until the run has ended.

    An interrupt ends it; a training of biokit saves a checkpoint first, and a second interrupt ends that at once.

    Raises:
        RunFailed: it failed or timed out; a notebook shows it as a card.
        KeyboardInterrupt: after it has been ended.
    """
    try:
        try:
            _follow(run, tail)
        except KeyboardInterrupt:
            if started := _asked_to_save(run):
                started.process.terminate()
                print("stopping at the next step; interrupt again to end it at once", flush=True)
                _follow(run, tail)
            raise
    except KeyboardInterrupt:
        end_now(run.folder)
        tail.look(ended=True)
        raise
    tail.look(ended=True)
    run.raise_on_failure()


def _follow(run: Run, tail: OutputTail) -> None:
    due = 0.0
    while True:
        if time.monotonic() >= due:
            if run.ended:
                return
            due = time.monotonic() + ENDED_S
        tail.look()
        time.sleep(LOOK_S)


def _asked_to_save(run: Run) -> Started | None:
    """The living supervisor of a program that saves before it ends; None: there is none."""
    started = find_started(run.folder)
    with contextlib.suppress(RunError):
        if started is not None and started.alive and read_order(run.folder).saves_on_sigterm:
            return started
    return None


def end_now(folder: RunFolder) -> None:
    """End a run that this process started, without waiting for a checkpoint; returns when nothing of it is left."""
    started = find_started(folder)
    if started is not None and not started.alive:
        return
    with contextlib.suppress(RunError):
        folder.request_stop()  # heard even by a supervisor whose start was interrupted before it was known here
    if started is None:
        return
    started.process.send_signal(signal.SIGINT)
    try:
        started.process.wait(AT_ONCE_S)
    except subprocess.TimeoutExpired:
        end_tree(started.process.pid, grace_s=0)
        note_interrupted(folder)
