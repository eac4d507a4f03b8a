"""Hands an order to a supervisor: a process of its own that carries it out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from biokit.errors import RunError
from biokit.launch.orders import Order, write_order
from biokit.launch.states import read_state
from biokit.runs import RunFolder


def start_supervisor(
    folder: RunFolder, order: Order, *, detach: bool = False, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Write an order into a run folder and start its supervisor, which ends with this process.

    Any thread may start it: it watches this process, and asks for no parent-death signal, which would come at the end
    of the thread.

    Args:
        detach: it outlives this process.
        variables: what the environment of the run has beside this process's own; written nowhere.

    Raises:
        RunError: the folder cannot be made, or another supervisor is at work in it.
    """
    prepare_folder(folder, order)
    owner = [] if detach else ["--owner", str(os.getpid())]
    with (folder.logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "biokit.launch.supervision.supervisor", str(folder.path.absolute()), *owner],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )


def prepare_folder(folder: RunFolder, order: Order) -> None:
    """Write an order into a run folder, for its supervisor; what earlier ones said there is removed.

    Raises:
        RunError: the folder cannot be made, or another supervisor is at work in it.
    """
    folder.create()
    state = read_state(folder)
    if state is not None and not state.is_over:
        found = "it is running under another supervisor"
        raise RunError(f"start a run in {folder.path}", found, "Stop it, or give another run_dir")
    folder.clear_stop()
    for old in folder.supervisor_file().parent.glob("*.json"):  # of an earlier run: they would pass for this one's
        old.unlink(missing_ok=True)
    write_order(folder, order)
