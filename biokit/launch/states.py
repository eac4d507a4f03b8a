"""Where a supervisor stands, as the file that it rewrites every few seconds."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import psutil

from biokit.launch.tree import find_process
from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import read_object, to_number, to_text, to_whole

STARTING, RUNNING, WAITING, ENDED = "starting", "running", "waiting", "ended"
FINISHED, STOPPED, FAILED, TIMED_OUT, INTERRUPTED = "finished", "stopped", "failed", "timed out", "interrupted"
EXIT_CODES = {FINISHED: 0, STOPPED: 0, FAILED: 1, TIMED_OUT: 124, INTERRUPTED: 130}
LOST_S = 30.0  # a supervisor of another machine that was silent for so long is gone


@dataclass
class SupervisorState:
    """What `supervisors/node_NNNN.json` holds; times are unix seconds.

    Attributes:
        state: `starting`, `running` (a life), `waiting` (for the next), `ended`.
        outcome: once it ended: `finished`, `stopped`, `failed`, `timed out` or `interrupted`; empty before.
        pid: of the supervisor; with `pid_started` and `host` it cannot be mistaken.
        life: the newest launch, 0: none yet; `first_life`: this supervisor's first.
        max_lives: launches that this supervisor may make.
        beat: when this was written.
        code: the supervisor's exit code, once it ended.
        next_life_at: while it waits.
    """

    state: str = STARTING
    outcome: str = ""
    pid: int = 0
    pid_started: float = 0.0
    host: str = ""
    life: int = 0
    first_life: int = 0
    max_lives: int = 1
    started: float = 0.0
    ended: float = 0.0
    beat: float = 0.0
    code: int | None = None
    next_life_at: float = 0.0

    @classmethod
    def of_this_process(cls, max_lives: int) -> SupervisorState:
        """A supervisor that starts."""
        started = psutil.Process().create_time()
        return cls(
            pid=os.getpid(),
            pid_started=started,
            host=socket.gethostname(),
            max_lives=max_lives,
            started=time.time(),
        )

    @property
    def is_lost(self) -> bool:
        """Whether the supervisor is gone although it never said that it ended."""
        if self.state == ENDED:
            return False
        if self.host == socket.gethostname():
            return find_process(self.pid, self.pid_started) is None
        return time.time() - self.beat > LOST_S

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be expected of it any more."""
        return self.state == ENDED or self.is_lost


def write_state(folder: RunFolder, state: SupervisorState, node: int = 0) -> None:
    """Replace the file of a node's supervisor, with the time of now."""
    state.beat = time.time()
    write_atomically(folder.supervisor_file(node), json.dumps(asdict(state), indent=1) + "\n")


def read_state(folder: RunFolder, node: int = 0) -> SupervisorState | None:
    """Where the supervisor of a node stands; None: there was none, or it has not come up yet."""
    values = read_object(folder.supervisor_file(node))
    if not values:
        return None
    read: dict[Any, Callable[[Any], Any]] = {"str": to_text, "int": to_whole, "float": to_number}
    read["int | None"] = lambda code: None if code is None else to_whole(code)
    known = [f for f in fields(SupervisorState) if f.name in values]
    return SupervisorState(**{f.name: read[f.type](values[f.name]) for f in known})
