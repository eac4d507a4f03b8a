"""Processes that belong together: who ends with whom, and how a whole tree is ended.

A process is named by its id and its start time together, so that an id that the system gave to somebody else is never
hit; nothing is ever ended by name.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable

import psutil

ORPHAN_GRACE_S = 5.0  # from the parent's death to SIGKILL of this process and its descendants
KILL_LIMIT_S = 10.0  # a process that SIGKILL does not end by then hangs in the Linux kernel
SCAN_S = 0.05
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_watched: set[int] = set()


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends: a daemon that a rank left stays in this tree."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with(parent_pid: int) -> None:
    """Make this process and its descendants end when `parent_pid` is gone; called in the child, before anything else.

    It gets SIGTERM at once, and `ORPHAN_GRACE_S` seconds later what is left is killed.
    """
    if parent_pid in _watched:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it ended before the signal was asked for
        sys.exit(f"the process {parent_pid} that asked for this one is gone")
    _watched.add(parent_pid)
    atexit.register(_kill_orphans, parent_pid)
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True, name="biokit-watch-parent").start()


def list_descendants(pid: int | None = None, spared: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """All living descendants of a process (default: this one), without the spared ones and theirs; no zombies."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    kept = {other for one in spared if is_alive(one) for other in (one, *list_descendants(one.pid))}
    return [process for process in found if process not in kept and is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs or is stopped: no zombie, and not another process under the same id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The living process with this id and start time (unix seconds, as psutil gives it)."""
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1.0 and is_alive(process):
            return process
    return None


def end_tree(
    pid: int | None = None, grace_s: float = 5.0, spared: Collection[psutil.Process] = ()
) -> list[psutil.Process]:
    """End a process and all its descendants; of this process (the default) only the descendants.

    Args:
        grace_s: from SIGTERM, which all get at once, to SIGKILL. 0: SIGKILL at once.
        spared: descendants that are left alone, and theirs.

    Returns:
        What even SIGKILL did not end within `KILL_LIMIT_S` seconds.
    """
    known: set[psutil.Process] = set()
    if pid is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            known.add(psutil.Process(pid))
    start = pid or os.getpid()
    if grace_s > 0:
        _signal(_find_tree(start, known, spared), signal.SIGTERM)
        end = time.monotonic() + grace_s
        while _find_tree(start, known, spared) and time.monotonic() < end:
            time.sleep(SCAN_S)
    end = time.monotonic() + KILL_LIMIT_S
    while (left := _find_tree(start, known, spared)) and time.monotonic() < end:  # again: they may fork meanwhile
        _signal(left, signal.SIGKILL)
        time.sleep(SCAN_S)
    return left


def signal_tree(number: signal.Signals, spared: Collection[psutil.Process] = ()) -> None:
    """Signal all descendants of this process but the spared ones and theirs."""
    _signal(list_descendants(spared=spared), number)


def reap_adopted(own: Collection[int]) -> None:
    """Let the zombies go that this process inherited as a subreaper; `own`: children that somebody waits for."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _find_tree(start: int, known: set[psutil.Process], spared: Collection[psutil.Process]) -> list[psutil.Process]:
    """Who of a tree lives. `known` grows: descendants whose parent ended are found although nothing leads to them."""
    for root in [start, *(process.pid for process in known if is_alive(process))]:
        known.update(list_descendants(root, spared))
    return [process for process in known if is_alive(process)]


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)  # refuses where the id has gone to another process


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    end_tree(grace_s=0)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_orphans(parent_pid: int) -> None:
    """Last act of a child whose parent is gone: its own processes (data workers) have nobody else to end them."""
    if os.getppid() != parent_pid:
        end_tree(grace_s=0)
