"""Imports that an interrupt cannot break off: a kernel in which torch is half imported can never import it again."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from types import ModuleType


def import_whole(name: str) -> ModuleType:
    """Import a module in a thread of its own, as interrupts reach only the main one.

    Raises:
        ImportError: there is none.
        KeyboardInterrupt: at once; the import goes on to its end.
    """
    _importer(name).join()  # before this thread asks for it: an interrupt ends a wait, not an import
    return importlib.import_module(name)


@functools.cache
def _importer(name: str) -> threading.Thread:
    thread = threading.Thread(target=_import, args=(name,), name=f"biokit-import-{name}")
    thread.start()
    return thread


def _import(name: str) -> None:
    with contextlib.suppress(Exception):  # who asked meets it again
        importlib.import_module(name)
