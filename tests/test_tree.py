"""Process trees: who ends with whom; nothing but the own descendants is ever hit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from biokit.launch.tree import end_tree, find_process, list_descendants

IGNORING = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
# leaves a grandchild in a session of its own, whose parent ends at once
DAEMON = (
    "import subprocess, sys, time\n"
    f"code = {IGNORING!r}\n"
    'middle = \'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", sys.argv[1]], '
    "start_new_session=True, stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid, flush=True)'\n"
    "done = subprocess.run([sys.executable, '-c', middle, code], stdout=subprocess.PIPE, text=True)\n"
    "print(done.stdout.strip(), flush=True)\n"
    "time.sleep(600)\n"
)
OWNER = "import sys; from biokit.launch.tree import become_subreaper, end_with; {calls}; exec({body!r})"


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts Python code; what is left is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_code(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_code
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_subreaper_keeps_what_loses_its_parent(start: Callable[[str], subprocess.Popen[str]]) -> None:
    owner = start(OWNER.format(calls="become_subreaper()", body=DAEMON))
    daemon = read_pid(owner)
    assert daemon in [process.pid for process in list_descendants(owner.pid)]
    begun = time.monotonic()
    assert end_tree(owner.pid, grace_s=0.3) == []
    assert time.monotonic() - begun < 5
    assert is_gone(daemon) and owner.wait(5) == -signal.SIGTERM


def test_descendants_are_found_after_their_parent_went(start: Callable[[str], subprocess.Popen[str]]) -> None:
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {IGNORING!r}], "
    parent = start(code + "stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)")
    child = read_pid(parent)
    assert end_tree(parent.pid, grace_s=0.3) == []  # the parent obeys SIGTERM, the child becomes init's
    assert is_gone(child)


def test_only_descendants_are_hit(start: Callable[[str], subprocess.Popen[str]]) -> None:
    one, other = start(IGNORING), start(IGNORING)
    for process in (one, other):
        assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert end_tree(one.pid, grace_s=0) == []
    assert other.poll() is None
    assert end_tree(one.pid, grace_s=0) == []  # it has ended: nothing to do


def test_an_id_alone_names_no_process() -> None:
    own = psutil.Process()
    assert find_process(own.pid, own.create_time()) == own
    assert find_process(own.pid, own.create_time() - 60) is None
    assert find_process(2**22 + 1, 0.0) is None


@pytest.mark.parametrize("body", [IGNORING, DAEMON], ids=["ignores SIGTERM", "has a daemon"])
def test_a_child_ends_with_its_parent(start: Callable[[str], subprocess.Popen[str]], body: str) -> None:
    setup = "import os, signal, sys; import biokit.launch.tree as t; t.ORPHAN_GRACE_S = 0.5; t.become_subreaper(); "
    setup += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); end_with(os.getppid())"  # as torchrun's agent
    child = OWNER.format(calls=setup, body=f"import os; print(os.getpid(), flush=True)\n{body}")
    parent = start(
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True)\n"
        "print(p.stdout.readline(), p.stdout.readline(), sep='', end='', flush=True)\ntime.sleep(600)"
    )
    pids = [read_pid(parent)]
    if body == DAEMON:
        pids.append(read_pid(parent))
    else:
        assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    parent.kill()
    wait_until(lambda: all(map(is_gone, pids)))


def test_a_child_whose_parent_is_already_gone_does_not_start() -> None:
    code = OWNER.format(calls=f"end_with({os.getpid() + 1})", body="print('started')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 1) and "is gone" in done.stderr
