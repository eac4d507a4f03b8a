"""Training in a process of its own, watched and stopped from a notebook through the run folder.

The child leads its own session, so a kernel interrupt does not reach it, and it ends when the process that started it
is gone: it asks the Linux kernel for SIGTERM at the parent's death (save a checkpoint and end), watches the parent
itself, and kills its own process group `ORPHAN_GRACE_S` seconds later where that did not help.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from biokit.errors import RunError
from biokit.runs import RunFolder

if TYPE_CHECKING:
    from biokit.config import RunConfig

ORPHAN_GRACE_S = 6.0  # from the parent's death to SIGKILL of the child's group
EXIT_GRACE_S = 5.0  # from SIGTERM to SIGKILL when the handle is dropped or Python ends
POLL_S = 0.1
TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1

# The parent-death signal is sent when the *thread* that made the child ends; this one lives as long as Python does.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="biokit-start")
_live: dict[Path, weakref.ref[BackgroundRun]] = {}


class BackgroundRun:
    """A training that runs in its own process. Dropping the last reference to it, or ending Python, ends the training.

    Attributes:
        folder: the run folder, where everything that the training says is found.
        log_file: standard output and error of the training, together.
        started: unix time at which the process was started.
    """

    def __init__(
        self, folder: RunFolder, process: subprocess.Popen[bytes], log_file: Path, log_start: int, started: float
    ) -> None:
        self.folder = folder
        self.log_file = log_file
        self.started = started
        self._log_start = log_start
        self._process = process
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, process, self._lock)

    @property
    def pid(self) -> int:
        """Process id of the training, and id of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self.poll() is None

    def poll(self) -> int | None:
        """Exit code of the training (negative: the signal that ended it); None while it runs."""
        return _poll(self._process, self._lock)

    def log_tail(self, num_lines: int = TAIL_LINES) -> str:
        """The last lines that this training wrote to its log."""
        with self.log_file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, file.tell() - 400 * num_lines))
            text = file.read().decode("utf-8", errors="replace")
        return "\n".join(text.rstrip().splitlines()[-num_lines:])

    def request_stop(self) -> None:
        """Ask the training to save a checkpoint at the next step boundary and end; returns at once."""
        self.folder.request_stop()

    def stop(self, timeout_s: float = 60.0) -> int:
        """End the training: by its STOP file, after `timeout_s` by SIGTERM, after as long again by SIGKILL.

        Returns:
            The exit code; 0 where the training saved its checkpoint and ended by itself.
        """
        if not self._ended_within(timeout_s, asking=True):
            _signal(self._process, self._lock, signal.SIGTERM)
            if not self._ended_within(timeout_s):
                _kill_group(self._process, self._lock)
        self._ended_within(EXIT_GRACE_S)
        return self._process.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the training has finished or was stopped.

        Raises:
            RunError: it failed (with the end of its log), or still runs after `timeout_s` seconds.
        """
        if not self._ended_within(timeout_s):
            raise RunError(
                f"run {self.folder.path}",
                f"it still runs after {timeout_s:g} s",
                "Wait longer, or end it with .stop()",
            )
        self.raise_on_failure()

    def raise_on_failure(self) -> None:
        """Nothing where the training runs, finished or was stopped.

        Raises:
            RunError: it ended otherwise; the message holds the end of its log.
        """
        code = self.poll()
        if not code:
            return
        reason = f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it failed with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        tail = self.log_tail() or "(nothing)"
        raise RunError(
            f"run {self.folder.path}",
            f"{reason}{hint}; the end of its log:\n{tail}\n",
            f"Mend the cause and start it again; the whole log is {self.log_file}",
        )

    def _ended_within(self, timeout_s: float | None, asking: bool = False) -> bool:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.alive:
            if asking:  # again and again: a training that just starts may clear an older STOP file
                self.request_stop()
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True

    def __repr__(self) -> str:
        code = self.poll()
        state = f"process {self.pid} is running" if code is None else f"ended with exit code {code}"
        return f"BackgroundRun({self.folder.path}: {state})"


def start_training(config: RunConfig) -> BackgroundRun:
    """Start `biokit train` on this configuration in a process of its own and return at once.

    Raises:
        RunError: the run folder cannot be made, or a training that this process started still runs in it.
    """
    from biokit.config import config_to_yaml

    folder = RunFolder(config.run_dir)
    folder.create()
    asked = folder.logs / "config_asked.yaml"
    asked.write_text(config_to_yaml(config), encoding="utf-8")
    return start_module(folder, "biokit", ["train", str(asked)])


def start_module(
    folder: RunFolder, module: str, arguments: list[str], variables: Mapping[str, str] | None = None
) -> BackgroundRun:
    """Start `python -m module arguments...` as the training of a run folder; output goes to `logs/train.log`.

    Args:
        variables: what its environment has beside this process's own.

    Raises:
        RunError: the run folder cannot be made, or a training that this process started still runs in it.
    """
    folder.create()
    key = folder.path.resolve()
    other = _live[key]() if key in _live else None
    if other is not None and other.alive:
        raise RunError(
            f"start a training in {folder.path}",
            f"process {other.pid} is training there",
            "Stop it with .stop(), or give another run_dir",
        )
    folder.clear_stop()
    command = [sys.executable, "-m", "biokit.launch.background", str(os.getpid()), module, *arguments]
    fixed = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "TQDM_DISABLE": "1"}
    environment = {**os.environ, **(variables or {}), **fixed}
    log_file = folder.logs / "train.log"
    started = time.time()
    with log_file.open("ab") as log:
        log_start = log.tell()
        process = _starter.submit(
            subprocess.Popen,
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ).result()
    run = BackgroundRun(folder, process, log_file, log_start, started)
    _live[key] = weakref.ref(run)
    return run


def _poll(process: subprocess.Popen[bytes], lock: threading.Lock) -> int | None:
    """Exit code or None. What is left of the group is killed before the leader's id becomes free for others."""
    with lock:
        if process.returncode is None:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode


def _signal(process: subprocess.Popen[bytes], lock: threading.Lock, number: int) -> None:
    with lock:
        if process.returncode is None:
            os.kill(process.pid, number)


def _kill_group(process: subprocess.Popen[bytes], lock: threading.Lock) -> None:
    with lock:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], lock: threading.Lock) -> None:
    """SIGTERM, then SIGKILL: when the handle is collected and when Python ends."""
    if _poll(process, lock) is not None:
        return
    _signal(process, lock, signal.SIGTERM)
    end = time.monotonic() + EXIT_GRACE_S
    while _poll(process, lock) is None and time.monotonic() < end:
        time.sleep(POLL_S)
    _kill_group(process, lock)
    process.wait()


def end_with(parent_pid: int) -> None:
    """Make this process end when `parent_pid` is gone; called in the child, before anything else."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the signal was asked for
        sys.exit(f"the process {parent_pid} that asked for this training is gone")
    atexit.register(_kill_orphans, parent_pid)
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True, name="biokit-watch-parent").start()


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _kill_orphans(parent_pid: int) -> None:
    """Last act of a child whose parent is gone: its own processes (data workers) have nobody else to end them."""
    if os.getppid() != parent_pid:
        os.killpg(os.getpgid(0), signal.SIGKILL)


def _main(arguments: list[str]) -> None:
    parent_pid, module, *rest = arguments
    end_with(int(parent_pid))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
