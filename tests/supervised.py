"""Starts supervisors with short patience in processes of their own, for the tests of what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil

from biokit.launch.orders import Order, write_order
from biokit.launch.states import SupervisorState, read_state
from biokit.launch.supervision.supervisor import Limits
from biokit.runs import RunFolder

SHORT = Limits(checkpoint_s=20.0, grace_s=1.0, interrupt_s=0.5)
MARK = "BIOKIT_TEST_TREE"  # variable that every process of a tree inherits: what is left of it is found by that
BODY = """
import sys
from biokit.launch.orders import read_order
from biokit.launch.supervision.supervisor import Limits, supervise
from biokit.runs import RunFolder

folder = RunFolder(sys.argv[1])
limits, in_terminal = Limits(**eval(sys.argv[3])), sys.argv[4] == "True"
sys.exit(supervise(folder, read_order(folder), owner=int(sys.argv[2]), limits=limits, in_terminal=in_terminal))
"""


class Supervised:
    """A run under a supervisor that this process started."""

    def __init__(
        self, path: Path, order: Order, limits: Limits = SHORT, in_terminal: bool = False, **variables: str
    ) -> None:
        self.folder = RunFolder(path)
        self.folder.create()
        write_order(self.folder, order)
        self.mark = f"{MARK}={path.name}-{time.time_ns()}"
        name, value = self.mark.split("=")
        state_home = {"XDG_STATE_HOME": str(path.parent / "state")}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **state_home, **variables, name: value}
        with (self.folder.logs / "supervisor.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BODY, str(path), str(os.getpid()), repr(asdict(limits)), str(in_terminal)],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self, timeout_s: float = 60.0) -> int:
        """The supervisor's exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running:\n{self.log}\n{self.output()}") from None

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        """Return when a condition holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                raise AssertionError(f"the awaited state did not come:\n{self.log}\n{self.output()}")
            time.sleep(0.02)

    @property
    def state(self) -> SupervisorState:
        state = read_state(self.folder)
        assert state is not None
        return state

    @property
    def log(self) -> str:
        return (self.folder.logs / "supervisor.log").read_text(encoding="utf-8")

    def output(self, rank: int = 0, life: int = 1) -> str:
        """What a rank has printed so far."""
        path = self.folder.life(life).output_file(rank)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def left(self) -> list[int]:
        """Processes of this tree that live."""
        return find_marked(self.mark)

    def kill(self) -> None:
        """For tests that failed."""
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def find_marked(mark: str) -> list[int]:
    """Living processes whose environment holds `NAME=value`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if mark.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            if psutil.Process(int(folder.name)).status() != psutil.STATUS_ZOMBIE:
                found.append(int(folder.name))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found
