"""Where the ranks of a run stand: asked of them while they hang, and said in words.

A rank writes its Python stacks with faulthandler, from C, at SIGUSR1 and at a fatal signal: so it answers in a
collective, in a loop and while it holds Python's lock. Who asks reads `/proc`; elsewhere than on Linux less is known.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import psutil

from biokit.frames import STANDARD_LIBRARY, Frame, add_code, find_own, frames_from, shorten
from biokit.runs import LifeFolder, RunFolder, write_atomically
from biokit.safe_files import MAX_LINE, read_end, read_object, read_saved, to_list, to_number, to_text, to_whole

MAX_RANKS = 4096
REQUEST = signal.SIGUSR1
LOOK_S, POLL_S = 0.5, 0.05
FRESH_S = 60.0  # the supervisors of several nodes ask at about the same time, each its own ranks
SAME_START_S = 2.0  # two readings of when a process began differ by less
BUSY_SHARE = 0.25  # of a core: a rank that waits in a collective takes less
STATES = WAITS, ELSEWHERE, STOPPED, DEAD, SILENT, ABSENT = "waits", "elsewhere", "stopped", "dead", "silent", "absent"

_HEAD = re.compile(r"(Current thread|Thread) 0x([0-9a-f]+)(?: \[.*\])? \(most recent call first\):")
_LINE = re.compile(r'  File "(.*)"(?:\.\.\.)?, line (\d+|\?\?\?) in (.*)')
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_OWN_WAITS = {
    "_meet": "a meeting of all ranks",
    "main_first": "a wait for rank 0",
}  # of parallel/processes.py, which polls
_STORE_CALL = re.compile(r"store(?:\(\))?\.(get|wait|add)\(", re.IGNORECASE)
_kept: list[IO[str]] = []  # faulthandler writes to the file's number: it must stay open


@dataclass(frozen=True)
class Thread:
    """One thread in a dump: innermost frame first. `current` is the one that a fatal signal met."""

    number: str
    current: bool
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class RankStack:
    """Where one rank stood.

    Attributes:
        state: `waits` in a collective, is `elsewhere`, is `stopped` (SIGSTOP), `dead`, `silent` (it did not answer),
            `absent` (on another host, which was not asked).
        collective: what it waits in, in words.
        busy: it computes.
        own: index in `frames` of the innermost line of the user's own code; -1: none.
        frames: of the main thread, innermost first.
    """

    rank: int
    state: str
    host: str = ""
    pid: int = 0
    collective: str = ""
    busy: bool = False
    own: int = -1
    frames: tuple[Frame, ...] = ()

    @property
    def place(self) -> str:
        """The user's own line, in few words."""
        return self.frames[self.own].place if self.own >= 0 else self.frames[0].place if self.frames else ""


@dataclass(frozen=True)
class Hang:
    """Where every rank of a life stood when it did not go on; `time` is unix time."""

    reason: str
    verdict: str
    life: int
    time: float
    ranks: tuple[RankStack, ...] = ()


def answer_requests(path: Path) -> None:
    """Have this process append its Python stacks to a file at SIGUSR1 and at a fatal signal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    faulthandler.enable(file, all_threads=True)
    faulthandler.register(REQUEST, file=file, all_threads=True, chain=False)
    for old in _kept:
        old.close()
    _kept[:] = [file]


def find_hang(life: LifeFolder, reason: str, wait_s: float = 2.0) -> Hang:
    """Ask every rank of this host where it stands, and say who waits for whom.

    Args:
        reason: why they are asked, for the card.
        wait_s: for the answers; a rank that gives none by then is said to be silent.
    """
    ranks = tuple(_ask([_Asked(life, rank, who) for rank, who in read_ranks(life).items()], wait_s))
    number = life.path.name
    return Hang(reason, describe(ranks), int(number) if number.isdecimal() else 0, time.time(), ranks)


class _Asked:
    """A rank while it is asked. Nobody is signalled but the very process that wrote the rank's file."""

    def __init__(self, life: LifeFolder, rank: int, who: Mapping[str, Any]) -> None:
        self.rank, self.host, self.pid = rank, to_text(who.get("host"), 200), to_whole(who.get("pid"))
        self.file = life.stack_file(rank)
        self.start, self.state = _size(self.file), ""
        self.seen: list[tuple[float, float, bool]] = []  # (monotonic time, CPU seconds, running) since its answer
        self.process: psutil.Process | None = None
        if self.host != socket.gethostname():
            self.state, self.start = ABSENT, 0
            return
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - to_number(who.get("pid_started"))) < SAME_START_S
            status = process.status()
            if not same or status == psutil.STATUS_ZOMBIE:
                self.state = DEAD
            elif status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                self.state = STOPPED
            elif not _catches_request(self.pid):
                self.state = SILENT
            else:
                process.send_signal(REQUEST)
                self.process = process
        except (psutil.Error, ValueError, OverflowError):
            self.state = DEAD

    def look(self) -> int:
        """Note what it does; the size of its answer so far, in bytes."""
        size = _size(self.file) - self.start
        if self.process is not None and size > 0:  # writing the answer is not what it does else
            with contextlib.suppress(psutil.Error):
                times, running = self.process.cpu_times(), self.process.status() == psutil.STATUS_RUNNING
                self.seen.append((time.monotonic(), times.user + times.system, running))
        return size

    @property
    def busy(self) -> bool:
        """It computes, or would where it had a core to itself."""
        if len(self.seen) < 3:
            return False
        (first_s, first_cpu_s, _), (last_s, last_cpu_s, _) = self.seen[0], self.seen[-1]
        ran = sum(running for _, _, running in self.seen) > len(self.seen) / 2
        return ran or last_cpu_s - first_cpu_s > BUSY_SHARE * (last_s - first_s)

    def read_answer(self) -> RankStack:
        """What is known of it by now."""
        answered = self.process is not None or (self.state == ABSENT and _is_fresh(self.file))
        threads = parse_dump(read_end(self.file, start=self.start)) if answered else ()
        if not threads or all(frame.is_starter for frame in threads[-1].frames):
            alive = self.process is not None and self.process.is_running()
            return RankStack(self.rank, self.state or (SILENT if alive else DEAD), self.host, self.pid)
        *others, main = threads
        frames = shorten(add_code(frame for frame in main.frames if not frame.is_starter))
        collective = find_collective((*others, replace(main, frames=frames)), self.busy)
        state = WAITS if collective else ELSEWHERE
        return RankStack(self.rank, state, self.host, self.pid, collective, self.busy, find_own(frames), frames)


def _ask(asked: Sequence[_Asked], wait_s: float) -> list[RankStack]:
    """Wait until all that were signalled have answered, and long enough to see which of them compute."""
    started = time.monotonic()
    before: list[int] = []
    signalled = any(one.process is not None for one in asked)
    while signalled and (spent_s := time.monotonic() - started) < wait_s:
        sizes = [one.look() for one in asked]
        pending = [one for one, size in zip(asked, sizes, strict=True) if one.process is not None and size <= 0]
        if sizes == before and not pending and spent_s >= LOOK_S:
            break
        before = sizes
        time.sleep(POLL_S)
    return [one.read_answer() for one in asked]


def read_ranks(life: LifeFolder) -> dict[int, dict[str, Any]]:
    """What the ranks of a life wrote of themselves, by rank."""
    found = {}
    for path in islice(sorted(life.rank_file(0).parent.glob("rank_*.json")), MAX_RANKS):
        number = path.stem.removeprefix("rank_")
        if number.isascii() and number.isdecimal() and (who := read_object(path)):
            found[int(number)] = who
    return dict(sorted(found.items()))


def save_hang(folder: RunFolder, hang: Hang) -> None:
    """Write `hang.json`."""
    write_atomically(folder.hang_file, json.dumps(asdict(hang), indent=1) + "\n")


def read_hang(folder: RunFolder) -> Hang | None:
    """What `save_hang` wrote; None where nothing hung.

    Raises:
        RunError: the file is not what `save_hang` writes.
    """
    found = read_saved(folder.hang_file)
    if found is None:
        return None
    return hang_from(found)


def hang_from(found: dict[str, Any]) -> Hang:
    """A hang out of JSON, whatever it is."""
    ranks = (_rank_from(entry) for entry in to_list(found.get("ranks"), MAX_RANKS) if isinstance(entry, dict))
    reason, verdict = to_text(found.get("reason")), to_text(found.get("verdict"), 4 * MAX_LINE)
    return Hang(reason, verdict, to_whole(found.get("life")), to_number(found.get("time")), tuple(ranks))


def _rank_from(found: dict[str, Any]) -> RankStack:
    frames = frames_from(found.get("frames"))
    state = to_text(found.get("state"), 20)
    return RankStack(
        to_whole(found.get("rank")),
        state if state in STATES else SILENT,
        to_text(found.get("host"), 200),
        to_whole(found.get("pid")),
        to_text(found.get("collective"), 200),
        found.get("busy") is True,
        min(max(-1, to_whole(found.get("own"), -1)), len(frames) - 1),
        frames,
    )


def parse_dump(text: str) -> tuple[Thread, ...]:
    """The threads of the last dump in what faulthandler wrote; the main thread stands last."""
    threads: list[Thread] = []
    for line in text.splitlines():
        if head := _HEAD.fullmatch(line):
            threads.append(Thread(head[2], head[1] == "Current thread", ()))
        elif threads and (found := _LINE.fullmatch(line)):
            number = int(found[2]) if found[2].isdecimal() else 0
            frame = Frame(_unescape(found[1]), number, _unescape(found[3]))
            threads[-1] = replace(threads[-1], frames=(*threads[-1].frames, frame))
    last: list[Thread] = []
    for thread in reversed(threads):  # a thread stands in each dump once
        if any(thread.number == other.number for other in last):
            break
        last.insert(0, thread)
    return tuple(last)


def find_collective(threads: Sequence[Thread], busy: bool) -> str:
    """What the main thread waits for together with other ranks, in words; empty where it does not.

    Args:
        threads: of one dump, with source lines.
        busy: the process computes.
    """
    frames = threads[-1].frames
    inner = frames[: find_own(frames) + 1] or frames
    called = [frame.function for frame in inner if _is_collective(frame)]
    if called:
        return called[-1]
    top = inner[0]
    if top.function == "_engine_run_backward":
        others = [frame.function for thread in threads[:-1] for frame in thread.frames if _is_collective(frame)]
        return f"backward, {others[-1]}" if others else "" if busy else "backward, the gradients' all_reduce"
    if top.file.endswith("biokit/parallel/processes.py") and top.function in _OWN_WAITS:
        return _OWN_WAITS[top.function]
    if busy:
        return ""
    if "/torch/distributed/" in top.file or top.file.endswith("/torch/nn/parallel/distributed.py"):
        return top.function
    if store := _STORE_CALL.search(top.code):
        return f"the store's {store[1]}"
    return (
        "an unfinished operation's wait" if ".wait(" in top.code and not top.file.startswith(STANDARD_LIBRARY) else ""
    )


def _is_collective(frame: Frame) -> bool:
    return frame.file.endswith(_COLLECTIVES) and not frame.function.startswith("_") and frame.function != "wrapper"


def describe(ranks: Sequence[RankStack]) -> str:
    """Which ranks wait in which collective and which are elsewhere, and what that means."""
    if not ranks:
        return "No rank has begun."
    groups: dict[tuple[str, str], list[RankStack]] = {}
    for stack in ranks:
        groups.setdefault(_say(stack), []).append(stack)
    order = sorted(groups.items(), key=lambda group: STATES.index(group[1][0].state))
    parts = [f"{name_ranks([s.rank for s in same])} {words[len(same) > 1]}" for words, same in order]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}.{_conclude(ranks, len(groups))}"


def _say(stack: RankStack) -> tuple[str, str]:
    """What one rank does, and several do."""
    if stack.state == WAITS:
        rest = f"in {stack.collective} ({stack.place})"
        return f"waits {rest}", f"wait {rest}"
    if stack.state == ELSEWHERE:
        own = stack.frames[max(0, stack.own)]
        rest = f"elsewhere: {own.code or own.function} at {own.place}"
        rest += ", computing" if stack.busy else ""
    elif stack.state == ABSENT:
        rest = f"on host {stack.host}, which was not asked"
    else:
        rest = {STOPPED: "stopped (SIGSTOP)", DEAD: "gone", SILENT: "silent: no stack came"}[stack.state]
    return f"is {rest}", f"are {rest}"


def _conclude(ranks: Sequence[RankStack], num_groups: int) -> str:
    states = {stack.state for stack in ranks}
    if len(ranks) == 1:
        return ""
    if states == {WAITS} and num_groups == 1:
        return " None is missing: look at the network between them, or at a group that leaves ranks out."
    if states == {WAITS}:
        return " They wait for different things: the ranks have taken different ways through the code."
    if states == {ELSEWHERE} and any(stack.busy for stack in ranks):
        return " None waits for another: the run may only need more time."
    return ""


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2`, `ranks 0-6, 8`; ascending numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def _catches_request(pid: int) -> bool:
    """Whether a process handles the request; one that has only begun would die of it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return not Path("/proc/self/status").exists()  # not Linux
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (REQUEST - 1) & 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_fresh(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) < FRESH_S
    except OSError:
        return False


def _unescape(text: str) -> str:
    """faulthandler writes other signs than ASCII as codes."""
    return _ESCAPE.sub(lambda code: chr(int(code[1] or code[2] or code[3], 16)), text)
