"""Who of the other processes is lost: there, gone, or not to be reached."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from biokit.endings import PeerError
from biokit.parallel.peers import GONE, SILENT, THERE, Door, Peers, find_own_address, knock, open_door
from biokit.parallel.processes import join_processes
from biokit.train import _tell
from tests.distributed import TIMEOUT_S, Ranks, RanksFailed, free_port, ranks

LOOPBACK = "127.0.0.1"


class Store(dict):
    """What a key-value store promises, for threads."""

    set = dict.__setitem__

    def get(self, key):
        while key not in self:
            time.sleep(0.001)
        return self[key].encode()


@contextlib.contextmanager
def silent_port():
    """A port whose queue is full: who asks for it hears nothing, as where a link is cut."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(8):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(server.getsockname())
        time.sleep(0.05)
        yield server.getsockname()[1]


def test_a_knock_tells_three_cases_apart_and_asks_all_at_once():
    with socket.create_server((LOOPBACK, 0)) as server, silent_port() as silent:
        doors = {1: server.getsockname(), 2: (LOOPBACK, free_port()), 7: (LOOPBACK, silent), 8: (LOOPBACK, silent)}
        started = time.monotonic()
        assert knock(doors, 0.5) == {1: THERE, 2: GONE, 7: SILENT, 8: SILENT}
        assert time.monotonic() - started < 2.0
        assert knock({3: ("no address", 1)}, 0.5) == {3: SILENT}


def test_words_name_ranks_and_hosts():
    with socket.create_server((LOOPBACK, 0)) as server, silent_port() as silent:
        there, gone = Door("n1", *server.getsockname()), Door("n2", LOOPBACK, free_port())
        lost, mute = Door("n3", LOOPBACK, silent), Door("n4", "", 0)
        said = Peers(0, (there, gone, lost, mute)).describe_lost(0.3)
        assert said == "no longer there: rank 1 on n2; cannot be reached: rank 2 on n3"
        assert Peers(1, (there, gone)).describe_lost() == "all the others are still there"
        assert Peers(0, (there, mute)).describe_lost() == ""
        many = Peers(0, (there, *[gone] * 12)).describe_lost()
        assert many.endswith("rank 8 on n2 and 4 more") and many.count("rank") == 8
        crowd = Peers(0, (there, *[gone] * 200, *[lost] * 200)).describe_lost(0.3)
        assert crowd == "no longer there: rank 1 on n2; cannot be reached: rank 201 on n3"


def test_processes_learn_where_the_others_are_and_close_their_own():
    store, found, master = Store(), {}, ("localhost", 1)

    def join(rank):
        with open_door(store, rank, 2, master) as peers:
            found[rank] = peers
            barrier.wait()
            said.append(peers.describe_lost())
            barrier.wait()

    barrier, said = threading.Barrier(2), []
    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["all the others are still there"] * 2
    assert found[0].doors == found[1].doors
    assert found[1].describe_lost() == f"no longer there: rank 0 on {socket.gethostname()}"


def test_where_no_way_leads_nobody_can_be_asked():
    assert find_own_address("no such host", 1) == ""
    with open_door(Store(), 0, 1, ("no such host", 1)) as peers:
        assert peers.doors == (Door(socket.gethostname(), "", 0),)
    assert find_own_address(LOOPBACK, 1) == LOOPBACK


def lose_the_other(how):
    """What rank 0 is told once rank 1 is killed or stopped."""
    with join_processes(torch.device("cpu"), 3.0 if how == "stopped" else TIMEOUT_S, needs_group=True) as processes:
        processes.barrier()
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        try:
            processes.barrier()
        except RuntimeError as error:
            raise _tell(error, 3.0, processes.peers) from error


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("killed", "(no longer there: rank 1 on {})"),
        pytest.param("stopped", "(all the others are still there)", marks=pytest.mark.full),
    ],
)
def test_the_error_of_a_training_names_who_is_lost(how, what):
    with Ranks(2) as own, pytest.raises(RanksFailed) as caught:
        own.run(lose_the_other, how)
    told = caught.value.errors[0]
    assert isinstance(told, PeerError)
    assert f"did not answer in 3 s {what.format(socket.gethostname())}." in str(told)


def count_open_files():
    with join_processes(torch.device("cpu"), TIMEOUT_S, needs_group=True):
        pass
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with join_processes(torch.device("cpu"), TIMEOUT_S, needs_group=True):
            pass
    return len(list(Path("/proc/self/fd").iterdir())) - before


def test_ports_are_given_back():
    assert max(ranks(2).run(count_open_files)) <= 0
