"""The kernel's end of the connections to its warm ranks: who joins, what they say, whether they are there."""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from biokit.errors import EngineError
from biokit.launch.warm.messages import SEND_S, receive_message, send_message

MAX_SOCKET_PATH = 107  # bytes, on Linux
_CREDENTIALS = struct.Struct("3i")  # process, user and group of the other side


@dataclass
class Member:
    """One warm rank as the kernel sees it."""

    rank: int
    connection: socket.socket
    process: psutil.Process
    gone: bool = field(default=False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell it something; a rank that is not there any more is marked so."""
        try:
            send_message(self.connection, message)
        except OSError:
            self.gone = True

    def receive(self) -> dict[str, Any]:
        """What it says; empty where it is not there any more."""
        try:
            return receive_message(self.connection)
        except (EOFError, OSError):
            self.gone = True
            return {}

    def signal(self, number: int) -> None:
        """Signal its process, and no other that has got its number."""
        with contextlib.suppress(psutil.Error):
            self.process.send_signal(number)


def receive_any(members: Sequence[Member], timeout_s: float) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Whoever says something, or goes (then the message is empty), within that time."""
    with selectors.DefaultSelector() as selector:
        for member in members:
            selector.register(member.connection, selectors.EVENT_READ, member)
        for key, _ in selector.select(timeout_s):
            yield key.data, key.data.receive()


@contextlib.contextmanager
def open_door() -> Iterator[tuple[socket.socket, Path]]:
    """A socket that only this user reaches, and its path; both are gone afterwards.

    Raises:
        EngineError: the folder for temporary files has too long a path.
    """
    with (
        tempfile.TemporaryDirectory(prefix="biokit-", ignore_cleanup_errors=True) as private,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = Path(private) / "ranks"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            found = f"{path} is longer than the {MAX_SOCKET_PATH} characters that a socket's path may have"
            raise EngineError("warm ranks", found, "Set TMPDIR to a folder with a shorter path")
        listener.bind(str(path))
        listener.listen()
        yield listener, path


def admit(listener: socket.socket, token: str, timeout_s: float) -> Member | None:
    """Whoever knocks within that time, where it is this user's and knows the token."""
    listener.settimeout(timeout_s)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return None
    connection.settimeout(SEND_S)
    pid, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    with contextlib.suppress(EOFError, OSError, KeyError, TypeError, ValueError, psutil.Error):
        said = receive_message(connection)
        if user == os.getuid() and hmac.compare_digest(str(said["token"]), token):
            return Member(int(said["rank"]), connection, psutil.Process(pid))
    connection.close()
    return None
