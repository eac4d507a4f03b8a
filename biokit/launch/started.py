"""The supervisors that this process started: what still belongs to it, and ends with it."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from biokit.errors import RunError
from biokit.launch.facts import collect_facts
from biokit.launch.orders import SLURM, Order
from biokit.launch.slurm.jobs import has_nodes
from biokit.launch.starting import start_supervisor
from biokit.launch.states import ENDED, read_state
from biokit.launch.status import is_locked, is_supervised
from biokit.runs import OWN_PARTS, RunFolder
from biokit.secrets import mask

EXIT_GRACE_S = 5.0  # that this process's runs have to end when it ends itself


@dataclass(frozen=True)
class Started:
    """A supervisor that this process started."""

    process: subprocess.Popen[bytes]
    detached: bool
    starter: int  # process id: a fork of this process has not started it

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


_started: dict[Path, Started] = {}


def start_order(folder: RunFolder, order: Order, detach: bool, variables: Mapping[str, str] | None) -> None:
    """Have an order carried out; what an earlier run of the folder left of its end is removed.

    Raises:
        RunError: the folder cannot be made, or a run is alive in it.
    """
    if order.placement == SLURM and not has_nodes(order.num_nodes):
        raise RunError(f"start {folder.path}", "its order is for a Slurm job", "Submit it with `biokit submit`")
    complete = complete_order(folder, order)
    process = start_supervisor(folder, complete, detach=detach, variables=variables)
    _started[folder.path.resolve()] = Started(process, detach, os.getpid())


def complete_order(folder: RunFolder, order: Order) -> Order:
    """An order with the facts of now; what an earlier run of the folder left of its end is removed.

    Raises:
        RunError: a run is alive in the folder, or it cannot be made.
    """
    check_free(folder)
    folder.create()
    for file in (folder.failure_file, folder.hang_file, folder.result_file):
        file.unlink(missing_ok=True)
    return replace(order, facts=collect_facts(order))


def check_free(folder: RunFolder) -> None:
    """Refuse a folder in which a run is alive, or that cannot be one's.

    Raises:
        RunError: there is one, the folder is a part of another run's, or its name holds a secret.
    """
    path = folder.path.resolve()
    if mask(str(path)) != str(path):
        raise RunError("start a run", "the path of its folder holds a secret", "Give another run_dir")
    for inner, outer in itertools.pairwise((path, *path.parents)):
        if inner.name in OWN_PARTS and RunFolder(outer).launch_file.exists():
            found = f"it is a part of the run {outer}"
            raise RunError(f"start a run in {folder.path}", found, "Give another run_dir")
    ours, said = find_started(folder), read_state(folder)
    if ours is not None and said is not None and said.pid == ours.process.pid and said.state == ENDED:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is leaving
            ours.process.wait(EXIT_GRACE_S)
    if (ours is not None and ours.alive) or is_supervised(folder) or is_locked(folder):
        found = "another run is alive in it"
        raise RunError(f"start a run in {folder.path}", found, "Stop it, or give another run_dir")


def find_started(folder: RunFolder) -> Started | None:
    """The last supervisor that this process started in a folder."""
    ours = _started.get(folder.path.resolve())
    return ours if ours is not None and ours.starter == os.getpid() else None


@atexit.register
def _end_owned() -> None:
    """Ask this process's runs to end; their supervisors end them the hard way once this process is gone."""
    owned = [ours for ours in _started.values() if not ours.detached and ours.starter == os.getpid() and ours.alive]
    for ours in owned:
        ours.process.terminate()
    end = time.monotonic() + EXIT_GRACE_S
    for ours in owned:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ours.process.wait(max(0.0, end - time.monotonic()))
