"""Paths as a reader finds them: from the working directory."""

from __future__ import annotations

import os
import re

MAX_CLIMB = 3  # folders up; what lies further away is shown as it is
_PATH = re.compile(r"(?<![^\s'\"=])/[^\s'\"]+")


def show_near(text: str) -> str:
    """A text whose absolute paths are shown from the working directory, where they lie near it; they stay exact."""
    return _PATH.sub(lambda found: _shorten(found[0]), text)


def _shorten(path: str) -> str:
    near = os.path.relpath(path)
    return path if near.startswith("../" * (MAX_CLIMB + 1)) or len(near) > len(path) else near
