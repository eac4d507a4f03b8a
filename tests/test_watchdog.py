"""The watchdog: what may not last is a fault, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from biokit.launch.supervision import watchdog
from biokit.launch.supervision.watchdog import Watchdog
from biokit.runs import LifeFolder


@dataclass
class StandIn:
    """A life of which only files and exit codes are looked at."""

    files: LifeFolder
    is_training: bool = False
    is_alone: bool = True
    is_elastic: bool = False
    codes: list[int | None] = field(default_factory=lambda: [None])

    def poll(self) -> list[int | None]:
        return self.codes

    def lingering(self) -> list[int]:
        return [0] if self.files.agent_file(0).exists() and self.codes == [None] else []


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(watchdog, "LOOK_S", 0.02)
    monkeypatch.setattr(watchdog, "ERRORS_S", 0.02)
    monkeypatch.setattr(watchdog, "SILENT_S", 0.05)
    files = LifeFolder(tmp_path)
    files.create()
    return StandIn(files)


@pytest.fixture
def ranks(life: StandIn) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that sleep, under the names of ranks 0 and 1."""
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    for rank, process in enumerate(processes):
        introduce(life, rank, process.pid)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def introduce(life: StandIn, rank: int, pid: int, **more: object) -> None:
    who = {"host": socket.gethostname(), "pid": pid, "pid_started": psutil.Process(pid).create_time(), **more}
    life.files.rank_file(rank).write_text(json.dumps(who))


def watch(dog: Watchdog, seconds: float = 0.3) -> str:
    """The fault that shows in that time, or empty."""
    end = time.monotonic() + seconds
    while not dog.fault and time.monotonic() < end:
        dog.look()
        time.sleep(0.005)
    return dog.fault


def wait_for_state(process: subprocess.Popen[bytes], state: str) -> None:
    while psutil.Process(process.pid).status() != state:
        time.sleep(0.005)


def test_all_is_well(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    assert watch(Watchdog(life, 0.1)) == ""


def test_a_stopped_rank(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    dog = Watchdog(life, 0.2)
    assert watch(dog, 0.1) == ""
    ranks[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert watch(dog, 5) == "rank 1 is stopped (SIGSTOP)" and dog.rank_is_stopped
    assert time.monotonic() - begun >= 0.15


def test_an_agent_that_told_its_end_and_stays(life: StandIn) -> None:
    dog = Watchdog(life, 0.2)
    assert watch(dog, 0.3) == ""
    life.files.agent_file(0).write_text("{}")
    assert watch(dog, 5) == "node 0: the agent has told its end, but is still there"


def test_a_rank_that_goes_on_is_forgiven(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    dog = Watchdog(life, 0.2)
    for _ in range(3):
        ranks[1].send_signal(signal.SIGSTOP)
        wait_for_state(ranks[1], psutil.STATUS_STOPPED)
        assert watch(dog, 0.12) == ""
        ranks[1].send_signal(signal.SIGCONT)
        assert watch(dog, 0.06) == ""


def test_time_that_was_not_observed_does_not_count(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    dog = Watchdog(life, 0.5)
    ranks[1].send_signal(signal.SIGSTOP)
    wait_for_state(ranks[1], psutil.STATUS_STOPPED)
    watch(dog, 0.05)
    time.sleep(0.6)  # as if the machine had slept
    assert watch(dog, 0.1) == ""


def test_an_agent_that_does_not_look(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    dog = Watchdog(life, 0.2)
    watch(dog, 0.1)
    ranks[0].kill()  # and nobody waits for it: a zombie
    assert watch(dog, 5) == "rank 0 has ended, but its agent does not notice"


def test_torchruns_own_restarts_are_its_own_affair(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    life.is_training = life.is_elastic = True
    life.files.error_file(1).write_text("{}")
    ranks[1].kill()
    ranks[1].wait()
    dog = Watchdog(life, 0.1)
    assert watch(dog, 0.5) == ""
    ranks[0].send_signal(signal.SIGSTOP)
    assert watch(dog, 5) == "rank 0 is stopped (SIGSTOP)"


def test_an_agent_that_outlives_an_error(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    dog = Watchdog(life, 0.2)
    life.files.error_file(1).write_text("{}")
    assert watch(dog, 5) == "rank 1 has failed, but its agent does not end"


@pytest.mark.parametrize(("is_training", "fault"), [(True, "rank 0 is gone, but its agent does not end"), (False, "")])
def test_a_rank_that_is_gone(
    life: StandIn, ranks: list[subprocess.Popen[bytes]], is_training: bool, fault: str
) -> None:
    """A script may have left by os._exit(0), while the other ranks still work: torchrun would let it."""
    life.is_training = is_training
    dog = Watchdog(life, 0.1)
    watch(dog, 0.06)
    ranks[0].kill()
    ranks[0].wait()
    assert watch(dog, 1.0 if fault else 0.4) == fault


def test_a_rank_that_is_done(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    life.is_training = True
    introduce(life, 0, ranks[0].pid, code=0)
    dog = Watchdog(life, 0.1)
    watch(dog, 0.06)
    ranks[0].kill()
    ranks[0].wait()
    assert watch(dog, 0.4) == ""


@pytest.mark.parametrize(
    ("is_alone", "fault"), [(True, "all ranks are gone, but their agent does not end"), (False, "")]
)
def test_an_agent_without_ranks(
    life: StandIn, ranks: list[subprocess.Popen[bytes]], is_alone: bool, fault: str
) -> None:
    life.is_alone = is_alone  # else it may wait for the ranks of the others
    dog = Watchdog(life, 0.1)
    watch(dog, 0.06)
    for process in ranks:
        process.kill()
        process.wait()
    assert watch(dog, 1.0 if fault else 0.4) == fault


def test_an_agent_that_outlives_another(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    life.codes = [1, None]
    assert watch(Watchdog(life, 0.1), 5) == "an agent has failed, but another one does not end"
    life.codes = [0, None]
    assert watch(Watchdog(life, 0.1)) == ""


def test_ranks_of_other_machines_are_not_judged(life: StandIn) -> None:
    who = {"host": "elsewhere", "pid": 1, "pid_started": 0.0}
    life.files.rank_file(0).write_text(json.dumps(who))
    life.files.rank_file(1).write_text(json.dumps({**who, "host": socket.gethostname()}))  # of the same name
    life.is_training = True
    assert watch(Watchdog(life, 0.1)) == ""


def look_for_hang(life: StandIn, dog: Watchdog | None = None) -> str:
    dog, reason = dog or Watchdog(life, 60.0), ""
    end = time.monotonic() + 0.4
    while not reason and time.monotonic() < end:
        reason = dog.look()
        time.sleep(0.005)
    return reason


def test_a_rank_that_waited_in_vain(life: StandIn, ranks: list[subprocess.Popen[bytes]]) -> None:
    assert look_for_hang(life) == ""
    life.files.error_file(0).write_text(json.dumps({"is_effect": True}))
    assert look_for_hang(life) == "rank 0 waited in vain for the others"


@pytest.mark.parametrize("case", ["an error of its own", "all have failed", "the other is gone"])
def test_a_lost_peer_is_no_hang(life: StandIn, ranks: list[subprocess.Popen[bytes]], case: str) -> None:
    dog = Watchdog(life, 60.0)
    watch(dog, 0.06)
    if case == "all have failed":
        life.files.error_file(1).write_text(json.dumps({"is_effect": True}))
    if case == "the other is gone":
        os.kill(ranks[1].pid, signal.SIGKILL)
    life.files.error_file(0).write_text(json.dumps({"is_effect": case != "an error of its own"}))
    assert look_for_hang(life, dog) == ""
