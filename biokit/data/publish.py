"""A folder that appears whole or not at all: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biokit.errors import DataError
from biokit.runs import flush_to_disk


@contextmanager
def publish_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder `.<name>.partial` beside `out` to write into; renamed to `out` at a clean exit, else removed.

    What a killed process left is removed at the next try; a lock on the folder keeps two from writing at once.

    Args:
        overwrite: whether a folder at `out` may be replaced.

    Raises:
        DataError: another process is at it, `out` is in the way, or the disk is full or not writable.
    """
    partial = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    asked = f"write {out}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, asked)
    except OSError as error:
        raise _cannot_write(asked, error) from error
    try:
        _restore(old, out)
        _empty(partial)
        yield partial
        _flush_folder(partial)
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise DataError(asked, "there is a folder already", "Give another folder, or overwrite=True")
            out.rename(old)
        partial.rename(out)
        flush_to_disk(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _restore(old, out)
        if isinstance(error, OSError):
            raise _cannot_write(asked, error) from error
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, asked: str) -> int:
    """An open, locked descriptor of the partial folder, which goes with the process, however that ends."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(asked, "another process is writing it", "Wait for it, or give another folder") from None
        try:
            same = os.fstat(descriptor).st_ino == partial.stat().st_ino
        except FileNotFoundError:
            same = False  # it was renamed or removed between the two calls
        if same:
            return descriptor
        os.close(descriptor)


def _restore(old: Path, out: Path) -> None:
    """Undo half of an exchange that was killed between its two renames."""
    if old.is_dir():
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush_folder(folder: Path) -> None:
    for path in folder.iterdir():
        flush_to_disk(path)
    flush_to_disk(folder)


def _cannot_write(asked: str, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = f"the disk or quota is full ({error.strerror})" if full else f"it failed ({error})"
    do = "Free space" if full else "Check the path and its permissions"
    return DataError(asked, found, f"{do}, or give another folder; nothing half was left")
