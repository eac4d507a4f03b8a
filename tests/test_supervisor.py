"""A supervisor carries out orders, ends what it started, and says truthfully how it went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from biokit.config import config_to_yaml
from biokit.errors import RunError
from biokit.failures import read_failure
from biokit.launch.orders import Order
from biokit.launch.register import list_registered
from biokit.launch.starting import start_supervisor
from biokit.launch.supervision.supervisor import Limits
from biokit.runs import RunFolder
from biokit.stacks import read_hang
from tests.drills import supervised
from tests.kernel import REPOSITORY
from tests.small_run import small_config
from tests.supervised import SHORT, Supervised, find_marked

Start = Callable[..., Supervised]
ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1); dist.all_reduce(total)
print("sum", int(total), "of rank", dist.get_rank())
dist.destroy_process_group()
"""
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# ignores SIGTERM, and has a grandchild in a session of its own that does so too
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork() and os._exit(0); os.setsid()"
child += "; time.sleep(600)"
subprocess.run([sys.executable, "-c", child])
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a script under a supervisor; whatever a test leaves is killed."""
    started: list[Supervised] = []

    def start_script(
        code: str, limits: Limits = SHORT, variables: dict[str, str] | None = None, **keys: object
    ) -> Supervised:
        script = tmp_path / "script.py"
        script.write_text(code)
        keys = {"kind": "script", "program": (str(script),), **keys}
        started.append(Supervised(tmp_path / "run", Order(**keys), limits, **(variables or {})))  # type: ignore[arg-type]
        return started[-1]

    yield start_script
    for run in started:
        run.kill()


def test_one_process_that_finishes(start: Start, tmp_path: Path) -> None:
    run = start("import os; print('RANK' in os.environ, os.environ['ADDED'])", environment={"ADDED": "yes"})
    assert run.wait() == 0
    state = run.state
    assert (state.state, state.outcome, state.code, state.life, state.pid) == (
        "ended",
        "finished",
        0,
        1,
        run.process.pid,
    )
    assert run.output() == "False yes\n"
    assert json.loads(run.folder.life(1).agent_file(0).read_text())["code"] == 0
    assert not run.folder.failure_file.exists()
    entries = list((tmp_path / "state" / "biokit" / "runs").glob("*.json"))
    assert [json.loads(entry.read_text())["path"] for entry in entries] == [str(run.folder.path)]


def test_an_exception_is_told(start: Start) -> None:
    run = start("def f():\n    return {}['key']\nf()")
    assert run.wait() == 1
    assert run.state.outcome == "failed"
    failure = read_failure(run.folder)
    assert failure is not None and failure.life == 1
    assert [(cause.kind, cause.exit_code) for cause in failure.causes] == [("KeyError", 1)]
    assert "KeyError" in run.log


def test_two_agents(start: Start) -> None:
    run = start(
        ALL_REDUCE + "import sys; sys.exit(7 * dist.is_initialized() or 3)",
        torchrun=("--nproc-per-node", "1"),
        num_nodes=2,
    )
    assert run.wait() == 1, run.log
    assert [run.output(rank) for rank in (0, 1)] == ["sum 2 of rank 0\n", "sum 2 of rank 1\n"]
    ends = [json.loads(run.folder.life(1).agent_file(node).read_text()) for node in (0, 1)]
    assert 3 in [code["exit_code"] for end in ends for code in end["ranks"].values()]


HANGS_AT_ITS_END = """
import sys
if "biokit.launch.supervision.agent" in sys.orig_argv:
    import atexit, time
    atexit.register(time.sleep, 600)
"""


@pytest.mark.parametrize(("code", "outcome"), [("pass", "finished"), ("raise SystemExit(3)", "failed")])
def test_an_agent_that_hangs_at_its_end_is_taken_at_its_word(
    start: Start, tmp_path: Path, code: str, outcome: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS_AT_ITS_END)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    run = start(
        code, torchrun=("--nproc-per-node", "2"), limits=replace(SHORT, watchdog_s=1.0), variables={"PYTHONPATH": path}
    )
    assert run.wait() == int(outcome == "failed"), run.log
    assert run.state.outcome == outcome, run.log
    assert "the agent has told its end, but is still there" in run.log or "but its agent does not end" in run.log
    assert run.left() == []


AS_SRUN = """
import sys
from biokit.launch.supervision import lives
from biokit.launch.supervision.placement import Agent

lives.place_agents = lambda *_: [Agent(0, [sys.executable, {script!r}], tells_its_end=False)]
"""
WHERE_NODE_0_IS_DONE = """
import time
from pathlib import Path
from biokit.launch.supervision.agent_file import note_end
from biokit.runs import LifeFolder

note_end(LifeFolder(Path({life!r})), 0, 0, {{}})
time.sleep(4)
Path({life!r}, "node_1_is_done").touch()
raise SystemExit({code})
"""


@pytest.mark.parametrize(("code", "outcome"), [(0, "finished"), (1, "failed")])
def test_srun_is_not_taken_at_the_word_of_the_first_node(start: Start, tmp_path: Path, code: int, outcome: str) -> None:
    """It starts the agents of all nodes; that of the first one may be done long before the others."""
    as_srun, life = tmp_path / "as_srun.py", tmp_path / "run" / "lives" / "0001"
    as_srun.write_text(WHERE_NODE_0_IS_DONE.format(life=str(life), code=code))
    (tmp_path / "sitecustomize.py").write_text(AS_SRUN.format(script=str(as_srun)))
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    run = start("pass", limits=replace(SHORT, watchdog_s=1.0), variables={"PYTHONPATH": path})
    assert run.wait() == code and run.state.outcome == outcome, run.log
    assert (life / "node_1_is_done").exists()


def test_a_failed_life_is_followed_by_the_next(start: Start) -> None:
    code = "import os, sys; sys.exit(5 if '/0001' in os.environ['BIOKIT_LIFE'] else 0)"
    run = start(code, max_lives=3, backoff_s=0.3)
    run.wait_until(lambda: run.folder.supervisor_file().exists() and run.state.state == "waiting")
    assert run.state.next_life_at > run.state.beat - 0.3 and run.state.life == 1
    assert run.wait() == 0
    assert (run.state.outcome, run.state.life) == ("finished", 2)
    failure = read_failure(run.folder)
    assert failure is not None and failure.life == 1
    assert run.folder.last_life() == 2


def test_lives_are_limited(start: Start) -> None:
    run = start("import sys; sys.exit(5)", max_lives=3, backoff_s=0.1)
    assert run.wait() == 1
    assert "life 2 follows in 0.1 s" in run.log and "life 3 follows in 0.2 s" in run.log
    assert (run.state.life, run.state.first_life, run.folder.last_life()) == (3, 1, 3)


def test_a_users_mistake_is_not_repeated(start: Start) -> None:
    run = start("from biokit.errors import ConfigError\nraise ConfigError('a', 'b', 'c')", max_lives=3)
    assert run.wait() == 1
    assert run.folder.last_life() == 1 and "would fail the same way" in run.log


def test_stop_between_two_lives(start: Start) -> None:
    run = start("import sys; sys.exit(5)", max_lives=2, backoff_s=60.0)
    run.wait_until(lambda: run.folder.supervisor_file().exists() and run.state.state == "waiting")
    run.folder.request_stop()
    assert run.wait(10) == 0
    assert (run.state.outcome, run.folder.last_life()) == ("stopped", 1)
    assert not run.folder.stop_requested()


@pytest.mark.parametrize(
    ("number", "outcome", "code"),
    [(None, "stopped", 0), (signal.SIGTERM, "stopped", 0), (signal.SIGINT, "interrupted", 130)],
)
def test_a_script_is_ended(start: Start, number: int | None, outcome: str, code: int) -> None:
    run = start(SLEEP)
    run.wait_until(lambda: "up" in run.output())
    if number is None:
        run.folder.request_stop()
    else:
        run.process.send_signal(number)
    assert run.wait(10) == code
    assert (run.state.outcome, run.left()) == (outcome, [])


def test_the_time_limit(start: Start) -> None:
    run = start("def wait_here():\n    import time; time.sleep(600)\nwait_here()", timeout_s=1.5, max_lives=2)
    assert run.wait(20) == 124
    assert (run.state.outcome, run.folder.last_life(), run.left()) == ("timed out", 1, [])
    hang = read_hang(run.folder)
    assert hang is not None and hang.ranks[0].frames[0].function == "wait_here"


def test_everything_goes_when_the_owner_is_killed(tmp_path: Path) -> None:
    """Also a rank that ignores SIGTERM, and its grandchild in a session of its own."""
    script = tmp_path / "script.py"
    script.write_text(STUBBORN)
    owner_code = (
        "import sys, threading, time\nfrom pathlib import Path\n"
        "from biokit.launch.orders import Order\nfrom biokit.launch.starting import start_supervisor\n"
        "from biokit.runs import RunFolder\n"
        f"order = Order('script', ({str(script)!r},))\n"
        f"thread = threading.Thread(target=lambda: start_supervisor(RunFolder({str(tmp_path / 'run')!r}), order))\n"
        "thread.start(); thread.join()\n"  # a thread that ends: that alone must not end the run
        "time.sleep(600)\n"
    )
    mark = f"BIOKIT_TEST_TREE={tmp_path}"
    environment = {**os.environ, "BIOKIT_TEST_TREE": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    folder = RunFolder(tmp_path / "run")
    output = folder.life(1).output_file(0)
    with subprocess.Popen([sys.executable, "-c", owner_code], env=environment) as owner:
        end = time.monotonic() + 20
        while not (output.exists() and "up" in output.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(find_marked(mark)) == 4  # owner, supervisor, rank, grandchild
        owner.kill()
    end = time.monotonic() + 10
    while left := find_marked(mark):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    assert json.loads(folder.supervisor_file().read_text())["outcome"] == "interrupted"


def test_a_stopped_rank_ends_the_life(start: Start) -> None:
    code = "import os, time\nif '/0001' in os.environ['BIOKIT_LIFE']:\n    print('up', flush=True); time.sleep(600)"
    limits = replace(SHORT, watchdog_s=2.0)
    run = start(code, limits, torchrun=("--nproc-per-node", "2"), max_lives=2, backoff_s=0.1)
    run.wait_until(lambda: "up" in run.output(0) and "up" in run.output(1))
    pid = json.loads(run.folder.life(1).rank_file(1).read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert run.wait(30) == 0
    assert "rank 1 is stopped" in run.log and run.folder.last_life() == 2
    assert run.left() == []
    hang = read_hang(run.folder)
    assert hang is not None and [stack.state for stack in hang.ranks] == ["elsewhere", "stopped"]


@pytest.mark.parametrize(("number", "in_terminal"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_signals_let_a_training_save(tmp_path: Path, number: signal.Signals, in_terminal: bool) -> None:
    config = small_config(tmp_path, train_iters=100_000)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    order = Order("train", ("-m", "biokit", "train", str(path)), max_lives=3)
    run = Supervised(Path(config.run_dir), order, in_terminal=in_terminal)
    run.wait_until(lambda: len(run.folder.read_metrics()) > 3)
    run.process.send_signal(number)
    assert run.wait(30) == 0
    manifest = run.folder.read_manifest()
    assert (manifest["status"], run.state.outcome, run.folder.last_life()) == ("stopped", "stopped", 1)
    assert run.folder.checkpoint_steps() == [manifest["step"]]
    assert not run.folder.stop_requested() and run.left() == []


def test_a_training_that_loses_a_rank_goes_on() -> None:
    outcome = supervised.lose_a_rank(1, 0, signal.SIGKILL, 2)
    assert outcome.failed == 0, outcome.row


@pytest.mark.full
def test_a_training_on_four_ranks_goes_on() -> None:
    """One of them is stopped: the watchdog kills it, and the run goes on as after a rank that was killed."""
    outcome = supervised.lose_a_rank(1, 1, signal.SIGSTOP, 4)
    assert outcome.failed == 0, outcome.row


@pytest.mark.full
def test_a_hang_is_told_before_its_ranks_are_ended(start: Start) -> None:
    """The process group's own time-out notices it: the other rank still stands where it hangs."""
    code = (
        "import datetime, time, torch, torch.distributed as dist\n"
        "def linger():\n    time.sleep(600)\n"
        "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=4))\n"
        "linger() if dist.get_rank() else dist.all_reduce(torch.ones(1))\n"
    )
    run = start(code, torchrun=("--nproc-per-node", "2"))
    assert run.wait() == 1
    failure = read_failure(run.folder)
    assert failure is not None and failure.hang is not None and failure.hang.life == 1
    assert failure.hang.reason == "rank 0 waited in vain for the others (script.py line 5)"
    assert failure.hang.ranks[1].frames[0].function == "linger"


def test_a_folder_has_one_supervisor(start: Start, tmp_path: Path) -> None:
    run = start(SLEEP)
    run.wait_until(lambda: run.folder.supervisor_file().exists())
    with pytest.raises(RunError, match="under another supervisor"):
        start_supervisor(run.folder, Order("script", ("x.py",)))
    again = Supervised(tmp_path / "run", Order("script", ("x.py",)))
    assert again.wait() == 1 and "another supervisor is at work" in again.log
    assert run.process.poll() is None


def test_it_starts_light() -> None:
    heavy = "('torch', 'numpy', 'rdkit', 'matplotlib')"
    code = f"import sys, biokit.launch.supervision.supervisor; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_runs_that_are_gone_leave_the_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from biokit.launch.register import register_run

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert list_registered() == []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        register_run(RunFolder(tmp_path / name))
        register_run(RunFolder(tmp_path / name))
    assert sorted(list_registered()) == [tmp_path / "one", tmp_path / "two"]
    (tmp_path / "one").rmdir()
    assert list_registered() == [tmp_path / "two"]
    assert len(list((tmp_path / "state").rglob("*.json"))) == 1


def test_a_second_ctrl_c_ends_a_training_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    run = Supervised(tmp_path / "run", Order("train", (str(script),)), in_terminal=True)
    run.wait_until(lambda: "up" in run.output())
    run.process.send_signal(signal.SIGINT)
    run.wait_until(run.folder.stop_requested, 5)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(10) == 130
    assert (run.state.outcome, run.left()) == ("interrupted", [])


def test_a_training_under_torchrun_has_time_to_save(tmp_path: Path) -> None:
    """Of `%torchrun -m biokit train`: other programs have `grace_s`, which is none here."""
    config = small_config(tmp_path, train_iters=100_000)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    order = Order("script", ("-m", "biokit", "train", str(path)))
    run = Supervised(tmp_path / "torchrun", order, replace(SHORT, grace_s=0.0))
    training = RunFolder(config.run_dir)
    run.wait_until(lambda: len(training.read_metrics()) > 3)
    run.process.terminate()
    assert run.wait(30) == 0 and run.state.outcome == "stopped"
    assert training.read_manifest()["status"] == "stopped" and training.checkpoint_steps()
