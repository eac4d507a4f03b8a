"""The runs of this user that a supervisor has had: one small file each, so that a list finds them anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path

from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import load_object


def register_run(folder: RunFolder) -> None:
    """Note a run folder; OSError where the home cannot be written."""
    path = folder.path.resolve()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    entry = {"path": str(path), "host": socket.gethostname(), "pid": os.getpid()}
    write_atomically(_register() / f"{name}.json", json.dumps(entry) + "\n")


def list_registered() -> list[Path]:
    """Run folders that are still there, oldest note first; notes of those that are gone are removed."""
    found: list[tuple[float, Path]] = []
    for note in _register().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = load_object(note)
            path = Path(entry["path"])
            if path.is_dir():
                found.append((note.stat().st_mtime, path))
            elif entry.get("host") == socket.gethostname():  # another host's disk need not be seen here
                note.unlink()
    return [path for _, path in sorted(found)]


def _register() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "biokit" / "runs"
