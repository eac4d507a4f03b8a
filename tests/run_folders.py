"""What the tests of runs do with run folders and processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from biokit.runs import RunFolder


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def say(folder: RunFolder, **entries: Any) -> None:
    """Write what a supervisor says of itself: this process, running its first life, unless told otherwise."""
    own = {"pid": os.getpid(), "pid_started": psutil.Process().create_time(), "host": socket.gethostname()}
    said = {"state": "running", "outcome": "", "life": 1, "max_lives": 3, "started": 1.0, "beat": time.time()}
    folder.supervisor_file().parent.mkdir(exist_ok=True)
    folder.supervisor_file().write_text(json.dumps(said | own | entries))


def interrupt_soon(after_s: float = 0.3) -> threading.Timer:
    """A real SIGINT to this process, as a notebook's stop square sends it."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer
