"""A key-value store that answers, and one that does not."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from biokit.endings import PeerError, is_lost_peer
from biokit.parallel.processes import Processes
from biokit.parallel.stores import SilentStore, hang_up, limited
from tests.distributed import free_port

PORT = 9  # nobody's


class Silent:
    """A store behind a link that is cut after some answers."""

    def __init__(self, num_answers: int) -> None:
        self.num_answers, self.mended = num_answers, threading.Event()

    def add(self, key: str, amount: int) -> int:
        self.num_answers -= 1
        if self.num_answers < 0:
            self.mended.wait()
        return 1


def test_it_does_what_the_store_does():
    with limited(dist.HashStore(), 5.0, PORT) as store:
        store.set("a", "ü")
        assert store.get("a") == "ü".encode()
        assert [store.add("n", 2), store.add("n", 0)] == [2, 2]
        assert store.check(["a", "n"]) and not store.check(["a", "b"])
        with pytest.raises((RuntimeError, ValueError)):
            store.add("a", 1)  # no number: the store's own error
        assert store.check(["a"])


def test_who_does_not_answer_is_not_waited_for_longer_than_asked():
    silent, started = Silent(1), time.monotonic()
    with limited(silent, 0.3, PORT) as store:
        assert store.add("n", 1) == 1
        threading.Timer(1.5, silent.mended.set).start()  # else the thread would be waited for in vain
        with pytest.raises(SilentStore, match=r"did not answer: wait timeout after 0\.3 s") as caught:
            store.add("n", 1)
    assert 0.3 <= time.monotonic() - started < 5.0
    assert is_lost_peer(caught.value)
    silent.mended.set()


def test_a_meeting_says_that_the_store_is_silent_and_not_that_a_rank_failed():
    silent = Silent(2)
    with limited(silent, 0.2, PORT) as store:
        own = Processes(rank=1, world_size=2, store=store)
        threading.Timer(1.5, silent.mended.set).start()
        with pytest.raises(SilentStore), own.together("saving"):
            pass
    silent.mended.set()


def test_a_main_process_that_took_the_store_with_it_has_failed():
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    with limited(Gone(), 1.0, PORT) as store:
        own = Processes(rank=1, world_size=2, store=store)
        with pytest.raises(PeerError, match="the main process"), own.main_first("preparing"):
            pass


def test_a_connection_that_is_given_up_wakes_who_waits_there():
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        waits, other = [stack.enter_context(socket.create_connection(one.getsockname())) for one in servers]
        hang_up(servers[0].getsockname()[1])
        assert waits.recv(1) == b""
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(1)


LONELY = """
import sys
import torch
from biokit.parallel.processes import join_processes
from biokit.parallel.stores import SilentStore

try:
    with join_processes(torch.device("cpu"), 3.0, needs_group=True) as processes:
        while True:
            with processes.together("saving"):
                print("asks", flush=True)
except SilentStore:
    sys.exit(7)
"""


@pytest.mark.full
def test_a_process_whose_store_is_silent_ends_as_it_wants():
    launcher = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words, pipe = [sys.executable, "-c", LONELY], subprocess.PIPE
    both = [
        subprocess.Popen(
            words, env={**os.environ, **launcher, "RANK": str(rank)}, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    keeper, lonely = both
    try:
        lonely.stdout.readline()
        keeper.send_signal(signal.SIGSTOP)
        said = lonely.communicate(timeout=60)[0]
        assert (lonely.returncode, "terminate called" in said) == (7, False), said[-3000:]
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_threads_end():
    before = threading.active_count()
    for _ in range(20):
        with limited(dist.HashStore(), 5.0, PORT) as store:
            store.set("a", "b")
    assert threading.active_count() <= before
