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

from biokit.errors import RunError

MAX_BYTES = 1 << 20
MAX_SUMMARY_BYTES = 32 << 20  # of what is told of all ranks of a run
MAX_LINE = 2000  # characters of a line that is shown


def read_end(path: Path, max_bytes: int = MAX_BYTES, start: int = 0) -> str:
    """The last part of a text file, from byte `start` on at the earliest; empty where there is no such file."""
    try:
        return read_part(path, max_bytes, start).decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_part(path: Path, max_bytes: int = MAX_BYTES, start: int = 0) -> bytes:
    """The last part of a file, from byte `start` on at the earliest.

    Raises:
        OSError: there is none, it is a link, or it is no plain file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except ValueError as error:  # a path with a null byte
        raise OSError(str(error)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no plain file")
        first = max(start, status.st_size - max_bytes)
        os.lseek(handle, first, os.SEEK_SET)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(max(0, status.st_size - first))
    finally:
        os.close(handle)


def load_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        OSError: see `read_part`.
        ValueError: it is not whole, or something else.
    """
    try:
        found = json.loads(read_part(path, max_bytes))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a mapping")
    return found


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a small file; empty where there is none that is whole."""
    return parse_object(read_end(path, max_bytes))


def read_saved(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file of a run folder that tells of all its ranks; None where there is no such file.

    Raises:
        RunError: the file holds something else.
    """
    if not path.exists():
        return None
    found = read_object(path, MAX_SUMMARY_BYTES)
    if not found:
        raise RunError(f"run {path.parent}", f"its {path.name} cannot be read", "Remove the file")
    return found


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


def to_float(value: Any) -> float:
    """A number, or what stands for one that is not finite ("nan"); NaN for other values."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def to_whole(value: Any, default: int = 0) -> int:
    """A whole number of 64 bits."""
    number = to_number(value, math.nan)
    return int(number) if abs(number) < 2**63 else default


def to_list(value: Any, limit: int) -> list[Any]:
    """The first entries of a list; empty for other values."""
    return value[:limit] if isinstance(value, list) else []
