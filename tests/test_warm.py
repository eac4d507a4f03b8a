"""Warm ranks: what stays between cells, what becomes of them when a cell goes wrong, and who may talk to them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from biokit.errors import DataError, EngineError, RunError
from biokit.launch.failed_run import RunFailed
from biokit.launch.values import read_values
from biokit.launch.warm import members
from biokit.launch.warm.members import Member, admit, open_door, receive_any
from biokit.launch.warm.messages import MOST_BYTES, receive_message, send_message, write_token
from biokit.launch.warm.pool import Cell, CellEnd, Pool
from biokit.launch.warm.rank import is_silenced, run_code
from biokit.launch.warm.variables import describe_variables
from biokit.runs import RunFolder

INIT = "import os, time, torch, torch.distributed as dist\ndist.init_process_group('gloo')\nr = dist.get_rank()\n"
_names = (f"cell_{number}" for number in itertools.count(1))


# ---- messages


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_messages_arrive_whole_however_long(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    message = {"code": "print('ä')\n" * 100_000, "names": ["x"]}
    threading.Thread(target=send_message, args=(one, message)).start()
    assert receive_message(other) == message


@pytest.mark.parametrize("raw", [b"", b"\0\0", b"\0\0\0\2[]", b"\0\0\0\3{a}", b"\0\0\0\x09{}", b"\xff\xff\xff\xff{}"])
def test_what_is_no_message_is_taken_for_the_end(pair: tuple[socket.socket, socket.socket], raw: bytes) -> None:
    one, other = pair
    one.sendall(raw)
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        receive_message(other)


def test_messages_have_a_limit(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(RunError, match="more than 67,108,864"):
        send_message(pair[0], {"code": "x" * MOST_BYTES})


# ---- the door


def knock(path: Path, message: dict[str, Any]) -> socket.socket:
    """Connect and say something."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    send_message(connection, message)
    return connection


def test_only_who_knows_the_token_is_let_in(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    assert len(token) == 64 and stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert write_token(tmp_path / "other") != token
    with open_door() as (listener, path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for wrong in ({"token": "x" * 64, "rank": 0}, {"token": None, "rank": 0}, {"rank": 0}):
            with knock(path, wrong) as connection:
                assert admit(listener, token, 5) is None
                assert connection.recv(1) == b"", "it is turned away at once"
        with knock(path, {"token": token, "rank": 3}):
            member = admit(listener, token, 5)
            assert member is not None and (member.rank, member.process.pid) == (3, os.getpid())
            member.connection.close()
        assert admit(listener, token, 0.01) is None
    assert not path.parent.exists()


def test_a_token_is_never_written_over_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("somebody's")
    with pytest.raises(FileExistsError):
        write_token(tmp_path / "token")


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(members.tempfile, "tempdir", str(long))
    with pytest.raises(EngineError, match="Set TMPDIR"), open_door():
        pass


def test_a_rank_that_is_gone_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    member = Member(0, one, psutil.Process())
    assert list(receive_any([member], 0)) == [] and not member.gone
    other.close()
    assert list(receive_any([member], 1)) == [(member, {})] and member.gone


# ---- a cell in a rank


@pytest.mark.parametrize(
    ("code", "value"), [("1 + 1", 2), ("x = 5\nx", 5), ("x = 5", None), ("7;", None), ("7 ; # so", None), ("", None)]
)
def test_the_last_expression_is_the_value(code: str, value: Any) -> None:
    assert run_code(code, "cell.py", {}) == value


def test_a_semicolon_inside_is_none_at_the_end() -> None:
    assert not is_silenced("f('a;')  # ;") and is_silenced("f();\n\n# done")


def test_line_numbers_are_the_notebooks(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    with pytest.raises(ZeroDivisionError) as caught:
        run_code("\nx = 1\nx / 0", str(tmp_path / "cell_1.py"), scope)
    assert caught.traceback[-1].lineno + 1 == 3
    assert str(caught.traceback[-1].statement) == "x / 0"


def test_variables_are_told_in_words() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise ValueError

    scope = {
        "few": torch.tensor([1.5, 2.0]),
        "many": torch.arange(100, dtype=torch.float32),
        "model": torch.nn.Linear(2, 2),
        "bad": Bad(),
        "items": list(range(1000)),
        "api_token": "hf_abcdefgh",
        "meta": torch.empty(3, device="meta"),
    }
    told = describe_variables(scope, [*scope, "nope"])
    assert told["few"] == {"type": "Tensor", "about": "[2] float32 cpu", "text": "[1.5, 2.0]"}
    assert told["many"]["text"] == "0 to 99, mean 49.5"
    assert told["bad"]["text"].startswith("<Bad instance")
    assert told["items"]["about"] == "length 1000" and len(told["items"]["text"]) < 200
    assert told["api_token"]["text"] == "***"
    assert told["meta"]["about"] == "[3] float32 meta"
    assert "nope" not in told
    json.dumps(told)


# ---- a pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    own = Pool(RunFolder(tmp_path_factory.mktemp("pool") / "run"), 2)
    run(own, INIT)
    yield own
    own.end()


def run(pool: Pool, code: str, **more: Any) -> CellEnd:
    return pool.run(Cell(code, next(_names), **{"timeout_s": 60.0, **more}))


def test_variables_and_process_groups_stay(pool: Pool) -> None:
    run(pool, "x = torch.full((3,), r + 1.0)")
    started = time.monotonic()
    end = run(pool, "dist.all_reduce(x)", wanted=("x", "r"))
    assert time.monotonic() - started < 1.0
    assert end.states == {0: "finished", 1: "finished"}
    values = read_values(end.result)
    assert values["x"].tolist() == [3.0, 3.0, 3.0] and values["r"] == 0


def test_values_of_the_notebook_reach_every_rank(pool: Pool) -> None:
    run(pool, "y = given['a'] * (r + 1)", given={"given": {"a": torch.ones(2)}})
    shown = pool.show(["y", "nope"])
    assert [shown[rank]["y"]["text"] for rank in (0, 1)] == ["[1.0, 1.0]", "[2.0, 2.0]"]
    assert not list(pool.folder.path.rglob("given*")), "a value stays no longer than it is needed"
    with pytest.raises(DataError):
        run(pool, "pass", given={"model": torch.nn.Linear(1, 1)})
    assert pool.alive


def test_what_is_no_python_reaches_no_rank(pool: Pool) -> None:
    with pytest.raises(SyntaxError):
        run(pool, "x = = 1")
    assert pool.alive


def test_secrets_are_in_no_file(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "k-0123456789")
    code = "key = 'k-0123456789'\nassert len(key) == len(my_token) == 12, (key, my_token)"
    end = run(pool, code, given={"my_token": "t-9876543210", "plain": 1})
    assert set(end.states.values()) == {"finished"}
    files = [path for path in pool.folder.path.rglob("*") if path.is_file()]
    assert not [path for path in files if any(s in path.read_bytes() for s in (b"k-0123456789", b"t-9876543210"))]


def test_a_failing_rank_is_the_cause_and_nobody_loses_variables(pool: Pool) -> None:
    run(pool, "kept = r * 10\nif not dist.is_initialized():\n    dist.init_process_group('gloo')")
    end = run(pool, "x = torch.ones(1)\nif r == 1:\n    raise ValueError('mine')\ndist.all_reduce(x)")
    assert end.failure is not None and not end.lost and end.groups_ended
    (cause,) = end.failure.causes
    assert (cause.rank, cause.kind, cause.message) == (1, "ValueError", "mine")
    assert cause.frames[-1].line == 4 and cause.frames[-1].code == "raise ValueError('mine')"
    assert end.hang is not None and [(stack.rank, stack.collective) for stack in end.hang.ranks] == [(0, "all_reduce")]
    again = run(pool, "dist.init_process_group('gloo')\nt = torch.tensor([kept])\ndist.all_reduce(t)", wanted=("t",))
    assert read_values(again.result)["t"].tolist() == [10]


def test_process_groups_are_made_again_and_again(pool: Pool) -> None:
    for _ in range(4):  # one rank before the other: it must not find what the group before has left
        run(pool, "if dist.is_initialized():\n    dist.destroy_process_group()")
        end = run(pool, "time.sleep(0.3 * r)\ndist.init_process_group('gloo')\ndist.all_reduce(torch.ones(1))")
        assert set(end.states.values()) == {"finished"}, end.failure


def test_an_interrupt_between_two_cells_is_nobodys(pool: Pool) -> None:
    for member in pool.members:
        member.signal(signal.SIGINT)
    time.sleep(0.1)
    assert pool.alive and set(run(pool, "pass").states.values()) == {"finished"}


def test_an_interrupt_in_a_loop_keeps_the_ranks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    end = interrupted(pool, "n = 0\nwhile True:\n    n += 1", monkeypatch)
    assert set(end.states.values()) == {"interrupted"} and not end.lost and not end.groups_ended
    assert set(run(pool, "assert n > 0").states.values()) == {"finished"}


def test_an_interrupt_in_a_collective_keeps_the_ranks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "if not dist.is_initialized():\n    dist.init_process_group('gloo')\n"
    end = interrupted(pool, f"{code}dist.broadcast(torch.ones(1), 0) if r else dist.barrier()", monkeypatch)
    assert end.groups_ended and not end.lost and end.failure is None
    assert end.hang is not None and len(end.hang.ranks) == 2
    assert pool.alive


def test_a_signal_from_outside_is_no_success(pool: Pool) -> None:
    end = run(pool, "if r:\n    os.kill(os.getpid(), 2)\n    time.sleep(5)")
    assert end.states == {0: "finished", 1: "interrupted"} and end.interrupted and not end.lost
    assert pool.alive


def interrupted(pool: Pool, code: str, monkeypatch: pytest.MonkeyPatch) -> CellEnd:
    """A cell that is interrupted as the notebook's stop square does it, half a second after it began."""
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        return run(pool, code)
    finally:
        timer.join()


def test_exit_0_is_a_success(pool: Pool) -> None:
    end = run(pool, "import sys\ng = r\nsys.exit(0)", wanted=("g",))
    assert set(end.states.values()) == {"finished"} and read_values(end.result) == {"g": 0}
    end = run(pool, "sys.exit(3)")
    assert set(end.states.values()) == {"failed"} and pool.alive


def test_values_that_cannot_come_back_are_named(pool: Pool) -> None:
    end = run(pool, "q = {1, 2}", wanted=("q",))
    assert end.failure is not None and "--out q" in end.failure.causes[0].message
    assert not end.failure.causes[0].frames and pool.alive


def test_a_cell_may_take_its_output_away(pool: Pool) -> None:
    for code in ("import sys\nkept, sys.stdout = sys.stdout, None\n5", "sys.stdout = kept"):
        assert set(run(pool, code).states.values()) == {"finished"}
    assert pool.alive


def test_output_is_in_whole_lines_with_the_last_value(pool: Pool) -> None:
    file = pool.folder.life(pool.life).output_file(1)
    start = file.stat().st_size if file.exists() else 0
    run(pool, "print('a', end='')\n{'loss': 1.0}")
    run(pool, "5;")
    run(pool, "os.environ['MY_API_KEY'] = 'zebra-123456'\nprint('zeb', end='')")  # it might become the secret
    assert file.read_text()[start:] == "a\n{'loss': 1.0}\nzeb\n"


def test_a_pool_ends_with_its_dead_rank(pool: Pool) -> None:
    end = run(pool, "if r == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(600)")
    assert end.lost and end.failure is not None
    assert end.failure.headline.startswith("rank 1 was ended by SIGKILL")
    assert not pool.alive and not any(member.process.is_running() for member in pool.members)


def test_ranks_that_do_not_come_up_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError('the test has taken it away')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunFailed, match=r"they did not come up(?s:.*)the test has taken it away"):
        Pool(RunFolder(tmp_path / "run"), 1)


def test_a_pool_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom biokit.launch.warm.pool import Pool\nfrom biokit.runs import RunFolder\n"
        "pool = Pool(RunFolder(sys.argv[1]), 1)\n"
        "print(*(member.process.pid for member in pool.members), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))
