"""Runs as objects: what they give, how they end, what they are started with."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from biokit.config import load_config
from biokit.errors import RunError
from biokit.failures import Failure, RankError, save_failure
from biokit.launch import started
from biokit.launch.orders import SLURM, Order, write_order
from biokit.launch.run import Run, RunFailed, start_run, start_training
from biokit.runs import MetricsWriter, RunFolder
from biokit.view.training import follow
from tests.run_folders import interrupt_soon, is_gone, say, wait_until

REPOSITORY = Path(__file__).parents[1]
CELL = Order("cell", ("cell.py",))
STAND_IN = '''
"""A supervisor's stand-in: says where it stands and ends when asked; words: run folder, how it behaves."""
import os, signal, subprocess, sys, time
from biokit.launch.states import SupervisorState, write_state
from biokit.runs import RunFolder

folder, behaviour = RunFolder(sys.argv[1]), sys.argv[2]
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: asked.append(number))
state = SupervisorState.of_this_process(1)
state.state, state.life = "running", folder.last_life() + 1
folder.life(state.life).create()
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder.path / "worker.pid").write_text(str(worker.pid))
write_state(folder, state)
outcome = ""
while not outcome and behaviour != "says nothing":
    time.sleep(0.02)
    if behaviour == "ends":
        outcome = "finished"
    elif behaviour == "fails":
        outcome = "failed"
    elif behaviour != "deaf" and signal.SIGTERM in asked:
        outcome = "stopped"
    elif behaviour != "deaf" and signal.SIGINT in asked:
        outcome = "interrupted"
    elif behaviour == "obedient" and folder.stop_requested():
        outcome = "stopped"
worker.kill()
worker.wait()
if outcome:
    state.state, state.outcome, state.ended = "ended", outcome, time.time()
    write_state(folder, state)
'''
Start = Callable[..., Run]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def start(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a run whose supervisor is the stand-in; what a test leaves running is killed."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    processes: list[subprocess.Popen[bytes]] = []
    behaviours: list[str] = []

    def start_stand_in(where: RunFolder, order: Order, *, detach: bool, variables: Any) -> subprocess.Popen[bytes]:
        where.clear_stop()
        where.supervisor_file().unlink(missing_ok=True)
        write_order(where, order)
        processes.append(subprocess.Popen([sys.executable, tmp_path / "stand_in.py", where.path, behaviours[-1]]))
        return processes[-1]

    def start_behaving(behaviour: str = "obedient", order: Order = CELL, *, detach: bool = False) -> Run:
        behaviours.append(behaviour)
        run = start_run(folder, order, detach)
        wait_until(lambda: run.status != "starting")
        return run

    monkeypatch.setattr(started, "start_supervisor", start_stand_in)
    yield start_behaving
    for process in processes:
        process.kill()
        process.wait()
    if (folder.path / "worker.pid").exists() and psutil.pid_exists(worker_of(folder)):
        psutil.Process(worker_of(folder)).kill()


def worker_of(folder: RunFolder) -> int:
    return int((folder.path / "worker.pid").read_text())


# what it gives


def test_folders_without_a_run_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it holds no run"):
        Run.attach(folder)
    with pytest.raises(RunError, match="there is no such folder"):
        Run.attach(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="it is a file"):
        Run.attach(tmp_path / "file")
    for name in ("r" * 5000, "a\0b"):
        with pytest.raises(RunError, match="there can be none") as caught:
            Run.attach(name)
        assert len(str(caught.value)) < 400


def test_logs_of_a_rank(folder: RunFolder) -> None:
    write_order(folder, CELL)
    run = Run.attach(folder)
    assert run.logs() == "" and run.life == 0
    for life, text in ((1, "old\n"), (2, "one\ntwo\nthree\n")):
        folder.life(life).create()
        folder.life(life).output_file(1).write_text(text)
    assert run.life == 2
    assert (run.logs(1), run.logs(1, 2), run.logs(1, 0), run.logs(1, life=1)) == (
        "one\ntwo\nthree",
        "two\nthree",
        "",
        "old",
    )
    assert run.logs(0) == ""  # it may still begin
    say(folder, state="ended", outcome="finished", code=0)
    with pytest.raises(RunError, match=r"logs of rank 0: it has printed nothing\. Ranks that have: 1"):
        run.logs(0)


def test_the_result_is_what_was_given_back(folder: RunFolder) -> None:
    write_order(folder, CELL)
    say(folder)
    run = Run.attach(folder)
    with pytest.raises(RunError, match=r"the run is running\. Wait for it"):
        _ = run.result
    say(folder, state="ended", outcome="finished")
    assert run.result == {}
    from biokit.launch.values import write_values

    write_values(folder.result_file, {"x": [1, 2]})
    assert run.result == {"x": [1, 2]}
    write_order(folder, Order("train", ("x.py",)))
    folder.write_manifest({"status": "finished", "step": 7})
    assert run.result["step"] == 7


def test_the_card_and_the_picture(folder: RunFolder) -> None:
    write_order(
        folder, Order("train", ("x.py",), facts={"line": "python x.py", "git": {"commit": "c0ffee", "dirty": True}})
    )
    say(folder, state="ended", outcome="finished")
    folder.write_manifest({"status": "finished", "step": 2, "train_iters": 2})
    writer = MetricsWriter(folder)
    for step in (1, 2):
        writer.write({"step": step, "loss": 2.0 / step, "lr": 1e-3, "tokens_per_s": 100.0})
    writer.close()
    run = Run.attach(folder)
    assert [line["loss"] for line in run.metrics()] == [2.0, 1.0]
    bundle = run._repr_mimebundle_()
    for shown in bundle["text/html"], bundle["text/plain"]:
        assert all(word in shown for word in ("python x.py", "c0ffee"))
    assert "FINISHED" in bundle["text/plain"] and bundle["text/html"].startswith("<div")
    assert run.plot().alt.startswith("Training curve: steps 1 to 2")
    assert repr(run) == f"Run({folder.path}: finished: step 2 of 2, loss 1.0000)"


# how it ends


def fail(folder: RunFolder) -> None:
    cause = RankError(1, 5.0, "here", "ValueError", "the third step is cursed", exit_code=1)
    folder.life(1).create()
    save_failure(folder, Failure("rank 1 failed", (cause,), (), 1, step=2, loss=3.5, tail="step 2", logs="lives/0001"))


def test_a_failed_run_raises_its_card(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_order(folder, CELL)
    say(folder, state="ended", outcome="failed")
    fail(folder)
    run = Run.attach(folder)
    for ask in (run.wait, lambda: run.result, run.raise_on_failure, lambda: follow(run)):
        with pytest.raises(
            RunFailed, match=r"(?s)FAILED: rank 1 failed.*ValueError.*the third step is cursed"
        ) as caught:
            ask()
    assert run.failure == caught.value.failure and run.hang is None
    assert pickle.loads(pickle.dumps(caught.value)).failure == run.failure
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert caught.value._render_traceback_() == ["RunFailed: FAILED: rank 1 failed"]
    assert "the third step is cursed" in shown[0].html and "the third step is cursed" in shown[0].text


def test_ipython_shows_the_card_in_place_of_the_traceback(folder: RunFolder) -> None:
    write_order(folder, CELL)
    say(folder, state="ended", outcome="failed")
    fail(folder)
    code = f"from biokit.launch.run import Run; Run.attach({str(folder.path)!r}).wait(show=False)"
    done = subprocess.run([sys.executable, "-m", "IPython", "-c", code], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "RunFailed: FAILED: rank 1 failed" in said
    assert said.count("the third step is cursed") == 1 and "raise_on_failure" not in said


def test_the_failure_of_an_earlier_life_is_not_the_cause(folder: RunFolder) -> None:
    write_order(folder, CELL)
    say(folder, state="ended", outcome="interrupted", life=2)
    fail(folder)
    folder.life(2).create()
    with pytest.raises(RunFailed, match="interrupted") as caught:
        Run.attach(folder).raise_on_failure()
    assert "cursed" not in str(caught.value) and caught.value.failure is None


def test_a_run_that_nobody_explains_shows_the_end_of_a_log(folder: RunFolder) -> None:
    write_order(folder, CELL)
    say(folder, pid=1999999999)
    (folder.logs / "supervisor.log").write_text("12:00:00 no space left on device\n")
    with pytest.raises(RunFailed, match=r"(?s)lost\n.*no space left on device.*Mend the cause"):
        Run.attach(folder).raise_on_failure()
    folder.launch_file.unlink()
    folder.supervisor_file().unlink()
    folder.write_manifest({"status": "failed", "error": "molecules.csv is gone"})
    with pytest.raises(RunFailed, match=r"molecules\.csv is gone"):
        Run.attach(folder).raise_on_failure()


def test_wait_gives_up_in_time(folder: RunFolder) -> None:
    say(folder)
    write_order(folder, CELL)
    with pytest.raises(RunError, match=r"still runs after 0\.2 s"):
        Run.attach(folder).wait(0.2)


def test_wait_says_where_it_is_and_returns_the_run(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    threading.Timer(0.3, run.folder.request_stop).start()
    began = time.monotonic()
    assert run.wait() is run
    assert time.monotonic() - began < 1.4  # it does not sleep through the end
    assert capsys.readouterr().out.split() == ["running", "stopped"]
    run.wait(show=False)
    assert capsys.readouterr().out == ""


def test_stop_kills_what_does_not_listen(start: Start) -> None:
    run = start("deaf")
    worker = worker_of(run.folder)
    assert run.stop(0.3) == "interrupted"
    assert is_gone(worker) and run.ended and not run.owned
    assert run.stop() == "interrupted"


def test_sigterm_ends_where_stop_files_are_not_read(start: Start) -> None:
    assert start("by signal").stop(0.5) == "stopped"


def test_a_run_on_another_host_that_does_not_stop_is_said(folder: RunFolder) -> None:
    write_order(folder, CELL)
    say(folder, host="elsewhere")
    with pytest.raises(RunError, match=r"still runs after 0\.1 s, .* end it on elsewhere"):
        Run.attach(folder).stop(0.1)
    assert folder.stop_requested()


def test_letting_go_of_the_object_ends_nothing(start: Start) -> None:
    run = start()
    folder, worker = run.folder, worker_of(run.folder)
    del run
    gc.collect()
    again = Run.attach(folder.path)
    assert again.alive and again.owned and not is_gone(worker)
    assert again.stop(10) == "stopped"


def test_an_interrupt_ends_a_cell_at_once(start: Start) -> None:
    run = start()
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.status == "interrupted" and not run.folder.stop_requested()


def test_a_second_interrupt_ends_a_training_at_once(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start("by signal", Order("train", ("x.py",)))
    interrupt_soon()
    interrupt_soon(0.8)
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.status == "interrupted"
    assert "interrupted: the run saves a checkpoint and ends" in capsys.readouterr().out


@pytest.mark.parametrize("detach", [False, True])
def test_an_interrupt_only_leaves_what_belongs_to_nobody_here(
    start: Start, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(detach=detach)
    if not detach:
        monkeypatch.setattr(started, "_started", {})  # as in another process
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert run.status == "running" and not run.owned
    assert run.stop(10) == "stopped"


# starting


def test_a_second_run_in_the_same_folder_is_refused(start: Start) -> None:
    run = start()
    with pytest.raises(RunError, match=r"another run is alive in it\. Stop it, or give another run_dir"):
        start()
    with pytest.raises(RunError, match="another run is alive in it"):
        start_training(load_config("molbart_mini", [f"run_dir={run.folder.path}", "train.device=cpu"]))
    assert not (run.folder.logs / "config_asked.yaml").exists()
    run.stop(10)
    with run.folder.lock(), pytest.raises(RunError, match="another run is alive in it"):
        start()


def test_a_new_start_forgets_the_end_of_the_last_run(start: Start) -> None:
    run = start("fails")
    wait_until(lambda: run.ended)
    fail(run.folder)
    for file in (run.folder.hang_file, run.folder.result_file, run.folder.stop_file):
        file.touch()
    run = start("ends")
    assert run.wait().status == "finished" and run.life == 2
    assert run.failure is None and not run.folder.result_file.exists() and not run.folder.hang_file.exists()


def test_a_supervisor_that_died_without_a_word_is_not_awaited(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_nothing(where: RunFolder, order: Order, **_: Any) -> subprocess.Popen[bytes]:
        write_order(where, order)
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])

    monkeypatch.setattr(started, "start_supervisor", start_nothing)
    run = start_run(folder, CELL)
    wait_until(lambda: run.ended)
    assert run.status == "lost"


def test_a_slurm_order_is_not_started_here(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="biokit submit"):
        start_run(folder, Order("train", ("x.py",), placement=SLURM))


def test_runs_end_with_the_process_that_started_them(tmp_path: Path, folder: RunFolder, start: Start) -> None:
    """Normal end of Python: owned ones are asked to end and waited for; detached ones go on."""
    code = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from biokit.launch import started\n"
        "from biokit.launch.orders import Order, write_order\n"
        "from biokit.launch.run import start_run\n"
        "from biokit.runs import RunFolder\n"
        "def start(folder, order, *, detach, variables):\n"
        "    write_order(folder, order)\n"
        f"    return subprocess.Popen([sys.executable, {str(tmp_path / 'stand_in.py')!r}, folder.path, 'obedient'])\n"
        "started.start_supervisor = start\n"
        "for name in ('owned', 'detached'):\n"
        f"    folder = RunFolder(Path({str(tmp_path)!r}) / name); folder.create()\n"
        "    run = start_run(folder, Order('cell', ('x.py',)), detach=name == 'detached')\n"
        "    while run.status == 'starting': time.sleep(0.02)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore::ResourceWarning", "-c", code], check=True, timeout=60)
    owned, detached = Run.attach(tmp_path / "owned"), Run.attach(tmp_path / "detached")
    assert (owned.status, detached.status) == ("stopped", "running")
    assert is_gone(worker_of(owned.folder))
    assert detached.stop(10) == "stopped"


def test_looking_at_runs_costs_no_torch() -> None:
    code = (
        "import sys, biokit.launch.run, biokit.launch.listing, biokit.launch.again, biokit.launch.commands.runs;"
        "sys.exit(bool({'torch', 'matplotlib', 'IPython', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
