"""Supervisors of two nodes on one machine: a life begins and ends on both, whatever happens to one."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from biokit.config import config_to_yaml
from biokit.launch.orders import NODES, Order, write_order
from biokit.launch.states import read_state
from biokit.launch.supervision.meeting import read_note
from biokit.launch.supervision.supervisor import Limits
from biokit.launch.torchrun import node_commands
from biokit.runs import RunFolder
from biokit.train import train
from tests.distributed import free_port
from tests.small_run import small_config
from tests.supervised import MARK, find_marked

LIMITS = Limits(checkpoint_s=5.0, grace_s=1.0, interrupt_s=0.5, watchdog_s=3.0, beat_s=0.3)
# agents that need no torch: what each does in each life stands in the plan
BODY = """
import json, sys
from biokit.launch.supervision import lives
from biokit.launch.supervision import meeting
from biokit.launch.supervision import nodes
from biokit.launch.orders import read_order
from biokit.launch.supervision.placement import Agent
from biokit.launch.supervision.supervisor import Limits, supervise
from biokit.runs import RunFolder

folder, node = RunFolder(sys.argv[1]), int(sys.argv[2])
meeting.BEAT_S, meeting.LOST_S, nodes.COME_S, nodes.CUT_WAIT_S, nodes.LAST_WORD_S = json.loads(sys.argv[3])
nodes.LOST_S = meeting.LOST_S
plan = json.loads(sys.argv[4])

def place_agents(order, life, number, node_rank):
    say = f"import time; open({str(life.path / f'agent_{node}.txt')!r}, 'w').write({order.endpoint!r}); "
    return [Agent(node, [sys.executable, "-c", say + plan[min(number, len(plan)) - 1]])]

lives.place_agents = place_agents
sys.exit(supervise(folder, read_order(folder), node, limits=eval(sys.argv[5])))
"""
WAITS = (0.2, 3.0, 8.0, 0.2, 4.0)
GOOD, BAD, LONG = "time.sleep(0.2)", "raise SystemExit(3)", "time.sleep(100)"


class Pair:
    """The supervisors of two nodes, and what each node's agent does in each life."""

    def __init__(self, path: Path, **order: Any) -> None:
        self.folder = RunFolder(path)
        self.folder.create()
        self.port = free_port()
        order = {"max_lives": 3, "backoff_s": 0.1, "endpoint": f"127.0.0.1:{self.port}"} | order
        write_order(self.folder, Order("script", ("x",), ("--nproc-per-node", "1"), NODES, 2, **order))
        self.name, self.mark = MARK, f"{path.name}-{time.time_ns()}"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int, *plan: str, waits: tuple[float, ...] = WAITS) -> None:
        """Start a node's supervisor."""
        state_home = str(self.folder.path.parent / "state")
        with self.log_file(node).open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [sys.executable, "-c", BODY, str(self.folder.path), str(node), json.dumps(waits), json.dumps(plan),
                 repr(LIMITS)],
                env={**os.environ, "XDG_STATE_HOME": state_home, self.name: self.mark},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self) -> list[int]:
        """Exit codes by node; nothing of them is left."""
        codes = [self.processes[node].wait(60) for node in sorted(self.processes)]
        assert find_marked(f"{self.name}={self.mark}") == []
        return codes

    def wait_for_life(self, number: int) -> None:
        """Until both nodes' agents of a life have begun."""
        files = [self.folder.life(number).path / f"agent_{node}.txt" for node in range(2)]
        self.wait_until(lambda: all(file.exists() and file.read_text() for file in files))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Until it holds."""
        end = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < end, self.said(0) + self.said(1)
            time.sleep(0.02)

    def log_file(self, node: int) -> Path:
        return self.folder.logs / f"node_{node}.log"

    def said(self, node: int) -> str:
        """What a supervisor said."""
        return self.log_file(node).read_text() if self.log_file(node).exists() else ""

    def outcomes(self) -> list[str]:
        """As their own files have it."""
        states = [read_state(self.folder, node) for node in range(2)]
        return [state.outcome if state is not None else "" for state in states]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    yield from started(tmp_path)


def started(tmp_path: Path, **order: Any) -> Iterator[Pair]:
    pair = Pair(tmp_path / "run", **order)
    yield pair
    for pid in find_marked(f"{pair.name}={pair.mark}"):
        os.kill(pid, signal.SIGKILL)
    for process in pair.processes.values():
        process.kill()
        process.wait()


def test_a_life_that_fails_on_one_node_ends_on_both_and_the_next_begins_on_both(pair: Pair) -> None:
    pair.start(1, BAD, GOOD)
    with socket.create_server(("", pair.port)):  # the first port is not free
        pair.start(0, LONG, GOOD)
        assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert f"life 1: it failed on node 1 ({socket.gethostname()})" in pair.said(0)
    assert pair.folder.last_life() == 2
    assert pair.outcomes() == ["finished"] * 2
    endpoints = {
        (pair.folder.life(life).path / f"agent_{node}.txt").read_text() for node in range(2) for life in (1, 2)
    }
    assert len(endpoints) == 2 and f"127.0.0.1:{pair.port}" not in endpoints
    failure = json.loads(pair.folder.failure_file.read_text())
    assert failure["life"] == 1 and "exit code 3 on node 1" in failure["headline"]


def test_what_is_asked_of_one_supervisor_ends_both(pair: Pair) -> None:
    pair.folder.request_stop()  # an earlier run left it
    pair.folder.node_file(0).parent.mkdir()
    pair.folder.node_file(0).write_text('{"word": "old", "outcome": "failed", "life": 9}')
    pair.start(1, LONG)
    pair.wait_until(lambda: read_note(pair.folder, 1))
    pair.folder.clear_stop()  # as who starts node 0 does
    pair.start(0, LONG)
    pair.wait_for_life(1)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert pair.outcomes() == ["stopped"] * 2
    assert "asked to end: terminate" in pair.said(0)
    assert not pair.folder.stop_requested()


def test_a_node_that_vanishes_is_named(pair: Pair) -> None:
    for node in range(2):
        pair.start(node, LONG)
    pair.wait_for_life(1)
    pair.processes[1].kill()
    assert pair.processes[0].wait(30) == 1
    lost = f"node 1 ({socket.gethostname()}) has not been heard of for 3 s"
    assert lost in pair.said(0)
    assert json.loads(pair.folder.failure_file.read_text())["headline"] == lost
    assert pair.folder.last_life() == 1


@pytest.mark.full
def test_a_leader_that_vanishes_is_named(pair: Pair) -> None:
    for node in range(2):
        pair.start(node, LONG)
    pair.wait_for_life(1)
    pair.processes[0].kill()
    assert pair.processes[1].wait(30) == 1
    assert f"node 0 ({socket.gethostname()}) has not been heard of for 3 s" in pair.said(1)


@pytest.mark.full
def test_a_supervisor_that_is_started_again_goes_along_with_the_next_life(pair: Pair) -> None:
    for node in range(2):
        pair.start(node, LONG, GOOD)
    pair.wait_for_life(1)
    pair.processes[1].kill()
    pair.processes[1].wait()
    for pid in find_marked(f"{pair.name}={pair.mark}"):
        if b"agent_1.txt" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    pair.start(1, LONG, GOOD)
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert pair.folder.last_life() == 2


@pytest.mark.full
def test_a_node_that_does_not_come_is_named(pair: Pair) -> None:
    pair.start(0, GOOD, waits=(0.2, 3.0, 1.0, 0.2, 4.0))
    assert pair.wait() == [1]
    assert "node 1 did not come within 1 s" in pair.said(0)
    assert pair.folder.last_life() == 0


@pytest.mark.full
def test_all_lives_are_used_up_on_both(pair: Pair) -> None:
    pair.start(0, GOOD, BAD)
    pair.start(1, BAD, LONG)
    assert pair.wait() == [1, 1]
    assert pair.outcomes() == ["failed"] * 2
    assert pair.folder.last_life() == 3


@pytest.mark.full
def test_the_time_limit_ends_both(tmp_path: Path) -> None:
    for pair in started(tmp_path, timeout_s=3.0):
        for node in range(2):
            pair.start(node, LONG)
        assert pair.wait() == [124, 124]
        assert pair.outcomes() == ["timed out"] * 2
        assert json.loads(pair.folder.hang_file.read_text())["reason"] == "the run did not end in 3 s"


def test_an_address_that_nobody_knows_is_said_at_once(tmp_path: Path) -> None:
    for pair in started(tmp_path, endpoint="no such host:29500"):
        pair.start(0, GOOD)
        assert pair.wait() == [1]
        assert "MASTER_ADDR of no such host:29500: this node knows no such host" in pair.said(0)


def test_two_commands_train_as_one_process_does(tmp_path: Path) -> None:
    """Real agents, by the commands that `--node-commands` prints."""
    config = small_config(tmp_path, "run", device="cpu", train_iters=4)
    config.strategy = "DDP"
    asked = tmp_path / "asked.yaml"
    asked.write_text(config_to_yaml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path / "state")}
    lines = node_commands([str(asked)], 2, 1, "127.0.0.1", free_port(), ["--lives", "2", "--timeout", "200"])
    both = [
        subprocess.Popen(shlex.split(line), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in lines
    ]
    said = [process.communicate(timeout=250)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "[rank 0] finished at step 4 of 4, loss " in said[0] and "finished at step" not in said[1]
    train(small_config(tmp_path, "single", device="cpu", train_iters=4))
    curves = [[line["loss"] for line in RunFolder(tmp_path / run).read_metrics()] for run in ("run", "single")]
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=4e-6, rel=0)
    hosts = [json.loads(RunFolder(tmp_path / "run").life(1).rank_file(rank).read_text())["node"] for rank in range(2)]
    assert sorted(hosts) == [0, 1]
