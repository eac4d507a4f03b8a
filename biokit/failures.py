"""Why a run failed: what each rank leaves when it dies, and which of it is the cause.

One rank's error takes the others with it: they lose a peer, or the launcher ends them. So the cause is the first error
by time that is no such effect, wherever it stands.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from biokit.endings import FROM_OUTSIDE, LAUNCHER, RankError, error_from, is_lost_peer
from biokit.errors import RunError
from biokit.frames import Frame, add_code, find_own, shorten
from biokit.runs import LifeFolder, RunFolder, write_atomically
from biokit.safe_files import (
    parse_object,
    read_end,
    read_object,
    read_saved,
    to_list,
    to_number,
    to_text,
    to_whole,
)
from biokit.secrets import mask
from biokit.stacks import MAX_RANKS, WAITS, Hang, hang_from, parse_dump, read_hang, read_ranks
from biokit.tracebacks import tell_error, walk_chain

NOTICED_S = 0.9  # an agent notices an end later than the peers do, but before those who lost a peer go (after 1 s)
TAIL_LINES, TAIL_BYTES, TAIL_WIDTH = 20, 1 << 16, 400
HINTS = {
    "SIGKILL": "killed from outside (out of memory?)",
    "SIGTERM": "ended from outside",
    "SIGINT": "interrupted",
    "SIGSEGV": "a crash in compiled code",
    "SIGBUS": "a crash in compiled code (is /dev/shm full?)",
    "SIGABRT": "compiled code gave up",
}
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_TRACEBACK = re.compile(r"(?:\[rank\d+\]: ?)?Traceback \(most recent call last\):")
_NUMBERED = re.compile(r"(?:rank|node)_([0-9]+)")


@dataclass(frozen=True)
class Failure:
    """Why a life of a run failed.

    Attributes:
        causes: by time, the root first; none where the time was up.
        effects: by time; with their innermost own line only.
        step, loss: the last of the metrics; 0 and NaN: none.
        tail: the end of what the root's rank printed.
        logs: the file that holds the whole.
        hang: where the ranks stood when the time was up.
    """

    headline: str
    causes: tuple[RankError, ...]
    effects: tuple[RankError, ...]
    life: int
    step: int = 0
    loss: float = math.nan
    tail: str = ""
    logs: str = ""
    hang: Hang | None = None


def write_error(life: LifeFolder, rank: int, error: BaseException) -> None:
    """Leave the error that ends this rank in `life.error_file(rank)`, secrets masked."""
    found = {
        "rank": rank,
        "time": time.time(),
        "host": socket.gethostname(),
        **_tell(error),
        "chain": [{"relation": relation, **_tell(one)} for relation, one in walk_chain(error)],
    }
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        write_atomically(life.error_file(rank), json.dumps(found, indent=1) + "\n")


def _tell(error: BaseException) -> dict[str, Any]:
    return {**tell_error(error), "is_effect": is_lost_peer(error)}


def collect_failure(folder: RunFolder, life: int) -> Failure:
    """Why that life failed, from what its processes left; nothing of it needs to be there, or to be whole."""
    left = folder.life(life)
    hang = _hang_of(folder, life)
    causes, effects = _sort_out(_read_ends(left), hang)
    if not causes and hang is None:
        causes = [_launcher_error(left)]
    root = causes[0] if causes else effects[0] if effects else None
    step, loss = _last_metrics(folder)
    headline = str(causes[0]) if causes else f"{hang.reason}: {hang.verdict}" if hang else ""
    stuck = [one.rank for one in hang.ranks if one.state != WAITS] if hang and not causes else []
    logs = left.output_file(stuck[0]) if stuck else _log_of(left, root)
    effects = [replace(one, frames=_own_line(one), chain=()) for one in effects]
    tail = read_tail(logs, without_traceback=bool(root and root.frames and not root.is_signal))
    return Failure(headline, tuple(causes), tuple(effects), life, step, loss, tail, str(logs), hang)


def _hang_of(folder: RunFolder, life: int) -> Hang | None:
    """Where the ranks of this life stood, if they were asked."""
    with contextlib.suppress(RunError):
        hang = read_hang(folder)
        return hang if hang is not None and hang.life == life else None
    return None


def _read_ends(left: LifeFolder) -> list[RankError]:
    """How each rank ended that did not end well."""
    codes = _read_exit_codes(left)
    who = read_ranks(left)
    ends = []
    for rank in sorted(codes.keys() | set(_numbers_of(left.error_file(0).parent))):
        code, ended = codes.get(rank, (0, 0.0))
        if found := read_object(left.error_file(rank)):
            ends.append(replace(error_from(found), rank=rank, exit_code=code))
        elif code:
            host = to_text(who.get(rank, {}).get("host"), 200)
            ends.append(_error_of_code(left, rank, code, ended, host))
    return ends


def _read_exit_codes(left: LifeFolder) -> dict[int, tuple[int, float]]:
    """(exit code, unix time) of the ranks, as the agents saw them."""
    codes = {}
    for node in _numbers_of(left.agent_file(0).parent):
        ranks = read_object(left.agent_file(node)).get("ranks")
        for rank, end in list(ranks.items())[:MAX_RANKS] if isinstance(ranks, dict) else ():
            if rank.isascii() and rank.isdecimal() and isinstance(end, dict):
                codes[int(rank)] = to_whole(end.get("exit_code")), to_number(end.get("time"))
    return codes


def _numbers_of(folder: Path) -> list[int]:
    """The ranks or nodes that have a JSON file in a folder."""
    names = (path.stem for path in islice(folder.glob("*.json"), MAX_RANKS))
    return sorted({int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name))})


def _error_of_code(left: LifeFolder, rank: int, code: int, ended: float, host: str) -> RankError:
    """Of a rank that left no exception."""
    code = 128 - code if code in (128 + signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGINT) else code
    try:
        kind = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        kind = f"signal {-code}"
    message = HINTS.get(kind, "") if code < 0 else "it left no exception"
    frames = _fatal_frames(read_end(left.stack_file(rank))) if code < 0 and kind not in FROM_OUTSIDE else ()
    return RankError(rank, ended, host, kind, message, frames, exit_code=code)


def _fatal_frames(text: str) -> tuple[Frame, ...]:
    """The stack that a fatal signal met, outermost first."""
    _, fatal, dump = text.rpartition("Fatal Python error: ")
    threads = parse_dump(dump) if fatal else ()
    met = next((thread for thread in threads if thread.current), threads[-1] if threads else None)
    frames = met.frames[::-1] if met else ()
    return shorten(add_code(frame for frame in frames if not frame.is_starter))


def _sort_out(ends: Sequence[RankError], hang: Hang | None) -> tuple[list[RankError], list[RankError]]:
    """(causes, effects), each by time. Where there are effects only, the likeliest of them is the cause."""
    errors = [one for one in ends if not one.is_effect and one.kind not in FROM_OUTSIDE]
    ended = [one for one in ends if one.kind in FROM_OUTSIDE and one.time > 0]
    if hang is not None:  # then everything was ended
        causes = [one for one in errors if one.time < hang.time]
    elif errors:  # who was ended before anything failed was not ended by the launcher
        first = min(one.time for one in errors)
        causes = errors + [one for one in ended if one.time + _slack_s(one) < first]
    else:
        lost = min((one.time for one in ends if one.is_effect), default=math.inf)
        killed = [one for one in ended if one.time < lost + NOTICED_S]
        causes = sorted(killed or [one for one in ends if one.is_effect] or ends, key=_likelihood)[:1]
    effects = [replace(one, is_effect=True) for one in ends if one not in causes]
    return _by_time(replace(one, is_effect=False) for one in causes), _by_time(effects)


def _slack_s(one: RankError) -> float:
    """torchrun notes ends in whole seconds; a launcher that gives up sends SIGTERM within the second."""
    return 1.0 if one.kind == "SIGTERM" else 0.0


def _likelihood(one: RankError) -> tuple[bool, float, bool, int]:
    """Of ends that all may be effects: first those with another error before them, then by time; SIGKILL first."""
    return all(link.is_effect for link in one.chain), one.time, one.kind != "SIGKILL", one.rank


def _by_time(errors: Iterable[RankError]) -> list[RankError]:
    return sorted(errors, key=lambda one: (one.time, one.rank))


def _own_line(one: RankError) -> tuple[Frame, ...]:
    """The innermost line of the user's own code alone."""
    inner = one.frames[::-1]
    own = find_own(inner)
    return (inner[own],) if own >= 0 else ()


def _launcher_error(left: LifeFolder) -> RankError:
    """Where no rank tells anything: what torchrun said."""
    ends = {node: read_object(left.agent_file(node)) for node in _numbers_of(left.agent_file(0).parent)}
    failed = [node for node, end in ends.items() if to_whole(end.get("code"))]
    for node in sorted(failed, key=lambda node: to_number(ends[node].get("time")))[:1]:  # the others go with the first
        code = to_whole(ends[node].get("code"))
        lines = [line for line in read_tail(left.agent_log(node)).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it said nothing"
        return RankError(LAUNCHER, 0.0, "", f"exit code {code} on node {node}", said, exit_code=code)
    return RankError(LAUNCHER, 0.0, "", "no end", "no rank left an error, and torchrun did not tell how it ended")


def _log_of(left: LifeFolder, root: RankError | None) -> Path:
    """The log to read first."""
    if root is None or root.rank == LAUNCHER:
        logs = [left.agent_log(node) for node in _numbers_of(left.agent_file(0).parent)]
        return next((log for log in logs if log.exists()), left.agent_log(0))
    own, agent = left.output_file(root.rank), left.log_of_agent_of(root.rank)
    return agent if not own.exists() and agent.exists() else own  # torchrun's --tee prints there


def _last_metrics(folder: RunFolder) -> tuple[int, float]:
    """Step and loss of the last whole line."""
    for line in reversed(read_end(folder.metrics_file(), TAIL_BYTES).splitlines()):
        found = parse_object(line)
        if "step" in found:
            return to_whole(found["step"]), to_number(found.get("loss"), math.nan)
    return 0, math.nan


def read_tail(path: Path, num_lines: int = TAIL_LINES, without_traceback: bool = False) -> str:
    """The last lines of a log, secrets masked, without control signs and what a progress bar wrote over.

    Args:
        without_traceback: leave out the last one and what follows it.
    """
    lines = mask(read_end(path, TAIL_BYTES)).rstrip().split("\n")
    heads = [index for index, line in enumerate(lines) if _TRACEBACK.match(line)] if without_traceback else []
    lines = lines[: heads[-1]] if heads else lines
    return "\n".join(_clean(line) for line in lines[-num_lines:])


def _clean(line: str) -> str:
    return to_text(_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]), TAIL_WIDTH)


def save_failure(folder: RunFolder, failure: Failure) -> None:
    """Write `failure.json`."""
    found = asdict(failure) | {"loss": failure.loss if math.isfinite(failure.loss) else None}
    write_atomically(folder.failure_file, json.dumps(found, indent=1) + "\n")


def read_failure(folder: RunFolder) -> Failure | None:
    """What `save_failure` wrote; None where nothing failed.

    Raises:
        RunError: the file is not what `save_failure` writes.
    """
    found = read_saved(folder.failure_file)
    if found is None:
        return None
    hang = found.get("hang")
    return Failure(
        headline=to_text(found.get("headline")),
        causes=tuple(_errors_from(found.get("causes"))),
        effects=tuple(_errors_from(found.get("effects"))),
        life=to_whole(found.get("life")),
        step=to_whole(found.get("step")),
        loss=to_number(found.get("loss"), math.nan),
        tail=to_text(found.get("tail"), TAIL_LINES * (TAIL_WIDTH + 5)),
        logs=to_text(found.get("logs")),
        hang=hang_from(hang) if isinstance(hang, dict) else None,
    )


def _errors_from(found: Any) -> list[RankError]:
    return [error_from(entry) for entry in to_list(found, MAX_RANKS) if isinstance(entry, dict)]
