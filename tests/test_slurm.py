"""Slurm's answers, what a job does with its signals, following, and srun's words; all without a Slurm."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biokit.errors import EngineError, RunError
from biokit.launch import states
from biokit.launch.slurm import following, job, jobs, srun
from biokit.launch.slurm.job import JobRun, find_folder
from biokit.launch.slurm.jobs import Job, QueueEntry, own_job_id, read_job, write_job
from biokit.launch.slurm.work import NotebookWork, TrainingWork
from biokit.runs import MetricsWriter, RunFolder
from tests.fake_slurm import INSIDE, FakeSlurm

FORGOTTEN = (1, "", "slurm_load_jobs error: Invalid job id specified\n")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm that is none."""
    return FakeSlurm.install(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder that was submitted as job 12."""
    made = RunFolder(tmp_path / "run")
    made.create()
    write_job(made, Job("train", "small", signal_before_s=120, job_id="12"))
    return made


def test_a_job_is_remembered(folder: RunFolder) -> None:
    told = Job(
        "notebook", "n", "p.ipynb", "o.ipynb", {"lr": 1e-4, "x": [1]}, ("lr",), 0, 60, "12_3", 1.5, "failed", "why"
    )
    write_job(folder, told)
    assert read_job(folder) == told and read_job(RunFolder(folder.path / "none")) is None


@pytest.mark.parametrize(
    "change", [{"job_id": "--user=root"}, {"kind": "x"}, {"num_tasks": 1e12}, {"parameters": 3}, {"varied": 3}]
)
def test_what_no_job_wrote_is_not_told_to_slurm(folder: RunFolder, change: dict[str, object]) -> None:
    values = asdict(read_job(folder) or Job("train", "x"))
    (folder.path / jobs.JOB_FILE).write_text(json.dumps({**values, **change}))
    with pytest.raises(RunError, match=r"job\.json cannot be read"):
        read_job(folder)


@pytest.mark.parametrize("text", ["[1]", "", "[" * 100_000])
def test_a_job_file_that_is_none(folder: RunFolder, text: str) -> None:
    (folder.path / jobs.JOB_FILE).write_text(text)
    with pytest.raises(RunError, match=r"job\.json cannot be read"):
        read_job(folder)


def test_the_queue_is_read(fake: FakeSlurm) -> None:
    lines = "12_0|RUNNING|node[1-2]|None\n12_1|PENDING||Resources | odd\n12_2|COMPLETED|node1|None\n"
    fake.answer(squeue=(0, lines, ""))
    found = jobs.look_up(["12_0", "12_1"])
    assert list(found) == ["12_0", "12_1"] and fake.said[-1][-1] == "--jobs=12"
    assert [str(entry) for entry in found.values()] == ["running on node[1-2]", "queued (Resources | odd)"]
    assert jobs.job_state("12_2") == "COMPLETED"
    fake.answer(squeue=FORGOTTEN)
    assert jobs.look_up(["12"]) == {} and jobs.job_state("12") == jobs.UNKNOWN == jobs.job_state("")
    fake.answer(squeue=(1, "", "Unable to contact slurm controller\n"))
    with pytest.raises(RunError, match="Unable to contact slurm controller"):
        jobs.look_up(["12"])


def test_an_allocation_is_not_handed_on(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answer(sbatch=(0, "8\n", ""))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setenv("SLURM_CONF", "here")
    kept = jobs._outside()
    assert kept["SLURM_CONF"] == "here" and "SLURM_MEM_PER_NODE" not in kept and kept["PATH"]
    jobs.submit_script(Path("job.sbatch"))
    assert srun.find_lost_node({**INSIDE, "SLURM_JOB_NUM_NODES": "1"}) == srun.find_lost_node(INSIDE) == ""
    assert fake.allocations == ["", "7"] and fake.said[-1][-1] == "true"  # a step of this job, and not one of its own
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="scancel is not on this machine"):
        jobs.cancel("12")


def test_which_job_this_is() -> None:
    assert own_job_id({}) == "" and own_job_id({"SLURM_JOB_ID": "9"}) == "9"
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert own_job_id(task) == "9_3"  # 9 would stand for all tasks


def test_an_arrays_task_has_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert find_folder(Path("/runs/x"), True).path == Path("/runs/x/003")
    assert find_folder(Path("/runs/x"), False).path == Path("/runs/x")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(RunError, match="SLURM_ARRAY_TASK_ID is not set"):
        find_folder(Path("/runs/x"), True)


class FakeWork:
    """Ends as told, once it was asked to; saves checkpoints on the way."""

    def __init__(self, outcome: str, saved: dict[str, int], signals: list[int], obeys: bool = True) -> None:
        self._outcome, self.saved, self.signals, self.obeys = outcome, saved, signals, obeys
        self.asked: list[str] = []
        self._over = not signals
        self._begun = time.monotonic()

    def await_predecessor(self) -> None: ...

    def start(self) -> None:
        for number in self.signals:
            os.kill(os.getpid(), number)

    def is_over(self) -> bool:
        assert time.monotonic() - self._begun < 20, "it is waited for in vain"
        return self._over

    def ask_to_stop(self) -> None:
        self.asked.append("stop")
        self._over = self.obeys

    def terminate(self) -> None:
        self.asked.append("terminate")

    def cut(self) -> None:
        self.asked.append("cut")
        self._over = True

    def saved_steps(self) -> dict[str, int]:
        return dict(self.saved) if self._over else {}

    def outcome(self) -> tuple[str, str]:
        return self._outcome, "why" if self._outcome == "failed" else ""


USR2, TERM, INT = signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "outcome", "saved", "state", "ends", "code"),
    [
        ([], "finished", {}, "RUNNING", "finished", 0),
        ([], "stopped", {"r": 5}, "RUNNING", "stopped", 0),  # by its user: the STOP file
        ([], "failed", {"r": 5}, "RUNNING", "failed", 1),
        ([USR2], "stopped", {"r": 5}, "RUNNING", "requeued", 0),
        ([USR2], "finished", {"r": 5}, "RUNNING", "finished", 0),
        ([USR2], "failed", {"r": 5}, "RUNNING", "requeued", 0),  # a rank was ended in the middle of its last step
        ([USR2], "stopped", {}, "RUNNING", "failed", 1),  # nothing new: it would go on for ever
        ([TERM], "stopped", {"r": 5}, "RUNNING", "requeued", 0),  # Slurm is about to preempt it
        ([TERM], "stopped", {"r": 5}, "COMPLETING", "stopped", 0),  # scancel
        ([USR2, TERM], "stopped", {"r": 5}, "COMPLETING", "stopped", 0),
        ([TERM], "interrupted", {"r": 5}, "COMPLETING", "interrupted", 1),
        ([INT], "interrupted", {"r": 5}, "RUNNING", "interrupted", 1),
    ],
)  # fmt: skip
def test_what_a_job_does_with_its_signals(
    fake: FakeSlurm,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    signals: list[int],
    outcome: str,
    saved: dict[str, int],
    state: str,
    ends: str,
    code: int,
) -> None:
    fake.answer(squeue=(0, f"12|{state}|node1|None\n", ""))
    assert run_job(folder, monkeypatch, FakeWork(outcome, saved, signals)) == code
    told = read_job(folder)
    assert told is not None and told.outcome == ends and bool(told.error) == (ends == "failed" or code == 1)
    requeued = [words for words in fake.said if words[:2] == ["scontrol", "requeue"]]
    assert requeued == ([["scontrol", "requeue", "12"]] if ends == "requeued" else [])


def run_job(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, work: FakeWork) -> int:
    """One start of the job; the signal handlers of this process are given back."""
    found = read_job(folder)
    assert found is not None
    monkeypatch.setattr(job, "end_tree", lambda **_: [])
    monkeypatch.setattr(job, "become_subreaper", lambda: None)
    started = JobRun(folder, found)
    started.work = work
    old = {number: signal.getsignal(number) for number in (USR2, TERM, INT)}
    try:
        return started.run()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_checkpoint_that_takes_too_long_is_given_up(
    fake: FakeSlurm, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time to go back into the queue before Slurm ends the job."""
    fake.answer(squeue=(0, "12|RUNNING|node1|None\n", ""))
    found = read_job(folder)
    assert found is not None
    write_job(folder, replace(found, signal_before_s=1.0))
    work = FakeWork("interrupted", {"r": 5}, [USR2], obeys=False)
    assert run_job(folder, monkeypatch, work) == 0 and work.asked == ["stop", "cut"]
    assert fake.said[-1] == ["scontrol", "requeue", "12"]


def test_a_job_that_cannot_be_put_back_says_so(
    fake: FakeSlurm, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that does not answer about the job is asked to put it back all the same."""
    fake.answer(squeue=(1, "", "Socket timed out\n"), scontrol=(1, "", "Requeue is disabled\n"))
    assert run_job(folder, monkeypatch, FakeWork("stopped", {"r": 5}, [USR2])) == 1
    told = read_job(folder)
    assert told is not None and told.outcome == "failed" and "it is saved, but cannot be put back" in told.error
    fake.answer(squeue=(1, "", "Socket timed out\n"))
    assert run_job(folder, monkeypatch, FakeWork("stopped", {"r": 5}, [TERM])) == 0
    told = read_job(folder)
    assert told is not None and told.outcome == "stopped"  # it may have been cancelled


def test_a_lost_node_is_no_failure(fake: FakeSlurm, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    running = (0, "12|RUNNING|node1|None\n", "")
    fake.answer(squeue=running, srun=(1, "", "srun: error: Task launch failed on node node2\n"))
    work = FakeWork("failed", {"r": 5}, [])
    work.saved_steps = iter([{}, {"r": 5}]).__next__  # type: ignore[method-assign]
    assert run_job(folder, monkeypatch, work) == 0
    told = read_job(folder)
    assert told is not None and told.outcome == "requeued"
    fake.answer(squeue=running)
    assert run_job(folder, monkeypatch, FakeWork("failed", {"r": 6}, [])) == 1  # all nodes are there: its own fault


def test_works_find_their_runs(folder: RunFolder) -> None:
    """A notebook's runs stand inside its folder; those that are over are not asked to stop."""
    for name in ("a", "b"):
        inner = RunFolder(folder.path / name)
        (inner.checkpoint_dir(7)).mkdir(parents=True)
        inner.launch_file.touch()
    live = states.SupervisorState.of_this_process(1)
    states.write_state(RunFolder(folder.path / "a"), live)
    work = NotebookWork(folder)
    assert work.saved_steps() == {str(folder.path / "a"): 7, str(folder.path / "b"): 7}
    work.ask_to_stop()
    assert RunFolder(folder.path / "a").stop_requested() and not RunFolder(folder.path / "b").stop_requested()
    assert TrainingWork(folder).saved_steps() == {str(folder.path): 0}


def entry(state: str) -> QueueEntry:
    """A line of the queue."""
    return QueueEntry("12", state, "node1", "")


def test_following_believes_the_queue_and_the_job(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = following.open_followed(folder)
    run.look(entry("PENDING"))
    assert (run.ended, run.progress) == ("", "queued")
    tell(folder, "requeued")
    run.look(entry("COMPLETING"))
    assert run.ended == ""
    run.look(entry("PENDING"))
    tell(folder, "finished")
    run.look(entry("RUNNING"))
    assert run.ended == ""  # whatever it said, Slurm may put it back
    run.look(entry("COMPLETED"))
    assert run.ended == "finished"


@pytest.mark.parametrize(
    ("outcome", "found", "ends"),
    [
        ("", entry("TIMEOUT"), "timeout"),
        ("", entry("CANCELLED"), "cancelled"),
        ("requeued", entry("FAILED"), "failed"),
        ("failed", entry("FAILED"), "failed"),
        ("stopped", entry("CANCELLED"), "stopped"),
        ("finished", None, "finished"),
    ],
)
def test_how_a_job_ended(folder: RunFolder, outcome: str, found: QueueEntry | None, ends: str) -> None:
    tell(folder, outcome)
    (run,) = following.open_followed(folder)
    run.look(found)
    assert run.ended == ends


def test_a_last_word_may_come_late(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = following.open_followed(folder)
    run.look(entry("COMPLETED"))
    assert run.ended == ""
    monkeypatch.setattr(following, "LAST_WORD_S", 0.0)
    time.sleep(0.01)
    run.look(None)
    assert run.ended == following.LOST


def test_following_to_the_end(fake: FakeSlurm, folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answer(squeue=(0, "12|FAILED|node1|NonZeroExitCode\n", ""))
    tell(folder, "failed", "the notebook has no such cell")
    (folder.logs / "slurm-12.out").write_text("last words\n")
    with pytest.raises(RunError, match=r"(?s)job 12 in .*: failed\nthe notebook has no such cell.*last words"):
        following.follow_job(folder, queue_s=0.01)
    assert "job 12: failed" in capsys.readouterr().out
    fake.answer(squeue=(1, "", "Unable to contact slurm controller\n"))
    (run,) = following.open_followed(folder)
    following._look([run])
    assert run.ended == "" and "no answer" in run.progress  # Slurm is away: the job is not
    with pytest.raises(RunError, match="it was not submitted"):
        following.open_followed(RunFolder(folder.path / "none"))


def tell(folder: RunFolder, outcome: str, error: str = "") -> None:
    """Have the job say how it ended."""
    found = read_job(folder)
    assert found is not None
    write_job(folder, replace(found, outcome=outcome, error=error))


def test_the_table_of_an_array(fake: FakeSlurm, folder: RunFolder) -> None:
    fake.answer(squeue=(0, "12_0|RUNNING|node1|None\n12_1|FAILED|node1|None\n12_2|PENDING||Priority\n", ""))
    write_job(folder, Job("sweep", "small", varied=("train.lr",), num_tasks=3, job_id="12"))
    for index, lr in enumerate((1e-4, 3e-4, 1e-3)):
        task = RunFolder(folder.path / f"{index:03d}")
        task.create()
        told = Job("train", "small", parameters={"train.lr": lr}, varied=("train.lr",), job_id=f"12_{index}")
        write_job(task, replace(told, outcome="failed" if index == 1 else ""))
    writer = MetricsWriter(RunFolder(folder.path / "000"))
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 3.0 / step, **({"val_loss": 1.25} if step == 2 else {})})
    writer.close()
    table = following.compare_runs(folder)
    assert table.rows == [
        ["000", "0.0001", "running on node1", "3", "1.0000", "1.2500"],
        ["001", "0.0003", "failed", "-", "-", "-"],
        ["002", "0.001", "queued (Priority)", "-", "-", "-"],
    ]
    assert repr(table).splitlines()[0].split("  ")[0] == "run"
