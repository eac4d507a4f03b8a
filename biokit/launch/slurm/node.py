"""One node's part in a life under Slurm: `python -m biokit.launch.slurm.node RUN_DIR LIFE ENDPOINT`, by srun.

It starts torchrun's agent of this node, looks after the ranks as the supervisor does on its own node, and ends them
when the supervisor says that the life is over, or says nothing any more: a killed srun tells nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from biokit import stacks
from biokit.launch import states
from biokit.launch.orders import NODES, Order, read_order
from biokit.launch.rendezvous import find_local_address, network_variables
from biokit.launch.supervision.agent_file import PARENT
from biokit.launch.supervision.lives import Life
from biokit.launch.supervision.supervisor import Limits, say
from biokit.launch.supervision.watchdog import Watchdog
from biokit.launch.tree import become_subreaper, end_with
from biokit.runs import RunFolder

LOOK_S = 1.0  # between two looks at the supervisor's file
SILENT_S = 60.0  # a supervisor that has not rewritten its file for so long is gone
CUT = 143
ASK_BEFORE_S = 1.0  # the ranks of other nodes are asked where they stand a moment before the time is up


class Leader:
    """The supervisor as this node sees it: through its file. Clocks of two hosts are not compared."""

    def __init__(self, folder: RunFolder, number: int) -> None:
        self.folder, self.number = folder, number
        self.started = 0.0
        self._beat, self._beat_at, self._looked_at = 0.0, time.monotonic(), 0.0
        self._gone = ""

    def gone(self) -> str:
        """Why this life is over for the supervisor; empty while it is not."""
        now = time.monotonic()
        if self._gone or now - self._looked_at < LOOK_S:
            return self._gone
        self._looked_at = now
        said = states.read_state(self.folder)
        if said is not None:
            self.started = said.started
            if said.beat != self._beat:
                self._beat, self._beat_at = said.beat, now
            if said.life > self.number or (said.life == self.number and said.state != states.RUNNING):
                self._gone = f"the supervisor has gone on: {said.state}"
        if now - self._beat_at > SILENT_S:
            self._gone = f"the supervisor has said nothing for {SILENT_S:g} s"
        return self._gone


class Node:
    """This node's processes of a life."""

    def __init__(self, folder: RunFolder, number: int, endpoint: str, node: int) -> None:
        self.order, self.node = read_order(folder), node
        self.leader, self.limits = Leader(folder, number), Limits()
        self.life = Life(folder, _placed(self.order, endpoint), number, node, [])
        self._watchdog = Watchdog(self.life, self.limits.watchdog_s)
        self._told_at = 0.0
        self._asked_ranks = False

    def run(self) -> int:
        """To the end of the life here; the exit code for srun."""
        signal.signal(signal.SIGTERM, self._note_signal)
        signal.signal(signal.SIGINT, self._note_signal)
        why, told = "", False
        while not why and not self.life.is_over:
            time.sleep(self.limits.poll_s)
            self._ask_ranks(self._watchdog.look())
            if self._told_at and not told and self.order.saves_on_sigterm and self.order.kind != "train":
                told = True  # there is no STOP file that it would see
                self.life.terminate()
            why = self._watchdog.fault or self.leader.gone() or self._too_late()
        code = self.life.codes()[0]
        if why:
            say(f"node {self.node}: {why}")
        self.life.end(0 if self._watchdog.fault else self.limits.grace_s)
        return CUT if code is None else code if 0 <= code < 128 else 1

    def _too_late(self) -> str:
        """SIGTERM goes to all nodes and to the supervisor alike, which gives a training time for its checkpoint."""
        patience_s = self.limits.checkpoint_s if self.order.saves_on_sigterm else 0.0
        return "terminated" if self._told_at and time.monotonic() - self._told_at > patience_s else ""

    def _ask_ranks(self, reason: str) -> None:
        """Have the ranks of this node write down where they stand; the supervisor reads that on its node."""
        due = self.leader.started + self.order.timeout_s - ASK_BEFORE_S
        if not reason and self.order.timeout_s and self.leader.started and not self._asked_ranks and time.time() > due:
            reason, self._asked_ranks = "the time is up", True
        if reason and self.node:
            stacks.find_hang(self.life.files, reason)

    def _note_signal(self, _number: int, _frame: Any) -> None:
        self._told_at = self._told_at or time.monotonic()


def _placed(order: Order, endpoint: str) -> Order:
    """The order for this node alone: its agent meets the others there."""
    variables = {**network_variables(find_local_address(endpoint)), **order.environment}
    return replace(order, placement=NODES, endpoint=endpoint, environment=variables)


def main(words: list[str]) -> int:
    """The command line."""
    os.environ.pop(PARENT, None)  # the supervisor's, on another host
    end_with(os.getppid())
    become_subreaper()
    run_dir, number, endpoint = words
    return Node(RunFolder(Path(run_dir)), int(number), endpoint, int(os.environ["SLURM_NODEID"])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
