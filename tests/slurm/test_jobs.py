"""Jobs on a real Slurm: two nodes, a notebook, an array, put back and cancelled, a node lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest

from biokit.launch.notebooks import trust_notebook
from biokit.launch.orders import read_order
from biokit.launch.run import Run
from biokit.launch.slurm import following
from biokit.launch.slurm.jobs import cancel, is_queued
from biokit.runs import RunFolder
from tests.slurm import jobs
from tests.slurm.cluster import Cluster, processes_with, wait_until
from tests.slurm.jobs import (
    STEPS,
    job_of,
    last_step,
    losses,
    submit,
    wait_for_outcome,
    wait_for_state,
    wait_for_step,
    write_config,
    write_notebook,
)

NASTY = "a b'c\"d; touch PWNED $(touch PWNED) `touch PWNED`\n#SBATCH --nodes=9\ntouch PWNED"
TWO_NODES = ("strategy=DDP", "--nodes", "2")
ON_TWO_NODES = """\
from biokit.config import load_config
from biokit.launch.run import start_training
config = load_config(config, [f"run_dir={run_dir}", "strategy=DDP", f"train.lr={lr}"])
run = start_training(config, num_nodes=2)
run.wait(show=False)
print(f"{run.status} at step {run.folder.read_manifest()['step']}")
"""
LOST_S = 60.0  # until Slurm counts a silent node as lost, and has put its job back
AGAIN_S = 120.0  # Slurm waits 7 s before it starts a requeued job, and the machine may be busy


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two cores for all; and jobs that note themselves in a list of runs of their own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A training on two nodes that nobody disturbs; others are compared with it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    run = submit(write_config(folder), *TWO_NODES)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    wait_for_outcome(cluster, run, "finished", "failed")
    yield run


def test_a_training_on_two_nodes(cluster: Cluster, undisturbed: RunFolder) -> None:
    job = job_of(undisturbed)
    assert (job.outcome, job.error) == ("finished", ""), jobs.explain(cluster, undisturbed)
    assert undisturbed.read_manifest()["status"] == "finished" and last_step(undisturbed) == STEPS
    ranks = [json.loads(undisturbed.life(1).rank_file(rank).read_text()) for rank in (0, 1)]
    assert {rank["node"] for rank in ranks} == {0, 1}
    wait_for_state(cluster, undisturbed, "COMPLETED")
    assert following.follow_job(undisturbed, queue_s=0.2)[0].ended == "finished"
    assert Run.attach(undisturbed).status == "finished"


def test_an_array_and_its_table(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = submit(write_config(tmp_path, eval_interval=20), "train.lr=1e-4,3e-3", "train.train_iters=20")
    runs = following.follow_job(root, queue_s=0.5)
    assert [run.ended for run in runs] == ["finished", "finished"]
    assert [run.job.parameters for run in runs] == [{"train.lr": 1e-4}, {"train.lr": 3e-3}]
    table = following.compare_runs(root)
    assert [row[:4] for row in table.rows] == [["000", "0.0001", "finished", "20"], ["001", "0.003", "finished", "20"]]
    shown = [f"{line['loss']:.4f}" for line in (RunFolder(root.path / n).read_metrics()[-1] for n in ("000", "001"))]
    assert [row[4] for row in table.rows] == shown and shown[0] != shown[1]
    said = capsys.readouterr().out
    assert "2 of 2 ended" in said and shown[1] in said
    assert "0.003" in table._repr_mimebundle_()["text/html"]


def test_a_notebook(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values that look like shell text arrive as they are, and run nothing."""
    folder = tmp_path / "it's a $(touch PWNED) folder;"
    notebook = write_notebook(folder, write_config(folder, train_iters=8))
    run_dir = tmp_path / "out 'x' $(touch PWNED)"
    given = ["-p", "note", json.dumps(NASTY), "-p", "lr", "2e-3"]
    run = submit(notebook, *given, "--job-name", "it's; touch PWNED", "--run-dir", run_dir)
    notebook.unlink()  # what was submitted runs, whatever becomes of the file
    assert following.follow_job(run, queue_s=0.5)[0].ended == "finished"
    executed = run_dir / "train.ipynb"
    assert f"executed notebook: {executed}" in capsys.readouterr().out
    cells = nbformat.read(executed, as_version=4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert f"lr 0.002, note {NASTY!r}, finished at step 8" in printed
    trust_notebook(executed)
    wait_for_state(cluster, run, "COMPLETED")
    assert "it's; touch PWNED" in cluster.ask("squeue", "-h", "-t", "all", "-o", "%j")
    assert [str(path) for path in Path.cwd().glob("PWNED")] + [str(path) for path in tmp_path.rglob("PWNED")] == []


def test_usr2_saves_and_puts_back(cluster: Cluster, undisturbed: RunFolder, tmp_path: Path) -> None:
    """The requeued job goes on from the checkpoint; its curve is bitwise that of the run that nobody disturbed."""
    run = submit(write_config(tmp_path), *TWO_NODES)
    wait_for_step(cluster, run, 15)
    cluster.ask("scancel", "--batch", "--signal=USR2", job_of(run).job_id)
    wait_for_outcome(cluster, run, "requeued", "failed", "finished", timeout_s=40)
    assert job_of(run).outcome == "requeued", jobs.explain(cluster, run)
    reached = run.read_manifest()["step"]
    assert 15 <= reached < STEPS and reached == run.checkpoint_steps()[-1]
    wait_for_state(cluster, run, "PENDING")
    assert is_queued(run) and Run.attach(run).status == "queued"
    wait_for_outcome(cluster, run, "finished", "failed", timeout_s=AGAIN_S)
    manifest = run.read_manifest()
    assert (job_of(run).outcome, manifest["resumed_from"]) == ("finished", reached), jobs.explain(cluster, run)
    assert losses(run) == losses(undisturbed)
    assert "put back 1 times" in (run.logs / f"slurm-{job_of(run).job_id}.out").read_text()


def test_scancel_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Without an epilog's help: all that biokit starts ends by itself, on both nodes."""
    run = submit(write_config(tmp_path), *TWO_NODES)
    wait_for_step(cluster, run, 10)
    assert cancel_and_count(cluster, run) >= 8  # the job, its supervisor, srun; on each node its part, agent and rank


@pytest.mark.full
def test_scancel_of_a_notebook_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path, write_config(tmp_path), ON_TWO_NODES)
    run = submit(notebook, "--nodes", "2", "--run-dir", tmp_path / "out")
    wait_for_step(cluster, run, 10)
    assert cancel_and_count(cluster, run) >= 10  # papermill and the kernel too


def cancel_and_count(cluster: Cluster, run: RunFolder) -> int:
    """Cancel a job and see that nothing of it is left, and that it does not come back; how many processes it had."""
    job_id = job_of(run).job_id
    count = len(processes_with("SLURM_JOB_ID", job_id))
    cancel(job_id)
    wait_until(lambda: not processes_with("SLURM_JOB_ID", job_id), 20, lambda: jobs.explain(cluster, run))
    wait_for_state(cluster, run, "CANCELLED", timeout_s=20)
    time.sleep(1.0)
    assert processes_with("SLURM_JOB_ID", job_id) == []
    assert job_of(run).outcome in ("", "stopped", "interrupted")  # "": killed after KillWait
    return count


@pytest.mark.full
@pytest.mark.parametrize("is_on", [False, True], ids=["without", "with"])
def test_the_epilog_recipe(cluster: Cluster, tmp_path: Path, is_on: bool) -> None:
    """What other programs' jobs leave on a node is ended by it, and by nobody else."""
    cluster.use_epilog(is_on)
    command = f'{sys.executable} -c \'import subprocess; subprocess.Popen(["sleep", "300"], start_new_session=True)\''
    job_id = cluster.ask("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap", command)
    state = ["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"]
    wait_until(lambda: cluster.ask(*state) == "COMPLETED", 30)
    left = processes_with("SLURM_JOB_ID", job_id)
    cluster.use_epilog(False)
    for process in left:
        process.kill()
    assert len(left) == (0 if is_on else 1)


@pytest.mark.full
def test_a_killed_rank(cluster: Cluster, undisturbed: RunFolder, tmp_path: Path) -> None:
    """The supervisor starts the next life itself, on the same nodes and at another port; the job stays."""
    run = submit(write_config(tmp_path), *TWO_NODES, "--lives", "3")
    wait_for_step(cluster, run, 15)
    os.kill(json.loads(run.life(1).rank_file(1).read_text())["pid"], signal.SIGKILL)
    wait_for_outcome(cluster, run, "finished", "failed", timeout_s=AGAIN_S)
    assert job_of(run).outcome == "finished", jobs.explain(cluster, run)
    assert run.last_life() == 2 and run.read_manifest()["resumed_from"] >= 10
    assert losses(run) == losses(undisturbed)
    assert "put back 0 times" in (run.logs / f"slurm-{job_of(run).job_id}.out").read_text()


@pytest.mark.full
def test_a_killed_srun(cluster: Cluster, tmp_path: Path) -> None:
    """It tells nobody, and its ranks would train on: the nodes end them when the supervisor's file shows a new life."""
    run = submit(write_config(tmp_path, train_iters=1_000_000), *TWO_NODES, "--lives", "2")
    wait_for_step(cluster, run, 15)
    old = [json.loads(run.life(1).rank_file(rank).read_text())["pid"] for rank in (0, 1)]
    sruns = [process for process in processes_with("SLURM_JOB_ID", job_of(run).job_id) if process.name() == "srun"]
    for act in (psutil.Process.suspend, psutil.Process.kill):  # it has a second process, which would tell of its end
        for process in sruns:
            act(process)
    wait_until(lambda: run.life(2).rank_file(0).exists(), jobs.JOB_S, lambda: jobs.explain(cluster, run))
    assert not any(map(psutil.pid_exists, old))
    resumed = last_step(run)
    wait_for_step(cluster, run, resumed + 1)
    cancel(job_of(run).job_id)
    wait_for_state(cluster, run, "CANCELLED")


@pytest.mark.full
def test_a_lost_node(cluster: Cluster, undisturbed: RunFolder, tmp_path: Path) -> None:
    """A node that goes without a word: the job is put back, and goes on from the newest checkpoint."""
    run = submit(write_config(tmp_path), *TWO_NODES)
    wait_for_step(cluster, run, 15)
    assert cluster.lose_node("node2") >= 4  # slurmd, slurmstepd, the agent and its rank
    wait_for_state(cluster, run, "PENDING", timeout_s=LOST_S)
    cluster.start_node("node2")
    wait_for_outcome(cluster, run, "finished", "failed", timeout_s=AGAIN_S)
    assert job_of(run).outcome == "finished", jobs.explain(cluster, run)
    assert run.read_manifest()["resumed_from"] >= 10
    assert losses(run) == losses(undisturbed)


@pytest.mark.full
def test_a_notebook_on_two_nodes_is_put_back(cluster: Cluster, undisturbed: RunFolder, tmp_path: Path) -> None:
    """Its training runs on the allocation's nodes; USR2 reaches it; the notebook begins again, the training goes on."""
    notebook = write_notebook(tmp_path, write_config(tmp_path), ON_TWO_NODES)
    run = submit(notebook, "--nodes", "2", "--run-dir", tmp_path / "out")
    wait_for_step(cluster, run, 15)
    assert read_order(run).placement == "slurm"
    cluster.ask("scancel", "--batch", "--signal=USR2", job_of(run).job_id)
    wait_for_outcome(cluster, run, "requeued", "failed", "finished", timeout_s=40)
    assert job_of(run).outcome == "requeued", jobs.explain(cluster, run)
    wait_for_outcome(cluster, run, "finished", "failed", timeout_s=AGAIN_S)
    assert job_of(run).outcome == "finished", jobs.explain(cluster, run)
    assert run.read_manifest()["resumed_from"] >= 15 and losses(run) == losses(undisturbed)
    cells = nbformat.read(run.path / "train.ipynb", as_version=4).cells
    assert f"finished at step {STEPS}" in "".join(output.get("text", "") for output in cells[-1]["outputs"])


@pytest.mark.full
def test_the_time_limit_itself(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own signal before the limit: saved and back in the queue before the time is up."""
    run = submit(write_config(tmp_path, train_iters=1_000_000), "--time", "1:00", "--signal-before", "40")
    wait_for_outcome(cluster, run, "requeued", "failed", timeout_s=100)
    assert job_of(run).outcome == "requeued", jobs.explain(cluster, run)
    wait_for_state(cluster, run, "PENDING")
    assert run.checkpoint_steps()[-1] == run.read_manifest()["step"] == last_step(run)
    cancel(job_of(run).job_id)
    wait_for_state(cluster, run, "CANCELLED")
