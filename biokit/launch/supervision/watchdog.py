"""Notices what torchrun's agents do not: a rank that is stopped, an agent that hangs although its rank is dead."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from biokit import failures
from biokit.launch.supervision.lives import Life
from biokit.launch.tree import find_process
from biokit.safe_files import read_object

LOOK_S, ERRORS_S = 1.0, 0.2  # between two looks at the ranks' processes, and at their error files
SILENT_S = 0.4  # after a rank lost a peer, in which the others may raise too
ALIVE, STOPPED, ZOMBIE, GONE = "alive", "stopped", "zombie", "gone"


@dataclass
class _Seen:
    """A rank of this host that was once seen alive, and how it is."""

    process: psutil.Process
    who: dict[str, Any]
    state: str = ALIVE

    def look(self) -> None:
        try:
            status = self.process.status() if self.process.is_running() else ""
        except psutil.NoSuchProcess:
            status = ""
        named = {psutil.STATUS_STOPPED: STOPPED, psutil.STATUS_ZOMBIE: ZOMBIE, psutil.STATUS_DEAD: GONE, "": GONE}
        self.state = named.get(status, ALIVE)

    @property
    def died(self) -> bool:
        """Whether it ended, and not at the end of its program."""
        return self.state in (ZOMBIE, GONE) and self.who.get("code") != 0


class Watchdog:
    """Looks after the processes of a life; a state that lasts too long is a fault.

    Attributes:
        fault: why the life must be ended; empty while all is well.
    """

    def __init__(self, life: Life, patience_s: float) -> None:
        self.life, self.patience_s = life, patience_s
        self.fault = ""
        self._seen: dict[int, _Seen] = {}
        self._elsewhere: set[int] = set()
        self._held: dict[str, float] = {}
        self._looked_at = self._errors_at = time.monotonic()
        self._lost_peer_at = 0.0
        self._asked = False

    def look(self) -> str:
        """Look where it is time to; why to ask the ranks where they stand, or empty."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_S:
            # what was not observed does not count: the whole machine may have been asleep
            self._look_at_ranks(min(now - self._looked_at, 2 * LOOK_S))
            self._looked_at = now
        if now - self._errors_at >= ERRORS_S and not self._asked:
            self._errors_at = now
            return self._look_for_hang(now)
        return ""

    def _look_at_ranks(self, passed_s: float) -> None:
        self._meet_ranks()
        for seen in self._seen.values():
            seen.look()
        lasting = self._find_faults()
        self._held = {text: self._held.get(text, 0.0) + passed_s for text in lasting}
        self.fault = next((text for text, held_s in self._held.items() if held_s >= self.patience_s), "")

    def _meet_ranks(self) -> None:
        """Take up ranks that have come up, or come up again."""
        for rank in _numbers(self.life.files.rank_file(0).parent):
            if rank in self._elsewhere:
                continue
            who = read_object(self.life.files.rank_file(rank))
            if rank in self._seen and self._seen[rank].who["pid"] == who.get("pid"):
                self._seen[rank].who = who
            elif who.get("host") != socket.gethostname():
                self._elsewhere.add(rank)
            else:
                process = find_process(int(who["pid"]), float(who["pid_started"]))
                if process is not None:  # else not of this machine, whatever its name: never judged
                    self._seen[rank] = _Seen(process, who)

    def _find_faults(self) -> list[str]:
        """What may not last."""
        faults = []
        for rank, seen in self._seen.items():
            if seen.state == STOPPED:
                faults.append(f"rank {rank} is stopped (SIGSTOP)")
            elif seen.state == ZOMBIE:  # torchrun's agent asks ten times a second
                faults.append(f"rank {rank} has ended, but its agent does not notice")
            elif seen.died and self.life.is_training and not self.life.is_elastic:
                faults.append(f"rank {rank} is gone, but its agent does not end")
        faults += [f"node {node}: the agent has told its end, but is still there" for node in self.life.lingering()]
        if self.life.is_elastic:  # its agents wait for others, or for nodes that come later, as long as they like
            return faults
        for rank in self._failed():
            faults.append(f"rank {rank} has failed, but its agent does not end")
        if any(self.life.poll()):
            faults.append("an agent has failed, but another one does not end")
        states = {seen.state for seen in self._seen.values()}
        if states == {GONE} and self.life.is_alone and not self._elsewhere:
            faults.append("all ranks are gone, but their agent does not end")
        return faults

    def _failed(self) -> list[int]:
        return _numbers(self.life.files.error_file(0).parent)

    @property
    def rank_is_stopped(self) -> bool:
        """Whether a rank of this host was stopped at the last look."""
        return any(seen.state == STOPPED for seen in self._seen.values())

    def _look_for_hang(self, now: float) -> str:
        """A rank lost its peers, none of which is gone: one of them hangs, and can still be asked where."""
        failed = self._failed()
        if not failed or self._elsewhere:
            return ""
        if not self._lost_peer_at:
            self._lost_peer_at = now
        if now - self._lost_peer_at < SILENT_S:
            return ""
        self._asked = True
        if not all(read_object(self.life.files.error_file(rank)).get("is_effect") for rank in failed):
            return ""
        self._meet_ranks()
        for seen in self._seen.values():
            seen.look()
        others = [seen for rank, seen in self._seen.items() if rank not in failed]
        if not others or any(seen.died for seen in others):
            return ""
        error = failures.error_from(read_object(self.life.files.error_file(failed[0])))
        at = f" ({error.place})" if error.place else ""
        return f"rank {failed[0]} waited in vain for the others{at}"


def _numbers(folder: Path) -> list[int]:
    """The ranks that have a file in a folder."""
    found = (path.stem.removeprefix("rank_") for path in folder.glob("rank_*.json"))
    return sorted(int(name) for name in found if name.isascii() and name.isdecimal())
