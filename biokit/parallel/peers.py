"""Which other process of a run is lost, asked once something has gone wrong; needs no torch.

Every process keeps a port open at which nothing is ever said. One whose port can be opened is there, though it may
hang; one that refuses is gone; one that does not answer is on a machine, or behind a link, that is lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

WAIT_S = 1.5  # for an answer
MAX_ASKED = 256  # processes that one asks
MAX_NAMED = 8
THERE, GONE, SILENT = "there", "gone", "silent"


class Store(Protocol):
    """What is needed of torch's key-value store."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Wait for a key."""


@dataclass(frozen=True)
class Door:
    """Where a process can be asked whether it is there; no port: nowhere."""

    host: str
    address: str
    port: int


@dataclass(frozen=True)
class Peers:
    """The other processes, as one of them knows them."""

    rank: int = 0
    doors: tuple[Door, ...] = ()

    def describe_lost(self, wait_s: float = WAIT_S) -> str:
        """Which processes are gone or cannot be reached, in words; empty where nothing is known of any."""
        asked = {rank: door for rank, door in enumerate(self.doors) if rank != self.rank and door.port}
        if len(asked) > MAX_ASKED:  # the first of each host
            first = {door.host: rank for rank, door in reversed(asked.items())}
            asked = {rank: asked[rank] for rank in sorted(first.values())[:MAX_ASKED]}
        if not asked:
            return ""
        found = knock({rank: (door.address, door.port) for rank, door in asked.items()}, wait_s)
        gone, silent = ([rank for rank, state in found.items() if state == kind] for kind in (GONE, SILENT))
        parts = [f"no longer there: {self._name(gone)}"] if gone else []
        parts += [f"cannot be reached: {self._name(silent)}"] if silent else []
        return "; ".join(parts) or "all the others are still there"

    def _name(self, ranks: Sequence[int]) -> str:
        names = [f"rank {rank} on {self.doors[rank].host}" for rank in sorted(ranks)[:MAX_NAMED]]
        return ", ".join(names) + (f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else "")


@contextlib.contextmanager
def open_door(store: Store, rank: int, world_size: int, master: tuple[str, int]) -> Iterator[Peers]:
    """Tell the others where this process can be asked, and learn it of them; all of them do it together.

    Args:
        master: host and port that every process reaches.
    """
    address = find_own_address(*master)
    with contextlib.ExitStack() as stack:
        port = 0
        with contextlib.suppress(OSError):  # then nobody can ask this one
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            door = socket.create_server((address, 0), family=family, backlog=world_size) if address else None
            if door is not None:
                port = stack.enter_context(door).getsockname()[1]
        store.set(f"door {rank}", json.dumps([socket.gethostname(), address, port]))
        yield Peers(rank, tuple(Door(*json.loads(store.get(f"door {other}"))) for other in range(world_size)))


def find_own_address(host: str, port: int) -> str:
    """The address of this machine on the network that leads to a host; empty where nothing leads there."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # a datagram socket: nothing is sent
                return str(probe.getsockname()[0])
    return ""


def knock(doors: Mapping[int, tuple[str, int]], wait_s: float) -> dict[int, str]:
    """Whether each address and port can be opened: `there`, `gone` (refused) or `silent`; asks all at once."""
    found = dict.fromkeys(doors, SILENT)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for key, (address, port) in doors.items():
            try:
                knocker = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
                knocker.setblocking(False)
                code = knocker.connect_ex((address, port))
            except OSError:
                continue
            if code == errno.EINPROGRESS:
                selector.register(knocker, selectors.EVENT_WRITE, key)
            else:
                found[key] = _state(code)
        end = time.monotonic() + wait_s
        while selector.get_map() and (left_s := end - time.monotonic()) > 0:
            for ready, _ in selector.select(left_s):
                answered = ready.fileobj
                selector.unregister(answered)
                assert isinstance(answered, socket.socket)
                found[ready.data] = _state(answered.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    return found


def _state(code: int) -> str:
    return THERE if code == 0 else GONE if code in (errno.ECONNREFUSED, errno.ECONNRESET) else SILENT
