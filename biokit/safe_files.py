"""Reads files that a run left, whoever wrote them: torn, huge or hostile ones give what can be had, or nothing.

Never more than a few megabytes, never through a link, never from a pipe or a device (which would not end).
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
MAX_SUMMARY_BYTES = 32 << 20  # of what is told of all ranks of a run
MAX_LINE = 2000  # characters of a line that is shown


def read_end(path: Path, max_bytes: int = MAX_BYTES, start: int = 0) -> str:
    """The last part of a text file, from byte `start` on at the earliest; empty where there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError):  # a path with a null byte
        return ""
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return ""
        os.lseek(handle, max(start, status.st_size - max_bytes), os.SEEK_SET)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(max_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a small file; empty where there is none that is whole."""
    return parse_object(read_end(path, max_bytes))


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; empty where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def to_text(value: Any, limit: int = MAX_LINE) -> str:
    """A text of limited length; empty for other values."""
    if not isinstance(value, str):
        return ""
    value = value.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair fits in no file
    return value if len(value) <= limit else value[:limit] + " ..."


def to_number(value: Any, default: float = 0.0) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    try:
        number = float(value)
    except OverflowError:
        return default
    return number if math.isfinite(number) else default


def to_whole(value: Any, default: int = 0) -> int:
    """A whole number of 64 bits."""
    number = to_number(value, math.nan)
    return int(number) if abs(number) < 2**63 else default


def to_list(value: Any, limit: int) -> list[Any]:
    """The first entries of a list; empty for other values."""
    return value[:limit] if isinstance(value, list) else []
