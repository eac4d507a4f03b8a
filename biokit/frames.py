"""Lines of a stack: whose code they are, and how they are called in words.

A notebook cell is saved as `cell.py` (in a session of several cells `cell_3.py`), with the line numbers of the cell.
"""

from __future__ import annotations

import itertools
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from biokit.safe_files import MAX_LINE, read_end, to_text, to_whole
from biokit.secrets import mask

MAX_FRAMES = 60
MIN_FOLDED = 4  # equal ones in a row
MAX_CODE = 200
MAX_SOURCE_BYTES = 4 << 20
PACKAGE = f"{Path(__file__).parent}/"
STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_CELL = re.compile(r"(?:^|/)cell(?:_(\d+))?\.py$")
_INSTALLED = re.compile(r"/(?:site|dist)-packages/(.+)$")
_STARTERS = ("biokit/launch/", "<frozen runpy>", "<frozen importlib", "/runpy.py", "/importlib/")


@dataclass(frozen=True)
class Frame:
    """One line of a stack; `code` is the source line where it could be read."""

    file: str
    line: int
    function: str
    code: str = ""

    @property
    def place(self) -> str:
        """Where it is, in few words: `cell line 12`, `train.py line 7`."""
        return f"{self.short_file} line {self.line}" if self.line else self.short_file

    @property
    def short_file(self) -> str:
        """`cell`, `cell 3`, a path within an installed package, else the file's name."""
        if cell := _CELL.search(self.file):
            return f"cell {cell[1]}" if cell[1] else "cell"
        if self.file.startswith(PACKAGE):
            return f"biokit/{self.file.removeprefix(PACKAGE)}"
        if installed := _INSTALLED.search(self.file):
            return installed[1]
        if self.file.startswith(STANDARD_LIBRARY):
            return self.file.removeprefix(STANDARD_LIBRARY)
        return self.file.rpartition("/")[2] or self.file

    @property
    def is_cell(self) -> bool:
        return _CELL.search(self.file) is not None

    @property
    def is_library(self) -> bool:
        """Of an installed package or of Python itself."""
        if self.file.startswith(PACKAGE):
            return False
        return _INSTALLED.search(self.file) is not None or self.file.startswith((STANDARD_LIBRARY, "<frozen"))

    @property
    def is_own(self) -> bool:
        """Of the user's own code."""
        return self.line > 0 and not (self.is_library or self.is_starter or self.file.startswith(PACKAGE))

    @property
    def is_starter(self) -> bool:
        """Of what started the user's program in this process."""
        return any(words in self.file for words in _STARTERS)


def find_own(frames: Iterable[Frame]) -> int:
    """Index of the first frame of the user's own code, else of the first of biokit's beside its launcher; -1: none.

    Args:
        frames: innermost first.
    """
    biokit = -1
    for index, frame in enumerate(frames):
        if frame.is_own:
            return index
        if biokit < 0 and frame.file.startswith(PACKAGE) and not frame.is_starter:
            biokit = index
    return biokit


def add_code(frames: Iterable[Frame]) -> tuple[Frame, ...]:
    """The same with the source lines that can be read, secrets masked."""
    files: dict[str, list[str]] = {}
    return tuple(replace(frame, code=_read_line(frame, files)) for frame in frames)


def shorten(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """At most MAX_FRAMES, from both ends; a line that called itself stands there once, with how often."""
    frames = tuple(frame for same, group in itertools.groupby(frames) for frame in _fold(same, len(list(group))))
    if len(frames) <= MAX_FRAMES:
        return frames
    half = MAX_FRAMES // 2
    left_out = Frame(f"... {len(frames) - 2 * half} more frames ...", 0, "")
    return (*frames[:half], left_out, *frames[-half:])


def _fold(frame: Frame, times: int) -> list[Frame]:
    if times < MIN_FOLDED:
        return [frame] * times
    return [frame, Frame(f"... repeated {times - 1} more times ...", 0, "")]


def frames_from(value: Any) -> tuple[Frame, ...]:
    """Frames out of JSON, whatever it is."""
    found = value[: MAX_FRAMES + 1] if isinstance(value, list) else []
    return tuple(
        Frame(
            to_text(entry.get("file"), MAX_LINE),
            max(0, to_whole(entry.get("line"))),
            to_text(entry.get("function"), MAX_CODE),
            to_text(entry.get("code"), MAX_CODE),
        )
        for entry in found
        if isinstance(entry, dict)
    )


def _read_line(frame: Frame, files: dict[str, list[str]]) -> str:
    """A line of a Python file; stacks may name any file of this machine, and others are not opened."""
    if not frame.file.endswith(".py"):
        return ""
    if frame.file not in files:
        path = Path(frame.file)
        files[frame.file] = read_end(path, MAX_SOURCE_BYTES).splitlines() if _is_small(path) else []
    lines = files[frame.file]
    return to_text(mask(lines[frame.line - 1].strip()), MAX_CODE) if 0 < frame.line <= len(lines) else ""


def _is_small(path: Path) -> bool:
    try:
        return path.stat().st_size <= MAX_SOURCE_BYTES
    except (OSError, ValueError):
        return False
