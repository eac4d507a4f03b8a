"""What a notebook's kernel and its warm ranks say to one another: JSON behind its length, on a local socket.

Kernel to rank: `run` a cell, `show` variables, `break` out of a collective, `end_groups`, `exit`. Rank to kernel: who
it is (once), then one answer to each of these but `break` and `exit`. Code travels as text, values through files.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biokit.errors import RunError

MOST_BYTES = 64 * 2**20
SEND_S = 20.0  # that the other side may take to read a message
TOKEN_BYTES = 32
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"  # how a cell ended on a rank
_LENGTH = struct.Struct(">I")


def send_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message.

    Raises:
        RunError: it is longer than `MOST_BYTES`.
        OSError: the other side is gone, or does not read.
    """
    body = json.dumps(message).encode()
    if len(body) > MOST_BYTES:
        found = f"it has {len(body):,} bytes, more than {MOST_BYTES:,}"
        raise RunError("a message to warm ranks", found, "Write large text to a file and read it there")
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive_message(connection: socket.socket) -> dict[str, Any]:
    """The next message.

    Raises:
        EOFError: the other side has closed the connection, or what came is no message.
        OSError: the connection broke.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if length > MOST_BYTES:
        raise EOFError(f"a message of {length:,} bytes")
    try:
        message = json.loads(_receive(connection, length))
    except (ValueError, RecursionError) as error:
        raise EOFError(f"a message that is not JSON ({error})") from error
    if not isinstance(message, dict):
        raise EOFError("a message that is not a mapping")
    return message


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection is closed")
        parts += part
    return bytes(parts)


def write_token(path: Path) -> str:
    """A new random token in a new file that only this user can read."""
    token = secrets.token_hex(TOKEN_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token)
    return token
