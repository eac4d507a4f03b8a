"""A trial of an end: whose processes belong to it, and which of them are left afterwards.

A process belongs to a trial when a variable of its environment has the trial's random value: whatever its name, its
session and its parent are by then.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.kernel import REPOSITORY, Kernel, open_kernel

MARK = "BIOKIT_TRIAL_MARK"
LEFT_S = 10.0  # after which nothing may be left
READY_S = 120.0  # for the ranks of a trial to come up
REPLY_S = 20.0  # for a cell to end after it was interrupted, or lost its run


@dataclass
class Trial:
    """One trial: its folder, the mark of its processes, and what was wrong."""

    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    faults: list[str] = field(default_factory=list)
    num_left: int = 0
    done_at: float = 0.0

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of the first process has beside this one's; all others inherit it."""
        state = str(self.folder / "state")  # the list of runs
        return {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "XDG_STATE_HOME": state}

    def ready(self, name: str) -> str:
        """Path of the files by which the ranks of a program say that they are up."""
        return str(self.folder / f"ready_{name}_")

    def wait_ready(self, *names: str, num_ranks: int = 2, alive: Callable[[], bool] = lambda: True) -> None:
        """Until all ranks of these programs are up."""
        end = time.monotonic() + READY_S
        wanted = [Path(f"{self.ready(name)}{rank}") for name in names for rank in range(num_ranks)]
        while missing := [path.name for path in wanted if not path.exists()]:
            if time.monotonic() > end or not alive():
                self.faults.append(f"they did not come up: {', '.join(missing)}")
                return
            time.sleep(0.02)
        found = [process for process in self.list_left() if "biokit.launch.supervision.rank" in describe(process)]
        if len(found) < len(wanted):
            self.faults.append(f"{len(wanted)} ranks are up, and {len(found)} of them are seen")

    def begin_count(self) -> None:
        """The deed is done: the time runs."""
        self.done_at = time.monotonic()

    def check_left(self, spared: Collection[int] = (), limit_s: float = LEFT_S) -> None:
        """Note who is left that many seconds after the deed (else from now), and kill them."""
        end = (self.done_at or time.monotonic()) + limit_s
        self.done_at = 0.0
        while (left := self.list_left(spared)) and time.monotonic() < end:
            time.sleep(0.05)
        self.num_left += len(left)
        self.faults += [f"left after {limit_s:g} s: {process.pid} {describe(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def list_left(self, spared: Collection[int] = ()) -> list[psutil.Process]:
        """Living processes of this trial but these."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) not in spared:
                with contextlib.suppress(OSError, psutil.Error):  # empty for zombies, which are nobody any more
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(psutil.Process(int(folder.name)))
        return found


def describe(process: psutil.Process) -> str:
    """Its command line in short."""
    try:
        return " ".join(process.cmdline()[1:6])[:160]
    except psutil.Error:
        return "(gone)"


class TrialKernel:
    """A kernel of a trial, whose cells run while the trial goes on."""

    def __init__(self, trial: Trial, kernel: Kernel) -> None:
        self.trial, self.manager, self.client = trial, kernel.manager, kernel.client

    @property
    def pid(self) -> int:
        """Of the kernel's process."""
        return int(self.manager.provisioner.pid)  # type: ignore[union-attr]

    def begin(self, code: str) -> str:
        """Have a cell run; its message id."""
        return str(self.client.execute(code, allow_stdin=False))

    def end(self, message: str, timeout_s: float = REPLY_S) -> dict[str, Any]:
        """The reply of a cell; a fault, and empty, where it does not end in time."""
        end = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Empty):
            while (left := end - time.monotonic()) > 0:
                reply = self.client.get_shell_msg(timeout=left)
                if reply["parent_header"].get("msg_id") == message:
                    return dict(reply["content"])
        self.trial.faults.append(f"a cell did not end in {timeout_s:g} s")
        return {}

    def run(self, code: str, timeout_s: float = READY_S) -> None:
        """Run a cell that is to succeed."""
        reply = self.end(self.begin(code), timeout_s)
        while reply.get("status") == "aborted":  # what comes right after a failed cell is sent away
            reply = self.end(self.begin(code), timeout_s)
        if reply.get("status") != "ok":
            self.trial.faults.append(f"{code.splitlines()[0]}: {reply.get('ename')}: {reply.get('evalue')}")

    def expect_error(self, message: str, names: Collection[str] = ()) -> None:
        """The cell must fail, and the kernel go on."""
        reply = self.end(message)
        if reply and (reply.get("status") != "error" or (names and reply.get("ename") not in names)):
            self.trial.faults.append(f"the cell ended with {reply.get('status')} {reply.get('ename')}")
        self.run("assert 1 + 1 == 2")

    def restart(self) -> None:
        """As the button does."""
        self.manager.restart_kernel(now=False)
        self.client.wait_for_ready(timeout=READY_S)


@contextlib.contextmanager
def trial_kernel(trial: Trial) -> Iterator[TrialKernel]:
    """A kernel with biokit's magics; nothing of it may be left afterwards."""
    with open_kernel(trial.folder, **trial.variables) as kernel:
        yield TrialKernel(trial, kernel)
    trial.check_left()
