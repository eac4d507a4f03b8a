"""Trainings as runs: what they are started with, and that each way to stop one saves it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from biokit.checkpoint import load_checkpoint, newest_checkpoint
from biokit.config import config_to_yaml, load_config
from biokit.errors import ConfigError
from biokit.launch import run as run_module
from biokit.launch.facts import read_git
from biokit.launch.orders import Order, read_order
from biokit.launch.run import Run, RunFailed, start_training
from biokit.runs import RunFolder
from biokit.view.live import LivePanel
from tests.run_folders import interrupt_soon, is_gone, wait_until
from tests.small_run import small_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def test_what_a_training_is_started_with(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunFolder, Order, bool]] = []
    monkeypatch.setattr(run_module, "start_run", lambda *words: seen.append(words))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keys = ["train.device=cpu", "seed=7", f"run_dir={folder.path}"]
    config = load_config("molbart_mini", keys)
    start_training(config, timeout_s=9.0, detach=True)
    ((where, order, detach),) = seen
    asked = str(folder.logs / "config_asked.yaml")
    assert (where.path, detach, load_config(asked)) == (folder.path, True, config)
    assert (order.program, order.torchrun) == (("-m", "biokit", "train", asked), ())
    assert (order.kind, order.timeout_s, order.max_lives) == ("train", 9.0, 1)
    assert order.environment == {"TQDM_DISABLE": "1"} and order.facts["layout"]["strategy"] == "Single"
    two = load_config("molbart_mini", [*keys, "strategy=DDP", "train.micro_batch_size=8"])
    start_training(two, 1, num_nodes=2, max_lives=3)
    order = seen[-1][1]
    assert (order.torchrun, order.num_nodes, order.max_lives) == (("--nproc-per-node", "1"), 2, 3)
    assert order.environment["OMP_NUM_THREADS"] == "1" and order.facts["layout"]["world_size"] == 2


def test_impossible_layouts_start_nothing(tmp_path: Path) -> None:
    keys = [f"run_dir={tmp_path / 'r'}", "strategy=ThreeD", "parallel.tensor_model_parallel_size=8", "train.device=cpu"]
    with pytest.raises(ConfigError, match="it does not divide num_attention_heads=4"):
        start_training(load_config("molbart_mini", keys), 8)
    assert not (tmp_path / "r").exists()


def test_lives_that_could_not_go_on_are_refused(tmp_path: Path) -> None:
    config = load_config("molbart_mini", [f"run_dir={tmp_path / 'r'}", "resume=false", "train.device=cpu"])
    with pytest.raises(ConfigError, match="resume=false: each of 3 lives"):
        start_training(config, max_lives=3)
    assert not (tmp_path / "r").exists()


def test_git_is_asked_and_its_absence_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-m", "first")
    clean = read_git(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "untracked.txt").write_text("x")
    assert read_git(tmp_path) == clean
    (tmp_path / "a.txt").write_text("two\n")
    two = read_git(tmp_path)
    (tmp_path / "a.txt").write_text("three\n")
    assert two["dirty"] and two["changes"] != read_git(tmp_path)["changes"]
    monkeypatch.setenv("PATH", "")
    assert read_git(tmp_path) == {}


# a training, stopped in four ways


def press_the_button(run: Run) -> None:
    panel = LivePanel(Run.attach(run.folder.path))
    panel._button.click()
    assert panel.wait(60) and panel.state.status == "stopped"


def touch_the_file(run: Run) -> None:
    (run.folder.path / "STOP").touch()
    run.wait(60)


def send_a_signal(run: Run) -> None:
    os.kill(json.loads(run.folder.supervisor_file().read_text())["pid"], signal.SIGTERM)
    run.wait(60)


def interrupt(run: Run) -> None:
    interrupt_soon()
    run.wait(60)


@pytest.mark.parametrize(
    ("way", "num_processes"),
    [
        (press_the_button, 1),
        (touch_the_file, 1),
        (send_a_signal, 1),
        (interrupt, 1),
        pytest.param(interrupt, 2, marks=pytest.mark.full),
    ],
)
def test_a_stopped_training_ends_at_a_step_boundary_with_a_checkpoint(
    way: Callable[[Run], None], num_processes: int, tmp_path: Path
) -> None:
    config = small_config(tmp_path, device="cpu", train_iters=100_000, micro_batch_size=4 // num_processes)
    config.strategy = "Single" if num_processes == 1 else "DDP"
    run = start_training(config, num_processes, timeout_s=120)
    wait_until(lambda: len(run.metrics()) > 2, 60)
    processes = psutil.Process(json.loads(run.folder.supervisor_file().read_text())["pid"]).children(recursive=True)
    way(run)
    assert run.status == run.result["status"] == "stopped"
    step, checkpoint = run.result["step"], newest_checkpoint(run.folder)
    assert checkpoint == run.folder.checkpoint_dir(step) and run.metrics()[-1]["step"] == step
    assert load_checkpoint(checkpoint).state["step"] == step
    assert len(processes) >= num_processes and all(is_gone(process.pid) for process in processes)
    facts = read_order(run.folder).facts
    assert facts["versions"]["torch"] and facts["config_hash"] == run.result["config_hash"] and facts["line"]


@pytest.mark.full
def test_a_failing_rank_is_named_and_not_the_others(tmp_path: Path) -> None:
    config = small_config(tmp_path, device="cpu", micro_batch_size=2)
    config.strategy, config.data.dataset_path = "DDP", str(tmp_path / "none.csv")
    run = start_training(config, 2)
    with pytest.raises(RunFailed, match=r"(?s)rank 0.*none\.csv") as caught:
        run.wait(120)
    assert [cause.rank for cause in caught.value.failure.causes] == [0]


@pytest.mark.full
def test_the_time_out_ends_all_and_says_where_the_ranks_stood(tmp_path: Path) -> None:
    config = small_config(tmp_path, device="cpu", train_iters=100_000)
    run = start_training(config, timeout_s=5.0)
    with pytest.raises(RunFailed, match="HUNG: the run did not end in 5 s"):
        run.wait(60)
    assert run.status == "timed out"
    assert run.hang is not None and [stack.rank for stack in run.hang.ranks] == [0]
    assert config_to_yaml(config) == (run.folder.logs / "config_asked.yaml").read_text()
