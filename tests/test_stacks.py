"""Where ranks stand: asked of live processes, read from what faulthandler writes, and said in words."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from biokit import stacks
from biokit.errors import RunError
from biokit.frames import PACKAGE, STANDARD_LIBRARY, Frame
from biokit.runs import LifeFolder, RunFolder
from biokit.stacks import (
    ABSENT,
    DEAD,
    ELSEWHERE,
    SILENT,
    STOPPED,
    WAITS,
    Hang,
    RankStack,
    Thread,
    describe,
    find_collective,
    find_hang,
    name_ranks,
    parse_dump,
    read_hang,
    save_hang,
)
from tests.distributed import free_port

REPOSITORY = Path(__file__).parents[1]
C10D = "/opt/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
GRAPH = "/opt/lib/python3.11/site-packages/torch/autograd/graph.py"
CELL = """\
import importlib.util, signal, sys, time
from pathlib import Path
from biokit.stacks import answer_requests
stack_file, c10d_file, what = sys.argv[1:]
spec = importlib.util.spec_from_file_location("c10d", c10d_file)
c10d = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c10d)
if what == "mute":
    signal.signal(signal.SIGUSR1, lambda *_: None)
elif what != "deaf":
    answer_requests(Path(stack_file))

def stand():
    print("ready", flush=True)
    if what == "waits":
        c10d.all_reduce(1)
    while what == "computes":
        pass
    time.sleep(60)

stand()
"""
ALL_REDUCE = """\
import threading

def all_reduce(tensor):
    return _wait()

def _wait():
    threading.Event().wait(60)
"""
Start = Callable[..., psutil.Process]


@pytest.fixture
def life(tmp_path: Path) -> LifeFolder:
    found = RunFolder(tmp_path / "run").life(3)
    found.create()
    return found


@pytest.fixture
def start(life: LifeFolder, tmp_path: Path) -> Iterator[Start]:
    """Starts a rank that stands as asked; `who`: what its rank file says other than the truth."""
    cell, c10d = tmp_path / "cell.py", tmp_path / "site-packages/torch/distributed/distributed_c10d.py"
    cell.write_text(CELL)
    c10d.parent.mkdir(parents=True)
    c10d.write_text(ALL_REDUCE)
    started = []

    def start_rank(rank: int, what: str, **who: Any) -> psutil.Process:
        process = subprocess.Popen(
            [sys.executable, str(cell), str(life.stack_file(rank)), str(c10d), what],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        found = psutil.Process(process.pid)
        write_rank(life, rank, {"pid": process.pid, "pid_started": found.create_time(), **who})
        return found

    yield start_rank
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def write_rank(life: LifeFolder, rank: int, who: dict[str, Any]) -> None:
    life.rank_file(rank).write_text(json.dumps({"rank": rank, "host": socket.gethostname(), **who}))


def test_who_waits_and_who_is_elsewhere(life: LifeFolder, start: Start) -> None:
    for rank, what in enumerate(("waits", "sleeps", "waits", "computes")):
        start(rank, what)
    time.sleep(0.2)
    hang = find_hang(life, "the run did not end in 5 s")
    while "print(" in hang.verdict:  # one has not yet got there
        hang = find_hang(life, "the run did not end in 5 s")
    sure, computes = hang.verdict.split("; rank 3 ")
    assert sure == "Ranks 0, 2 wait in all_reduce (cell line 16); rank 1 is elsewhere: time.sleep(60) at cell line 19"
    assert re.fullmatch(r"is elsewhere: (while .*|pass) at cell line 1[78], computing\.", computes)
    assert (hang.life, hang.reason) == (3, "the run did not end in 5 s")
    assert [stack.state for stack in hang.ranks] == [WAITS, ELSEWHERE, WAITS, ELSEWHERE]
    assert [stack.busy for stack in hang.ranks] == [False, False, False, True]
    assert [frame.place for frame in hang.ranks[1].frames] == ["cell line 19", "cell line 21"]
    again = find_hang(life, "again")  # the answers are appended: only the new ones are read
    assert [stack.frames for stack in again.ranks[:3]] == [stack.frames for stack in hang.ranks[:3]]


def test_nobody_is_signalled_but_the_rank_itself(life: LifeFolder, start: Start) -> None:
    """SIGUSR1 ends a process that does not expect it."""
    others = [
        start(0, "deaf"),  # it has only begun
        start(1, "deaf", pid_started=1.0),  # another process has the number now
        start(2, "deaf", host="another-host"),
        start(3, "sleeps"),
    ]
    others[3].suspend()
    ended = start(4, "sleeps")
    ended.kill()
    while ended.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write_rank(life, 5, {"pid": -1})
    life.rank_file(6).write_text("{torn")
    hang = find_hang(life, "x")
    assert [stack.state for stack in hang.ranks] == [SILENT, DEAD, ABSENT, STOPPED, DEAD, DEAD]
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in others)
    assert not any(stack.frames for stack in hang.ranks)
    assert hang.verdict == (
        "Rank 3 is stopped (SIGSTOP); ranks 1, 4, 5 are gone; rank 0 is silent: no stack came; "
        "rank 2 is on host another-host, which was not asked."
    )


def test_what_the_supervisor_of_another_host_asked_for_is_read(life: LifeFolder) -> None:
    write_rank(life, 0, {"pid": 1, "host": "another-host"})
    life.stack_file(0).write_text(f'Thread 0x01 (most recent call first):\n  File "{C10D}", line 9 in barrier\n')
    assert find_hang(life, "x").ranks[0].collective == "barrier"
    os.utime(life.stack_file(0), (1.0, 1.0))
    assert find_hang(life, "x").ranks[0].state == ABSENT


def test_an_old_answer_is_not_taken_for_the_new_one(life: LifeFolder, start: Start) -> None:
    start(0, "mute")
    life.stack_file(0).write_text(f'Thread 0x01 (most recent call first):\n  File "{C10D}", line 9 in barrier\n')
    assert find_hang(life, "x", wait_s=0.3).ranks[0].state == SILENT


def test_no_rank_yet(life: LifeFolder) -> None:
    started = time.monotonic()
    assert find_hang(life, "x").verdict == "No rank has begun."
    assert time.monotonic() - started < 2.0


TWO_DUMPS = """\
Thread 0x00000a (most recent call first):
  File "/x/old.py", line 1 in old

Thread 0x00000b (most recent call first):
  File "/x/main.py", line 2 in main
Fatal Python error: Segmentation fault

Thread 0x00000a [worker] (most recent call first):
  File "/x/h\\xe4r.py", line 5 in zw\\u20acei
  File "/x/%s"..., line ??? in f

Current thread 0x00000b (most recent call first):
  File "/x/main.py", line 3 in <module>

Extension modules: numpy (total: 1)
"""


def test_the_last_of_several_dumps_is_read() -> None:
    worker, main = parse_dump(TWO_DUMPS % ("y" * 500))
    assert worker.frames == (Frame("/x/här.py", 5, "zw€ei"), Frame("/x/" + "y" * 500, 0, "f"))
    assert (main.frames, main.current, worker.current) == ((Frame("/x/main.py", 3, "<module>"),), True, False)
    assert parse_dump("") == parse_dump("nothing\n  File") == ()


def user(code: str = "f()", file: str = "/home/u/train.py") -> Frame:
    return Frame(file, 7, "step", code)


LOGGER = Frame("/opt/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", 1, "wrapper")
BACKWARD = Frame(GRAPH, 1, "_engine_run_backward")


@pytest.mark.parametrize(
    ("frames", "busy", "expected"),
    [
        ([Frame(C10D, 1, "all_reduce"), LOGGER, user()], False, "all_reduce"),
        ([Frame(C10D, 1, "all_gather"), LOGGER, Frame(C10D, 2, "gather_object"), user()], True, "gather_object"),
        ([Frame(C10D, 1, "_store_based_barrier"), Frame(C10D, 2, "new_group"), user()], False, "new_group"),
        ([Frame(C10D, 1, "reduce"), Frame("/x/site-packages/deepspeed/comm.py", 1, "log_it"), user()], True, "reduce"),
        ([Frame(C10D, 1, "_check_single_tensor"), user()], True, ""),
        ([BACKWARD, user()], False, "backward, the gradients' all_reduce"),
        ([BACKWARD, user()], True, ""),
        ([user("work.wait()")], False, "an unfinished operation's wait"),
        ([user("work.wait()")], True, ""),
        ([Frame(f"{STANDARD_LIBRARY}threading.py", 3, "wait", "waiter.wait()"), user("event.wait()")], False, ""),
        ([user("store.get('x')")], False, "the store's get"),
        ([user("_get_default_store().wait(['x'])")], False, "the store's wait"),
        ([user("stored.get('x')")], False, ""),
        ([Frame(f"{PACKAGE}parallel/processes.py", 1, "_meet", "time.sleep(MEET_S)")], True, "a meeting of all ranks"),
        ([Frame(f"{PACKAGE}parallel/processes.py", 1, "main_first", "time.sleep()")], True, "a wait for rank 0"),
        ([Frame(C10D[:-18] + "rendezvous.py", 1, "_create_c10d_store"), user()], False, "_create_c10d_store"),
        ([user("time.sleep(9)"), Frame(C10D, 1, "all_reduce")], False, ""),  # called back from within: not a wait
    ],
)  # fmt: skip
def test_what_a_rank_waits_in(frames: list[Frame], busy: bool, expected: str) -> None:
    assert find_collective([Thread("b", False, tuple(frames))], busy) == expected


def test_a_collective_of_the_autograd_thread() -> None:
    other = Thread("a", False, (Frame(C10D, 1, "all_to_all"), Frame("/x/y.py", 1, "backward")))
    main = Thread("b", True, (BACKWARD, user()))
    assert find_collective([other, main], True) == "backward, all_to_all"
    assert find_collective([other, Thread("b", True, (user(),))], False) == ""


def stack(rank: int, state: str, collective: str = "", line: int = 1, **more: Any) -> RankStack:
    frames = () if state in (STOPPED, DEAD, SILENT, ABSENT) else (Frame("/r/cell.py", line, "f", "go()"),)
    return RankStack(rank, state, "h", 1, collective, own=len(frames) - 1, frames=frames, **more)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([stack(0, ELSEWHERE)], "Rank 0 is elsewhere: go() at cell line 1."),
        ([stack(0, WAITS, "barrier"), stack(1, WAITS, "barrier")],
         "Ranks 0, 1 wait in barrier (cell line 1). None is missing: look at the network between them, or at a group "
         "that leaves ranks out."),
        ([stack(0, WAITS, "barrier"), stack(1, WAITS, "recv", 4)],
         "Rank 0 waits in barrier (cell line 1); rank 1 waits in recv (cell line 4). They wait for different things: "
         "the ranks have taken different ways through the code."),
        ([stack(0, ELSEWHERE, busy=True), stack(1, ELSEWHERE, busy=True)],
         "Ranks 0, 1 are elsewhere: go() at cell line 1, computing. None waits for another: the run may only need more "
         "time."),
        ([stack(0, ELSEWHERE), stack(1, ELSEWHERE)], "Ranks 0, 1 are elsewhere: go() at cell line 1."),
        ([stack(0, STOPPED), stack(1, WAITS, "recv")],
         "Rank 1 waits in recv (cell line 1); rank 0 is stopped (SIGSTOP)."),
    ],
)  # fmt: skip
def test_verdicts(ranks: list[RankStack], expected: str) -> None:
    assert describe(ranks) == expected


def test_names_of_ranks() -> None:
    found = [name_ranks(ranks) for ranks in ([3], [0, 2], [0, 1], [0, 1, 2, 5, 7, 8, 9])]
    assert found == ["rank 3", "ranks 0, 2", "ranks 0, 1", "ranks 0-2, 5, 7-9"]


def test_a_hang_is_written_and_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_hang(folder) is None
    hang = Hang("why", "verdict", 2, 12.5, (stack(0, WAITS, "recv"), stack(1, DEAD)))
    save_hang(folder, hang)
    assert read_hang(folder) == hang


@pytest.mark.parametrize("text", ["", "[]", "{torn", '{"a":' * 100_000, " " * (2 << 20)])
def test_a_hang_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "hang.json").write_text(text)
    with pytest.raises(RunError, match=r"hang\.json cannot be read"):
        read_hang(RunFolder(tmp_path))


def test_a_hostile_hang_file_gives_what_can_be_had(tmp_path: Path) -> None:
    frames = [{"file": 1, "line": -5, "function": None}, "x", {"file": "a.py", "line": 1e400, "code": "y" * 9999}]
    ranks = [{"rank": "zero", "state": "<b>", "own": 99, "frames": frames}, 7, None]
    (tmp_path / "hang.json").write_text(json.dumps({"ranks": ranks, "time": "late", "verdict": "v" * 100_000}))
    hang = read_hang(RunFolder(tmp_path))
    assert hang is not None and len(hang.verdict) < 10_000 and hang.time == 0.0
    assert [(one.rank, one.state, one.own, len(one.frames)) for one in hang.ranks] == [(0, SILENT, 1, 2)]
    assert len(hang.ranks[0].frames[1].code) < 300


def test_stacks_cost_no_torch() -> None:
    code = "import sys, biokit.stacks, biokit.failures; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


GLOO = """\
import datetime as dt, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from biokit.stacks import answer_requests
answer_requests(Path(sys.argv[1]))
dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
rank, ones = dist.get_rank(), torch.ones(3)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
ways = {
    "all_reduce": lambda: dist.all_reduce(ones),
    "backward": lambda: model(ones).sum().backward(),
    "wait": lambda: dist.all_reduce(ones, async_op=True).wait(),
    "all_gather_object": lambda: dist.all_gather_object([None, None], "x"),
}
for name, way in ways.items():
    dist.barrier()
    if rank == 1:
        print(name, flush=True)
        sys.stdin.readline()
    way()
dist.barrier()
os._exit(0)  # gloo's threads may crash an orderly end
"""


def test_real_collectives(life: LifeFolder, tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(GLOO)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = str(REPOSITORY)
    processes = []
    for rank in range(2):
        command = [sys.executable, str(tmp_path / "cell.py"), str(life.stack_file(rank))]
        environment = {**os.environ, **variables, "RANK": str(rank)}
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        )
        created = psutil.Process(processes[rank].pid).create_time()
        write_rank(life, rank, {"pid": processes[rank].pid, "pid_started": created})
    one = processes[1]
    assert one.stdin is not None and one.stdout is not None
    try:
        verdicts = {}
        while name := one.stdout.readline().strip():
            end = time.monotonic() + 30.0
            while not ((hang := find_hang(life, name)).ranks[0].state == WAITS and "readline" in hang.verdict) or (
                "in barrier" in hang.verdict
            ):
                assert time.monotonic() < end, hang.verdict  # one of them has not yet got there
            verdicts[name] = hang.verdict
            one.stdin.write("\n")
            one.stdin.flush()
        assert [process.wait(30) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    other = "; rank 1 is elsewhere: sys.stdin.readline() at cell line 19."
    assert verdicts == {
        "all_reduce": f"Rank 0 waits in all_reduce (cell line 10){other}",
        "backward": f"Rank 0 waits in backward, the gradients' all_reduce (cell line 11){other}",
        "wait": f"Rank 0 waits in an unfinished operation's wait (cell line 12){other}",
        "all_gather_object": f"Rank 0 waits in all_gather_object (cell line 13){other}",
    }


def test_a_fatal_signal_leaves_the_stack(life: LifeFolder, tmp_path: Path) -> None:
    code = (
        "import ctypes, sys; from pathlib import Path; from biokit.stacks import answer_requests\n"
        "for name in sys.argv[1:]: answer_requests(Path(name))\n"  # the second time it writes elsewhere
        "ctypes.string_at(0)\n"
    )
    files = [tmp_path / "first.txt", life.stack_file(0)]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, files)], capture_output=True)
    assert done.returncode == -signal.SIGSEGV
    assert files[0].read_text() == "" and done.stderr == b""
    (main,) = parse_dump(files[1].read_text())
    assert main.current and main.frames[0].function == "string_at" and stacks.REQUEST == signal.SIGUSR1
