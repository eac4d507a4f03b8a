"""How one rank of a run ended, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biokit.errors import RunError
from biokit.frames import Frame, find_own, frames_from
from biokit.safe_files import to_list, to_number, to_text, to_whole
from biokit.tracebacks import MAX_LINKS, MAX_MESSAGE, words_of

LAUNCHER = -1  # the rank of an error that is torchrun's own
MAX_HEADLINE = 200
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "KeyboardInterrupt")
_LOST = (
    "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "failed to recv", "Broken pipe",
    "client socket has timed out", "wait timeout after", "Application timeout caused pair closure",
)  # fmt: skip


class PeerError(RunError):
    """Another rank failed, and this one goes with it; the other one's error tells why."""


@dataclass(frozen=True)
class Link:
    """An exception that came before the one that ended a rank; `relation` tells how one led to the other."""

    relation: str
    kind: str
    message: str
    frames: tuple[Frame, ...] = ()
    is_effect: bool = False


@dataclass(frozen=True)
class RankError:
    """How one rank ended.

    Attributes:
        time: unix time of its end.
        kind: the exception's class, the signal's name, or `exit code 3`.
        frames: outermost first, as in a Python traceback, without those of the launcher.
        is_effect: it ended because another one did.
        exit_code: of its process; negative: the signal; 0: not known.
        chain: exceptions before this one, oldest first.
    """

    rank: int
    time: float
    host: str
    kind: str
    message: str
    frames: tuple[Frame, ...] = ()
    is_effect: bool = False
    exit_code: int = 0
    chain: tuple[Link, ...] = ()

    @property
    def who(self) -> str:
        return "torchrun" if self.rank == LAUNCHER else f"rank {self.rank}"

    @property
    def lost_peer(self) -> bool:
        """It ended because it waited for another one that was gone."""
        return self.is_effect and not self.is_signal and self.kind not in FROM_OUTSIDE

    @property
    def is_signal(self) -> bool:
        return self.exit_code < 0 and self.kind.startswith("SIG")

    @property
    def place(self) -> str:
        """The user's own line that it ended at, in few words."""
        inner = self.frames[::-1]
        own = find_own(inner)
        return inner[own].place if own >= 0 else ""

    @property
    def words(self) -> str:
        """How it ended, without saying who: `failed (cell line 7): ValueError: ...`."""
        first = to_text(self.message.strip().split("\n", 1)[0], MAX_HEADLINE)
        at = f" ({self.place})" if self.place else ""
        if self.lost_peer:
            return f"lost another rank{at}"
        if self.is_signal and self.is_effect:
            return f"was ended by {self.kind} with the run"
        if self.is_signal:
            return f"was ended by {self.kind}" + (f": {first}" if first else "")
        return f"failed{at}: {self.kind}" + (f": {first}" if first else "")

    def __str__(self) -> str:
        return f"{self.who} {self.words}"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says, or was raised from one that says, that another process is gone or did not answer."""
    one: BaseException | None = error
    for _ in range(MAX_LINKS):
        if one is None:
            break
        if isinstance(one, PeerError) or (isinstance(one, RuntimeError) and _tells_of_peer(words_of(one))):
            return True
        one = one.__cause__
    return False


def _tells_of_peer(message: str) -> bool:
    if "preamble" in message:  # gloo, of tensors of different sizes: the ranks themselves disagree
        return False
    return any(words in message for words in _LOST)


def error_from(found: Mapping[str, Any]) -> RankError:
    """A rank's error out of JSON, whatever it is."""
    return RankError(
        to_whole(found.get("rank"), LAUNCHER),
        to_number(found.get("time")),
        to_text(found.get("host"), 200),
        to_text(found.get("kind"), 200) or "an error",
        to_text(found.get("message"), MAX_MESSAGE),
        frames_from(found.get("frames")),
        found.get("is_effect") is True,
        to_whole(found.get("exit_code")),
        tuple(_link_from(link) for link in to_list(found.get("chain"), MAX_LINKS) if isinstance(link, dict)),
    )


def _link_from(found: Mapping[str, Any]) -> Link:
    return Link(
        to_text(found.get("relation"), 100),
        to_text(found.get("kind"), 200),
        to_text(found.get("message"), MAX_MESSAGE),
        frames_from(found.get("frames")),
        found.get("is_effect") is True,
    )
