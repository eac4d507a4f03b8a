"""How the supervisors of several nodes agree: files of the run folder, which all of them see.

Node 0 leads, the others follow. Each rewrites one file, its own, and reads the leader's; the leader reads all. Clocks
are never compared, and what an earlier run left is never believed: every process draws a word, a follower repeats the
leader's, and the leader lists those of the followers that have repeated its own. Only who finds its own word there
goes along.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import read_object, to_text, to_whole

READ_S = 0.2  # between two looks at the others' files
BEAT_S = 3.0  # a file is rewritten at least that often
LOST_S = 30.0  # who has not rewritten its file for so long is gone
LEADER = 0


@dataclass(frozen=True)
class Note:
    """What a node's file says.

    Attributes:
        word: of the process that writes it.
        beat: grows with each rewrite.
        heard: words of others that this process goes along with, by node.
        life: the leader's: the newest life, which all members are to run.
        members: the leader's: words of the processes that take part in that life, by node.
        endpoint: the leader's: where the agents of that life meet, `host:port`.
        cut: the leader's: the newest life that all are to end.
        ended: the newest life that is over on this node.
        good: that life ended well here.
        ask: the hardest thing that is asked of the run on this node; the leader's: on any.
        outcome: the leader's: of the whole run; empty while it goes on.
    """

    word: str
    host: str = ""
    beat: int = 0
    heard: dict[str, str] = field(default_factory=dict)
    life: int = 0
    members: dict[str, str] = field(default_factory=dict)
    endpoint: str = ""
    cut: int = 0
    ended: int = 0
    good: bool = False
    ask: int = 0
    outcome: str = ""


class Meeting:
    """One node's part in it.

    Attributes:
        wanted: the hardest thing that is asked of the run on other nodes.
    """

    def __init__(self, folder: RunFolder, node: int, num_nodes: int, clock: Callable[[], float] = time.monotonic):
        self.folder, self.node, self.num_nodes, self.clock = folder, node, num_nodes, clock
        self.note = Note(secrets.token_hex(8), socket.gethostname())
        self.wanted = 0
        self.seen: dict[int, Note] = {}
        self._changed: dict[int, float] = {}  # when a node's file was last seen to change
        self._written: tuple[Note, float] | None = None
        self._read_at = -READ_S

    def exchange(self, ask: int = 0) -> None:
        """Read what the others say, and say what is new here; to be called all the time."""
        self.note = replace(self.note, ask=max(self.note.ask, ask))
        if self.clock() - self._read_at >= READ_S:
            for node in self.others():
                self._read(node)
            self._read_at = self.clock()
            self._take_in()
        self._write()

    def others(self) -> list[int]:
        """The nodes whose files this one reads."""
        raise NotImplementedError

    def silent(self, nodes: list[int]) -> list[int]:
        """Those of them that have not been heard of for `LOST_S` seconds."""
        return [node for node in nodes if self.clock() - self._changed.get(node, self.clock()) > LOST_S]

    def name(self, nodes: list[int]) -> str:
        """The nodes in words, with their hosts where these are known."""
        hosts = {node: self.seen[node].host if node in self.seen else "" for node in nodes}
        return ", ".join(f"node {node} ({host})" if host else f"node {node}" for node, host in hosts.items())

    def _take_in(self) -> None:
        """Draw conclusions from what was read."""
        raise NotImplementedError

    def _read(self, node: int) -> None:
        note = read_note(self.folder, node)
        before = self.seen.get(node)
        if note is not None and note != before:
            self.seen[node] = note
            self._changed[node] = self.clock()

    def _write(self) -> None:
        if self._written is not None:
            note, at = self._written
            if note == self.note and self.clock() - at < BEAT_S:
                return
        self.note = replace(self.note, beat=self.note.beat + 1)
        with contextlib.suppress(OSError):  # a full disk: the others see it by the silence
            write_atomically(self.folder.node_file(self.node), json.dumps(asdict(self.note)) + "\n")
        self._written = self.note, self.clock()


class Leader(Meeting):
    """Node 0's part: it opens each life, and knows how it ended."""

    def __init__(self, folder: RunFolder, num_nodes: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(folder, LEADER, num_nodes, clock)
        self.members: dict[int, str] = {}  # of the life that is open

    def others(self) -> list[int]:
        """All the other nodes."""
        return list(range(1, self.num_nodes))

    def present(self) -> list[int]:
        """Nodes whose process of now goes along with this one."""
        return [node for node in self.others() if self._is_present(node)]

    def absent(self) -> list[int]:
        """Nodes that have not come, or have gone without a word."""
        gone = self.silent(self.present())
        return [node for node in self.others() if node in gone or not self._is_present(node)]

    def open_life(self, number: int, endpoint: str) -> None:
        """Have all begin a life; only while nobody is absent."""
        self.members = {node: self.seen[node].word for node in self.others()}
        members = {str(node): word for node, word in self.members.items()}
        self.note = replace(self.note, life=number, members=members, endpoint=endpoint)
        self._write()

    def cut(self) -> None:
        """Have all end the open life."""
        self.note = replace(self.note, cut=self.note.life)
        self._write()

    def close(self, outcome: str) -> None:
        """Tell all that the run is over."""
        self.note = replace(self.note, outcome=outcome)
        self._write()

    def failed(self) -> list[int]:
        """Nodes on which the open life failed, or whose process is another one by now."""
        ended = [node for node in self.members if node not in self.pending() and not self.seen[node].good]
        return sorted({*ended, *self._replaced()})

    def pending(self) -> list[int]:
        """Nodes on which the open life is not yet over."""
        going = [node for node in self.members if self.seen[node].ended < self.note.life]
        return [node for node in going if node not in self._replaced()]

    def lost(self) -> list[int]:
        """Nodes of the open life that have not been heard of for too long."""
        return self.silent(self.pending())

    def _replaced(self) -> list[int]:
        return [node for node, word in self.members.items() if self.seen[node].word != word]

    def _is_present(self, node: int) -> bool:
        return node in self.seen and self.seen[node].heard.get(str(LEADER)) == self.note.word

    def _take_in(self) -> None:
        present = self.present()
        self.wanted = max((self.seen[node].ask for node in present), default=0)
        self.note = replace(
            self.note,
            heard={str(node): self.seen[node].word for node in present},
            ask=max(self.note.ask, self.wanted),
        )


class Follower(Meeting):
    """Another node's part."""

    def others(self) -> list[int]:
        """The leader."""
        return [LEADER]

    @property
    def leader(self) -> Note:
        """What the leader says to this process; an empty note until it has heard of this one."""
        said = self.seen.get(LEADER)
        accepted = said is not None and said.heard.get(str(self.node)) == self.note.word
        return said if said is not None and accepted else Note("")

    def next_life(self) -> int:
        """The life that this process is to begin; 0: none."""
        leader = self.leader
        is_member = leader.members.get(str(self.node)) == self.note.word
        return leader.life if is_member and leader.life > self.note.ended else 0

    def end_life(self, number: int, good: bool) -> None:
        """Tell that a life is over on this node."""
        self.note = replace(self.note, ended=number, good=good)
        self._write()

    def lost(self) -> list[int]:
        """The leader, where it has not been heard of for too long although it had accepted this process."""
        return self.silent([LEADER]) if self.leader.word else []

    def _take_in(self) -> None:
        if LEADER in self.seen:
            self.note = replace(self.note, heard={str(LEADER): self.seen[LEADER].word})
        self.wanted = self.leader.ask


def read_note(folder: RunFolder, node: int) -> Note | None:
    """A node's file; None where there is none, or nothing that can be read."""
    found = read_object(folder.node_file(node))
    note = Note(
        word=to_text(found.get("word"), 100),
        host=to_text(found.get("host"), 200),
        beat=to_whole(found.get("beat")),
        heard=_to_words(found.get("heard")),
        life=to_whole(found.get("life")),
        members=_to_words(found.get("members")),
        endpoint=to_text(found.get("endpoint"), 300),
        cut=to_whole(found.get("cut")),
        ended=to_whole(found.get("ended")),
        good=found.get("good") is True,
        ask=to_whole(found.get("ask")),
        outcome=to_text(found.get("outcome"), 20),
    )
    return note if note.word else None


def _to_words(value: Any) -> dict[str, str]:
    return {str(node): to_text(word, 100) for node, word in value.items()} if isinstance(value, dict) else {}
