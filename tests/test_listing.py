"""`biokit runs`: what it lists, shows, compares, stops and starts again, on folders."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biokit.config import config_hash, config_to_yaml, load_config
from biokit.errors import ConfigError, RunError
from biokit.launch import again
from biokit.launch.commands.runs import add_parser
from biokit.launch.facts import asked_file
from biokit.launch.listing import diff_runs, find_run, find_runs, list_runs
from biokit.launch.orders import SLURM, Order, write_order
from biokit.launch.register import list_registered, register_run
from biokit.launch.run import Run
from biokit.launch.slurm import job_status, jobs
from biokit.launch.slurm.jobs import Job, write_job
from biokit.launch.states import SupervisorState, write_state
from biokit.launch.status import read_status
from biokit.runs import MetricsWriter, RunFolder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without runs, in an empty folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def make_run(
    path: Path, keys: Sequence[str] = (), *, losses: Sequence[float] = (4.0, 2.0), started: float = 1000.0, **facts: Any
) -> RunFolder:
    """A finished training, as its processes and its supervisor leave it."""
    folder = RunFolder(path)
    folder.create()
    config = load_config("molbart_mini", [f"run_dir={path}", *keys])
    folder.write_config(config_to_yaml(config))
    asked_file(folder).write_text(config_to_yaml(config))
    about = {"git": {"commit": "aaaa", "dirty": False}, "versions": {"torch": "2.13"}, "cwd": str(Path.cwd()), **facts}
    about |= {"line": "python -m biokit train x.yaml", "config_hash": config_hash(config)}
    write_order(folder, Order("train", ("-m", "biokit", "train", str(asked_file(folder))), facts=about))
    state = SupervisorState.of_this_process(1)
    state.state, state.outcome, state.life, state.started = "ended", "finished", 1, started
    write_state(folder, state)
    layout = {"strategy": "Single", "world_size": 1, "tensor": 1, "data": 1, "pipeline": 1}
    folder.write_manifest({"status": "finished", "step": 2, "train_iters": 2, "data_hash": "dddd", "layout": layout})
    writer = MetricsWriter(folder)
    for step, loss in enumerate(losses, start=1):
        writer.write({"step": step, "loss": loss})
    writer.close()
    return folder


def biokit(*words: str) -> int:
    """The command line, of `runs` alone."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["runs", *words])
    status: int = options.run(options)
    return status


# list


def test_the_list_has_what_is_registered_and_what_lies_below_runs(home: Path, tmp_path: Path) -> None:
    here, away = make_run(home / "runs" / "a" / "one"), make_run(tmp_path / "away", started=2000.0)
    register_run(away)
    register_run(here)
    assert find_runs() == [away.path, Path("runs/a/one")]  # once each
    table = list_runs()
    assert [row[0] for row in table.rows] == ["runs/a/one", str(away.path)]
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(1000))
    assert table.rows[0][1:5] == ("finished", "2/2", "2.0000", started)
    assert repr(table).splitlines()[0].split() == ["run", "status", "step", "loss", "started", "where"]
    assert find_runs([home / "runs"]) == [home / "runs" / "a" / "one"]
    shutil.rmtree(away.path)
    assert find_runs() == [Path("runs/a/one")]
    with pytest.raises(RunError, match="there is no such folder"):
        find_runs([home / "nowhere"])


def test_only_runs_are_listed_and_broken_ones_say_so(home: Path) -> None:
    run = make_run(home / "runs" / "one")
    for store in (run.path / "data", home / "runs" / "store"):
        store.mkdir()
        (store / "manifest.json").write_text('{"sha256": "x"}')
    inside = make_run(run.path / "two")  # a notebook's runs lie inside its own
    make_run(run.path / "checkpoints" / "three")  # nobody looks there
    broken = make_run(home / "runs" / "broken")
    broken.config_file.write_text("{")
    broken.manifest_file.write_text('{"status": "finished", "versions"')
    rows = {row[0]: row for row in list_runs().rows}
    assert set(rows) == {"runs/one", "runs/one/two", "runs/broken"} and inside.path.name == "two"
    assert rows["runs/broken"][1] == "unreadable"


def test_a_run_is_found_by_the_end_of_its_path(home: Path) -> None:
    for name in ("a/one", "b/one", "b/two"):
        make_run(home / "runs" / name)
    assert find_run("two").folder.path == Path("runs/b/two")
    assert find_run("b/one").folder.path == find_run("runs/b/one").folder.path == Path("runs/b/one")
    with pytest.raises(RunError, match="several bear the name: runs/a/one, runs/b/one"):
        find_run("one")
    with pytest.raises(RunError, match="there is no such run"):
        find_run("three")


def test_the_commands_print(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert biokit("list") == 0 and capsys.readouterr().out == "no runs\n"
    make_run(home / "runs" / "one")
    make_run(home / "runs" / "two")
    assert biokit("list") == 0 and "runs/one" in capsys.readouterr().out
    assert biokit("show", "one") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("python -m biokit train x.yaml", "aaaa", "dddd"))
    assert biokit("stop", "one") == 0 and capsys.readouterr().out == "it had ended already: finished\n"
    assert biokit("diff", "one", "two") == 0 and capsys.readouterr().out == "nothing differs\n"


# diff


def test_what_differs_is_shown_and_nothing_else(home: Path) -> None:
    first = make_run(home / "a")
    keys = ["train.lr=0.5", "strategy=DDP"]
    git = {"commit": "bbbb", "dirty": True, "changes": "c0ffee"}
    second = make_run(home / "b", keys, losses=(4.0, 1.5), git=git, versions={"torch": "2.14"})
    second.update_manifest(data_hash="eeee", layout={"strategy": "DDP", "world_size": 2})
    rows = {name: (a, b) for name, a, b in diff_runs("a", "b").rows}
    assert rows.pop("config hash")
    assert rows == {
        "strategy": ("Single", "DDP"),
        "train.lr": ("0.002", "0.5"),
        "data hash": ("dddd", "eeee"),
        "layout strategy": ("Single", "DDP"),
        "layout world_size": ("1", "2"),
        "layout tensor": ("1", "-"),
        "layout data": ("1", "-"),
        "layout pipeline": ("1", "-"),
        "git commit": ("aaaa", "bbbb"),
        "git dirty": ("False", "True"),
        "git changes": ("-", "c0ffee"),
        "versions torch": ("2.13", "2.14"),
        "final loss": ("2", "1.5"),
    }
    assert repr(diff_runs(Run(first), Run(second))).splitlines()[0].split() == ["what", "differs", "a", "b"]


def test_runs_that_are_no_trainings_differ_in_their_lines(home: Path) -> None:
    for name in ("a", "b"):
        RunFolder(home / name).create()
        write_order(RunFolder(home / name), Order("script", ("x.py",), facts={"line": f"python x.py {name}"}))
    assert diff_runs("a", "b").rows == [("line", "python x.py a", "python x.py b")]


# again


Started = list[tuple[RunFolder, Order, bool, Path]]  # and where it would begin


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would be started."""
    found: Started = []

    def start(folder: RunFolder, order: Order, detach: bool) -> Run:
        found.append((folder, order, detach, Path.cwd()))
        return Run(folder)

    monkeypatch.setattr(again, "start_run", start)
    return found


def test_a_training_is_started_again_with_its_own_configuration(
    home: Path, seen: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = {"strategy": "DDP", "world_size": 2}
    keys = ["train.micro_batch_size=4", "strategy=DDP", "data.dataset_path=mine.csv"]
    old = make_run(home / "one", keys, layout=layout)
    monkeypatch.chdir(tmp_path)  # paths of the configuration are relative to where it was started
    again.start_again(Run(old), overrides=["train.lr=0.5"])
    again.start_again(Run(old), "new", detach=True)
    folder, order, detach, where = seen[0]
    assert (folder.path, detach, where) == (home / "one_2", False, home)
    assert order.program == ("-m", "biokit", "train", str(asked_file(folder)))
    config = load_config(order.program[-1])
    assert (config.train.lr, config.data.dataset_path, config.run_dir) == (0.5, "mine.csv", str(folder.path))
    assert order.facts["layout"]["world_size"] == 2 and order.facts["config_hash"] == config_hash(config)
    assert "git" not in order.facts
    assert (seen[1][0].path, seen[1][2]) == (tmp_path / "new", True)
    assert again.start_again(Run(old)).folder.path == home / "one_3"
    with pytest.raises(ConfigError, match="does not divide"):
        again.start_again(Run(old), overrides=["strategy=ThreeD", "parallel.tensor_model_parallel_size=3"])


@pytest.mark.parametrize(
    "words",
    [
        ["--run-dir", "new", "one", "train.lr=0.5", "--detach"],
        ["one", "--detach", "--run-dir=new", "train.lr=0.5"],
        ["--detach", "one", "train.lr=0.5", "--run-dir", "new"],
    ],
)
def test_options_may_stand_anywhere(home: Path, seen: Started, words: list[str]) -> None:
    make_run(home / "one")
    assert biokit("again", *words) == 0
    ((folder, order, detach, _),) = seen
    assert (folder.path, load_config(order.program[-1]).train.lr, detach) == (home / "new", 0.5, True)


def test_an_order_from_the_command_line_is_started_again(home: Path, seen: Started) -> None:
    old = make_run(home / "one")
    words = ("-m", "biokit", "train", "molbart_mini", "--lr", "0.25", "run_dir=one")
    write_order(old, Order("train", words, timeout_s=7.0, max_lives=3))
    again.start_again(Run(old))
    folder, order, *_ = seen[0]
    assert load_config(order.program[-1]).train.lr == 0.25
    assert (order.timeout_s, order.max_lives, folder.path) == (7.0, 3, home / "one_2")


def test_what_cannot_be_started_again_is_refused(home: Path, seen: Started) -> None:
    old = make_run(home / "one")
    script = Order("script", ("x.py", "--api-key", "k"), facts={"cwd": str(home)})
    for order, overrides, message in (
        (replace(script, program=("x.py", "--api-key", "***")), [], "held a secret, of which only \\*\\*\\* was kept"),
        (replace(script, environment={"HF_TOKEN": "***"}), [], "held a secret"),
        (replace(script, placement=SLURM), [], "placed by 'slurm'. Submit it"),
        (replace(script, kind="ranks"), [], "of the kind 'ranks'"),
        (script, ["train.lr=1"], "train.lr=1: it is no training of biokit"),
        (replace(script, facts={"cwd": str(home / "gone")}), [], "in which it was started, is gone"),
    ):
        write_order(old, order)
        with pytest.raises(RunError, match=message):
            again.start_again(Run(old), overrides=overrides)
    write_order(old, script)
    with pytest.raises(RunError, match="is not empty"):
        again.start_again(Run(old), old.path)
    old.launch_file.unlink()
    with pytest.raises(RunError, match=r"launch\.json cannot be read"):
        again.start_again(Run(old))
    assert seen == []


# Slurm


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Slurm says of its jobs."""
    states: dict[str, str] = {}
    monkeypatch.setattr(jobs, "job_state", lambda job_id: states.get(job_id, jobs.UNKNOWN))
    monkeypatch.setattr(jobs, "cancel", lambda job_id: states.update({job_id: "CANCELLED"}))
    monkeypatch.setattr(job_status, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(job_status.shutil, "which", lambda name: f"/usr/bin/{name}")
    return states


def test_a_job_is_queued_begins_and_ends(home: Path, queue: dict[str, str]) -> None:
    folder = RunFolder(home / "one")
    folder.create()
    write_order(folder, Order("train", ("x.py",), placement=SLURM))
    job = Job(jobs.TRAIN, "one", job_id="12", submitted=time.time() - 100)
    write_job(folder, job)
    for said, status in (
        ("PENDING", "queued"),
        ("RUNNING", "starting"),
        ("CANCELLED", "stopped"),
        ("TIMEOUT", "timed out"),
        ("NODE_FAIL", "failed"),
        (jobs.UNKNOWN, "lost"),
    ):
        queue["12"] = said
        assert Run.attach(folder).status == status, said
    state = SupervisorState.of_this_process(1)
    state.state = "running"
    write_state(folder, state)
    assert read_status(folder) == "running"  # the folder knows, and Slurm is not asked
    state.state, state.outcome = "ended", "stopped"
    write_state(folder, state)
    queue["12"] = "RUNNING"
    assert read_status(folder) == "stopped"  # the job is about to end
    write_job(folder, replace(job, outcome="requeued"))
    assert read_status(folder) == "starting"
    queue["12"] = "PENDING"
    assert read_status(folder) == "queued"
    write_job(folder, replace(job, outcome="stopped"))
    assert read_status(folder) == "stopped"
    assert list_runs([home]).rows[0][-1] == "Slurm job 12"


def test_a_queued_job_is_cancelled_and_stays_so(home: Path, queue: dict[str, str]) -> None:
    folder = RunFolder(home / "one")
    folder.create()
    write_order(folder, Order("train", ("x.py",), placement=SLURM))
    write_job(folder, Job(jobs.TRAIN, "one", job_id="12", submitted=time.time()))
    queue["12"] = "PENDING"
    assert Run.attach(folder).stop() == "stopped" and queue["12"] == "CANCELLED"
    assert json.loads((folder.path / jobs.JOB_FILE).read_text())["outcome"] == "stopped"


def test_a_job_that_does_not_stop_is_cancelled(home: Path, queue: dict[str, str]) -> None:
    folder = RunFolder(home / "one")
    folder.create()
    write_job(folder, Job(jobs.NOTEBOOK, "one", job_id="13"))
    queue["13"] = "RUNNING"
    run = Run.attach(folder)
    assert run.status == "running"
    assert run.stop(0.1) == "stopped"
    assert queue["13"] == "CANCELLED" and folder.stop_requested()


def test_an_array_is_not_a_run(home: Path) -> None:
    RunFolder(home / "sweep").create()
    write_job(RunFolder(home / "sweep"), Job(jobs.SWEEP, "sweep", job_id="14", num_tasks=3))
    with pytest.raises(RunError, match=r"it is an array of 3 runs\. Give one of them, e\.g\. .*sweep/000"):
        Run.attach(home / "sweep")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"facts": "x"}', "{"])
@pytest.mark.parametrize("name", ["launch.json", "manifest.json"])
def test_a_damaged_run_does_not_end_the_list(home: Path, text: str, name: str) -> None:
    make_run(home / "runs" / "good")
    damaged = make_run(home / "runs" / "damaged")
    (damaged.path / name).write_text(text)
    rows = {row[0]: row[1] for row in list_runs().rows}
    assert rows["runs/good"] == "finished"
    assert rows["runs/damaged"] == ("finished" if (name, text[0:2]) == ("manifest.json", '{"') else "unreadable")


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1"])
def test_a_stop_takes_a_time(home: Path, timeout: str) -> None:
    RunFolder(home / "one").create()
    write_order(RunFolder(home / "one"), Order("cell", ("cell.py",)))
    with pytest.raises(RunError, match="Give seconds, 0 or more"):
        biokit("stop", "one", f"--timeout={timeout}")


def test_a_dot_in_a_message_stays(home: Path) -> None:
    with pytest.raises(RunError, match=r"run \.: it holds no run"):
        Run.attach(".")


def test_notes_of_other_hosts_are_kept(home: Path) -> None:
    """Their disks need not be seen here."""
    register = home.parent / "state" / "biokit" / "runs"
    register.mkdir(parents=True, exist_ok=True)
    for name, host in (("a", "node7"), ("b", socket.gethostname())):
        (register / f"{name}.json").write_text(json.dumps({"path": "/scratch/nowhere", "host": host, "pid": 1}))
    list_registered()
    assert (register / "a.json").exists() and not (register / "b.json").exists()
