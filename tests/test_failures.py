"""Why a run failed: what ranks leave, which of it is the cause, and what torn or hostile files give."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biokit import failures
from biokit.endings import LAUNCHER, PeerError, RankError
from biokit.errors import DataError, RunError
from biokit.failures import Failure, collect_failure, is_lost_peer, read_failure, save_failure, write_error
from biokit.frames import Frame
from biokit.runs import LifeFolder, MetricsWriter, RunFolder
from biokit.stacks import DEAD, WAITS, Hang, RankStack, save_hang

GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:662"
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.life(1).create()
    return run


@pytest.fixture
def life(folder: RunFolder) -> LifeFolder:
    return folder.life(1)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it is when it has been raised."""
    try:
        raise error from cause
    except BaseException as found:
        return found


def leave(life: LifeFolder, rank: int, error: BaseException, when: float) -> None:
    """What a rank leaves that dies of an error at some time."""
    write_error(life, rank, raised(error))
    found = json.loads(life.error_file(rank).read_text())
    life.error_file(rank).write_text(json.dumps({**found, "time": when}))


def end(life: LifeFolder, ends: dict[int, tuple[int, float]], node: int = 0, code: int = 1) -> None:
    """What an agent leaves: (exit code, time) by rank."""
    ranks = {str(rank): {"exit_code": exit_code, "time": when, "pid": 1} for rank, (exit_code, when) in ends.items()}
    life.agent_file(node).write_text(json.dumps({"code": code, "ranks": ranks}))


def kinds(errors: tuple[RankError, ...]) -> list[tuple[int, str]]:
    return [(one.rank, one.kind) for one in errors]


# which is the cause


def test_the_first_by_time_is_the_cause_and_lost_peers_are_effects(folder: RunFolder, life: LifeFolder) -> None:
    leave(life, 0, RuntimeError(GLOO), 10.0)
    leave(life, 1, KeyError("later"), 12.0)
    leave(life, 2, ValueError("first"), 10.5)
    end(life, {0: (1, 11.0), 1: (1, 12.0), 2: (1, 10.6), 3: (-15, 13.0)})
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(2, "ValueError"), (1, "KeyError")]
    assert kinds(failure.effects) == [(0, "RuntimeError"), (3, "SIGTERM")]
    assert (
        failure.headline
        == f"rank 2 failed (test_failures.py line {failure.causes[0].frames[0].line}): ValueError: first"
    )
    assert failure.causes[0].exit_code == 1 and failure.logs == str(life.output_file(2))
    assert str(failure.effects[0]).startswith("rank 0 lost another rank")


def test_a_killed_rank_is_the_cause_of_lost_peers(folder: RunFolder, life: LifeFolder) -> None:
    leave(life, 0, RuntimeError(GLOO), 10.0)
    end(life, {0: (1, 11.0), 1: (-9, 10.2), 2: (-15, 11.3), 3: (-9, 13.0)})  # noticed after rank 0 told
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(1, "SIGKILL")]
    assert failure.headline == "rank 1 was ended by SIGKILL: killed from outside (out of memory?)"
    assert kinds(failure.effects) == [(0, "RuntimeError"), (2, "SIGTERM"), (3, "SIGKILL")]


def test_a_cut_link_is_told_by_the_first_that_lost_a_peer(folder: RunFolder, life: LifeFolder) -> None:
    leave(life, 0, RuntimeError(GLOO), 10.0)
    leave(life, 1, RuntimeError(GLOO), 9.0)
    end(life, {0: (1, 11.0), 1: (1, 10.0), 2: (-15, 11.3)})  # ended by the launcher
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(1, "RuntimeError")] and "Connection closed by peer" in failure.headline
    assert kinds(failure.effects) == [(0, "RuntimeError"), (2, "SIGTERM")]


def test_a_rank_that_was_killed_before_another_failed_is_the_cause(folder: RunFolder, life: LifeFolder) -> None:
    leave(life, 0, FileNotFoundError("shard"), 10.0)
    end(life, {0: (1, 10.0), 1: (-9, 9.0), 2: (-9, 11.0), 3: (-15, 0.0)})
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(1, "SIGKILL"), (0, "FileNotFoundError")]
    assert kinds(failure.effects) == [(3, "SIGTERM"), (2, "SIGKILL")]


def test_of_lost_peers_alone_one_with_an_error_before_it_is_the_cause(folder: RunFolder, life: LifeFolder) -> None:
    """A rank fails and then, cleaning up, loses its peers."""
    try:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError(GLOO)
    except RuntimeError as error:
        write_error(life, 1, error)
    leave(life, 0, RuntimeError(GLOO), 1.0)
    failure = collect_failure(folder, 1)
    (cause,) = failure.causes
    assert (cause.rank, [(link.kind, link.message) for link in cause.chain]) == (1, [("ValueError", "the cause")])


def test_exit_codes_without_an_error(folder: RunFolder, life: LifeFolder) -> None:
    end(life, {0: (3, 10.0), 1: (143, 11.0), 2: (0, 0.0), 3: (-64, 12.0)})
    end(life, {5: (-11, 9.0)}, node=1)
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(5, "SIGSEGV"), (0, "exit code 3"), (3, "SIGRTMAX")]
    assert kinds(failure.effects) == [(1, "SIGTERM")] and failure.effects[0].exit_code == -15
    assert str(failure.causes[1]) == "rank 0 failed: exit code 3: it left no exception"


def test_a_crash_in_compiled_code_has_the_stack(folder: RunFolder, life: LifeFolder, tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text("def f():\n    crash(1)\n\nf()\n")
    asked = f'Thread 0x01 (most recent call first):\n  File "{tmp_path}/cell.py", line 9 in asked_before\n'
    fatal = (
        "Fatal Python error: Segmentation fault\n\n"
        'Thread 0x02 (most recent call first):\n  File "/a.py", line 1 in g\n\n'
        f'Current thread 0x01 (most recent call first):\n  File "{tmp_path}/cell.py", line 2 in f\n'
        f'  File "{tmp_path}/cell.py", line 4 in <module>\n  File "<frozen runpy>", line 88 in _run_code\n'
    )
    life.stack_file(0).write_text(asked + fatal)
    end(life, {0: (-11, 10.0)})
    (cause,) = collect_failure(folder, 1).causes
    file = f"{tmp_path}/cell.py"
    assert cause.frames == (Frame(file, 4, "<module>", "f()"), Frame(file, 2, "f", "crash(1)"))
    assert cause.place == "cell line 2" and "crash in compiled code" in cause.message


def test_a_life_that_hung(folder: RunFolder, life: LifeFolder) -> None:
    """Then all was ended, and nothing of that is a cause; what failed before is."""
    stacks = (RankStack(0, WAITS, collective="recv"), RankStack(1, DEAD))
    save_hang(folder, Hang("the time was up", "Rank 0 waits.", 1, 100.0, stacks))
    leave(life, 0, RuntimeError(GLOO), 101.0)
    leave(life, 1, KeyError("late"), 102.0)
    failure = collect_failure(folder, 1)
    assert failure.causes == () and failure.headline == "the time was up: Rank 0 waits."
    assert len(failure.effects) == 2 and failure.hang is not None and failure.logs == str(life.output_file(1))
    leave(life, 1, KeyError("early"), 99.0)
    assert kinds(collect_failure(folder, 1).causes) == [(1, "KeyError")]
    folder.life(2).create()
    assert collect_failure(folder, 2).hang is None  # that of an earlier life


def test_torchrun_itself_failed(folder: RunFolder, life: LifeFolder) -> None:
    end(life, {}, code=0)
    end(life, {}, node=1, code=2)
    life.agent_log(1).write_text("usage: torchrun\ntorchrun: error: unrecognized arguments: --x\n\n")
    failure = collect_failure(folder, 1)
    assert failure.headline == "torchrun failed: exit code 2 on node 1: torchrun: error: unrecognized arguments: --x"
    assert failure.causes[0].rank == LAUNCHER and "unrecognized" in failure.tail
    life.agent_file(1).unlink()
    assert "no rank left an error" in collect_failure(folder, 1).headline


# what a rank leaves


def test_is_lost_peer() -> None:
    lost = RuntimeError(GLOO)
    assert is_lost_peer(lost) and is_lost_peer(RuntimeError("NCCL communicator was aborted"))
    assert is_lost_peer(RuntimeError("Application timeout caused pair closure"))  # gloo, of a later operation
    assert is_lost_peer(raised(RunError("training", "another process is gone", "Start again"), lost))
    assert is_lost_peer(PeerError("saving", "rank 1 failed", "See its error"))
    for error in (ValueError(GLOO), RuntimeError("shapes"), RunError("training", "the loss is nan", "Lower lr")):
        assert not is_lost_peer(error)
    assert not is_lost_peer(RuntimeError("[gloo/pair.cc:1] op.preamble.length <= op.nbytes. 800 vs 400"))
    circle = RuntimeError("a")
    circle.__cause__ = ValueError("b")
    circle.__cause__.__cause__ = circle
    assert not is_lost_peer(circle)


def test_an_error_is_left_whole(folder: RunFolder, life: LifeFolder) -> None:
    def fail() -> None:
        error = DataError("x.csv row 3", "it is torn", "Mend it")
        error.add_note("while reading")
        raise error from KeyError("row")

    try:
        fail()
    except DataError as error:
        write_error(life, 7, error)
    (cause,) = collect_failure(folder, 1).causes
    assert (cause.rank, cause.kind, cause.host) == (7, "DataError", socket.gethostname())
    assert cause.message == "x.csv row 3: it is torn. Mend it.\nwhile reading"
    assert [frame.function for frame in cause.frames] == ["test_an_error_is_left_whole", "fail"]
    assert cause.frames[1].code == 'raise error from KeyError("row")'
    assert [(link.relation, link.kind) for link in cause.chain] == [("the cause of the next", "KeyError")]


def test_frames_are_the_users_own(folder: RunFolder, life: LifeFolder, tmp_path: Path) -> None:
    """As a rank runs a cell: without those of what started it, in the cell's own line numbers."""
    cell = tmp_path / "cell.py"
    cell.write_text("\n\nimport json\njson.loads('{')\n")
    code = (
        "import runpy, sys; from pathlib import Path; from biokit.runs import LifeFolder; from biokit import failures\n"
        "try:\n    runpy.run_path(sys.argv[1])\n"
        "except Exception as error:\n    failures.write_error(LifeFolder(Path(sys.argv[2])), 0, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, str(cell), str(life.path)], env=environment, check=True)
    (cause,) = collect_failure(folder, 1).causes
    assert [frame.place for frame in cause.frames][1:3] == ["cell line 4", "json/__init__.py line 346"]
    assert cause.kind == "json.decoder.JSONDecodeError" and cause.place == "cell line 4"


def test_a_syntax_error_names_the_line(life: LifeFolder, folder: RunFolder) -> None:
    try:
        compile("x = 1\ny = (\n", "/run/cell.py", "exec")
    except SyntaxError as error:
        write_error(life, 0, error)
    (cause,) = collect_failure(folder, 1).causes
    assert cause.place == "cell line 2" and cause.frames[-1].code == "y = ("


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyError("no words")


def recurse(depth: int) -> None:
    if depth == 0:
        raise ExceptionGroup("several", [ValueError("one"), Unspeakable()])
    recurse(depth - 1)


def test_odd_errors_are_left_in_few_words(life: LifeFolder, folder: RunFolder) -> None:
    try:
        recurse(500)
    except ExceptionGroup as error:
        write_error(life, 0, error)
    (cause,) = collect_failure(folder, 1).causes
    assert len(cause.frames) == 4 and cause.frames[2].file == "... repeated 499 more times ..."
    assert [link.message for link in cause.chain] == ["(its message cannot be made)", "one"]
    write_error(life, 0, ValueError("x" * 10_000_000))
    assert life.error_file(0).stat().st_size < 10_000


def test_no_secret_is_left(life: LifeFolder, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    try:
        try:
            int("hf_0123456789abcdef")
        except ValueError as error:
            raise RuntimeError("x" * 3985 + " hf_0123456789abcdef") from error
    except RuntimeError as error:
        error.add_note("note hf_0123456789abcdef")
        write_error(life, 0, error)
    life.output_file(0).write_text("login with hf_0123456789abcdef\n")
    failure = collect_failure(folder, 1)
    save_failure(folder, failure)
    for file in (life.error_file(0), folder.failure_file):
        assert "hf_0123456789" not in file.read_text() and "***" in file.read_text()
    assert failure.tail == "login with ***"


def test_a_full_disk_does_not_hide_the_error(life: LifeFolder) -> None:
    life.error_file(0).parent.rmdir()
    life.error_file(0).parent.write_text("in the way")
    write_error(life, 0, ValueError("x"))


# beside the errors


def test_step_loss_and_log_tail(folder: RunFolder, life: LifeFolder) -> None:
    writer = MetricsWriter(folder)
    for step in range(1, 500):
        writer.write({"step": step, "loss": 3.0 / step})
    writer.close()
    with folder.metrics_file().open("a") as file:
        file.write('{"step": 500, "lo')  # torn
    leave(life, 1, ValueError("x"), 1.0)
    lines = [f"line {number}" for number in range(100)]
    bar = "10%|#\r\x1b[31m 20%|##\x1b[0m\r"
    trace = "[rank1]: Traceback (most recent call last):\n[rank1]:   File\n[rank1]: ValueError: x\n"
    life.output_file(1).write_text("\n".join([*lines, bar, "y" * 5000, ""]) + trace)
    failure = collect_failure(folder, 1)
    assert (failure.step, round(failure.loss, 4)) == (499, round(3.0 / 499, 4))
    tail = failure.tail.split("\n")
    assert len(tail) == 20 and tail[:2] == ["line 82", "line 83"] and tail[-2] == " 20%|##"
    assert len(tail[-1]) < 500


def test_written_and_read(folder: RunFolder, life: LifeFolder) -> None:
    assert read_failure(folder) is None
    leave(life, 0, ValueError("x"), 1.0)
    leave(life, 1, RuntimeError(GLOO), 2.0)
    save_hang(folder, Hang("why", "v", 1, 5.0, ()))
    failure = collect_failure(folder, 1)
    save_failure(folder, failure)
    found = read_failure(folder)
    assert found is not None and math.isnan(found.loss) and math.isnan(failure.loss)
    assert replace(found, loss=0.0) == replace(failure, loss=0.0)


@pytest.mark.parametrize("text", ["", "[]", "{torn", '{"a":' * 100_000, " " * (2 << 20)])
def test_a_failure_file_that_is_none(folder: RunFolder, text: str) -> None:
    folder.failure_file.write_text(text)
    with pytest.raises(RunError, match=r"failure\.json cannot be read"):
        read_failure(folder)


HOSTILE: list[Any] = [
    None, 7, "x", [], {"rank": "x" * 10_000, "time": 1e400, "kind": 3, "message": ["x"], "frames": {"a": 1}},
    {"frames": [[]] * 20_000, "chain": [{}] * 20_000, "message": "\ud800" * 20_000, "time": -1e308},
    {"exit_code": 10**400, "rank": 10**400, "time": True, "is_effect": "yes", "kind": "k" * 10_000},
]  # fmt: skip


@pytest.mark.parametrize("entry", HOSTILE)
def test_a_hostile_folder_gives_what_can_be_had(folder: RunFolder, life: LifeFolder, entry: Any) -> None:
    life.error_file(0).write_text(json.dumps(entry))
    life.rank_file(0).write_text(json.dumps(entry))
    life.agent_file(0).write_text(json.dumps({"code": entry, "ranks": {"0": entry, "x": entry, "9" * 99: entry}}))
    folder.metrics_file().write_text(json.dumps(entry) + "\n" + json.dumps({"step": entry, "loss": entry}))
    folder.hang_file.write_text(json.dumps({"life": 1, "ranks": entry}))
    failure = collect_failure(folder, 1)
    save_failure(folder, failure)
    assert isinstance(read_failure(folder), Failure)
    assert folder.failure_file.stat().st_size < 100_000
    folder.failure_file.write_text(
        json.dumps({"causes": [entry], "effects": entry, "hang": entry, "step": entry, "a": 1})
    )
    assert isinstance(read_failure(folder), Failure)


def test_files_that_would_not_end(folder: RunFolder, life: LifeFolder, tmp_path: Path) -> None:
    os.mkfifo(life.error_file(0))
    life.error_file(1).symlink_to("/dev/zero")
    life.error_file(2).write_bytes(b"[" * (2 << 20))
    life.error_file(3).mkdir()
    secret = tmp_path / "secret"
    secret.write_text("private")
    life.output_file(LAUNCHER + 1).symlink_to(secret)
    end(life, {0: (1, 1.0)})
    failure = collect_failure(folder, 1)
    assert kinds(failure.causes) == [(0, "exit code 1")] and failure.tail == ""


def test_signals_by_name() -> None:
    assert set(failures.HINTS) <= {one.name for one in signal.Signals}
