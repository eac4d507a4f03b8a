"""Waits for a cell that runs on all warm ranks, and gets the others back where one failed or somebody interrupted."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from biokit import stacks
from biokit.launch.warm.members import Member, receive_any
from biokit.launch.warm.messages import FAILED, INTERRUPTED
from biokit.runs import LifeFolder
from biokit.stacks import Hang

POLL_S = 0.02
PATIENCE_S = 1.0  # that the others may go on after a rank failed
RETURN_S = 1.0  # from SIGINT until a rank is taken for stuck in a collective
ASK_S = 0.8  # for where the ranks stand
LEAVE_S = 1.5  # for it to leave the collective, until it is given up
BUSY, GONE = "busy", "gone"  # beside what a rank tells itself


class CellWatch:
    """One cell on its way.

    Attributes:
        states: of each rank: busy, gone, or how it says the cell ended there.
        interrupted: by the user.
        stuck: a rank was got out of a collective by force: the process groups are broken.
        given_up: ranks are gone, do not come back, or the time is up: the pool is to be ended.
        hang: where the ranks stood when the time was up, or before one was got out of a collective.
    """

    def __init__(self, members: Sequence[Member], life: LifeFolder, is_supervised: Callable[[], bool]) -> None:
        self.members, self._life, self._is_supervised = members, life, is_supervised
        self.states = {member.rank: BUSY for member in members}
        self.interrupted = self.stuck = self.given_up = False
        self.hang: Hang | None = None

    def watch(self, message: Mapping[str, Any], timeout_s: float, look: Callable[[], object]) -> None:
        """Return when the cell has ended everywhere, or the rest is given up. An interrupt is taken for the cell's.

        Args:
            message: that has them begin.
            timeout_s: 0: none.
            look: called many times a second.
        """
        try:
            for member in self.members:
                member.send(message)
            self._wait(timeout_s, look)
        except KeyboardInterrupt:
            self.interrupted = True
        try:
            if self.busy and not self.given_up:
                self._call_back(look)
        except KeyboardInterrupt:  # again: somebody is in a hurry
            self.interrupted = self.given_up = True
        look()

    @property
    def busy(self) -> list[Member]:
        """Ranks whose cell has not ended."""
        return [member for member in self.members if self.states[member.rank] == BUSY]

    def ranks(self, state: str) -> list[int]:
        """Ranks in a state."""
        return [rank for rank, found in self.states.items() if found == state]

    def _wait(self, timeout_s: float, look: Callable[[], object]) -> None:
        end = time.monotonic() + timeout_s if timeout_s else math.inf
        others_until = math.inf
        while self.busy and not self.given_up and (now := time.monotonic()) < others_until:
            self._listen(look)
            if self.ranks(FAILED) or self.ranks(INTERRUPTED):
                others_until = min(others_until, now + PATIENCE_S)
            if now > end:
                self.hang = stacks.find_hang(self._life, f"the cell did not end in {timeout_s:g} s")
                self.given_up = True

    def _call_back(self, look: Callable[[], object]) -> None:
        """Interrupt who still runs; who waits in a collective, and hears nothing, is got out of it."""
        for member in self.busy:
            member.signal(signal.SIGINT)
        self._listen_for(RETURN_S, look)
        if self.busy and not self.given_up:
            self.stuck = True
            self.hang = self._find_stuck()
        for member in self.busy:
            member.send({"do": "break", "peers": [other.process.pid for other in self.members if other is not member]})
        self._listen_for(LEAVE_S, look)
        self.given_up |= bool(self.busy)

    def _find_stuck(self) -> Hang:
        """Where those stand that do not come back."""
        hang = stacks.find_hang(self._life, "the others did not come", wait_s=ASK_S)
        busy = tuple(stack for stack in hang.ranks if self.states.get(stack.rank) == BUSY)
        return replace(hang, ranks=busy, verdict=stacks.describe(busy))

    def _listen_for(self, seconds: float, look: Callable[[], object]) -> None:
        end = time.monotonic() + seconds
        while self.busy and not self.given_up and time.monotonic() < end:
            self._listen(look)

    def _listen(self, look: Callable[[], object]) -> None:
        for member, message in receive_any(self.busy, POLL_S):
            self.states[member.rank] = str(message.get("state", GONE))
        self.given_up |= bool(self.ranks(GONE)) or not self._is_supervised()
        look()
