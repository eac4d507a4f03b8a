"""What a Slurm job runs on its first node: `python -m biokit.launch.slurm.job RUN_DIR [--array]`.

A training gets a supervisor, a notebook papermill. Before the time limit (SIGUSR2) and where Slurm preempts the job
(SIGTERM while it counts as running) the run saves a checkpoint at the next step boundary, and the job puts itself back
into the queue, to go on from there; so it does where a node was lost, and not after `scancel`. A job that has saved
nothing new since it began is not put back: it would go on for ever.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from biokit.errors import BiokitError, RunError
from biokit.launch import states
from biokit.launch.slurm import jobs
from biokit.launch.slurm.jobs import Job, own_job_id, read_job, write_job
from biokit.launch.slurm.srun import find_lost_node
from biokit.launch.slurm.sweeps import task_name
from biokit.launch.slurm.work import NotebookWork, TrainingWork, Work, execute_notebook
from biokit.launch.tree import become_subreaper, end_tree
from biokit.runs import RunFolder

REQUEUED = "requeued"
POLL_S, ASK_S = 0.1, 1.0
CHECKPOINT_S = 25.0  # after SIGTERM, before Slurm kills (its KillWait is 30 s unless a site changes it)
MARGIN_S = 15.0  # before the time limit, in which an unfinished checkpoint is given up and the job put back


class JobRun:
    """One start of a job."""

    def __init__(self, folder: RunFolder, job: Job) -> None:
        self.folder, self.job = folder, job
        self.work: Work = TrainingWork(folder) if job.kind == jobs.TRAIN else NotebookWork(folder)
        self.told: dict[int, float] = {}  # signal -> when it came

    def run(self) -> int:
        """To the end of this start; returns the job's exit code."""
        become_subreaper()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        nodes, restarts = (os.environ.get(name, "") for name in ("SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"))
        say(f"job {self.job.job_id} on {nodes or 'this machine'}, put back {restarts or 0} times")
        self.work.await_predecessor()
        before = self.work.saved_steps()
        self.work.start()
        self._look_after()
        outcome, error = self.work.outcome()
        end_tree(grace_s=0)
        if self.told and outcome != states.FINISHED:
            outcome, error = self._judge(outcome, error, before)
        elif outcome == states.FAILED and (lost := find_lost_node()):
            say(f"a node does not answer: {lost}")
            outcome, error = self._judge(outcome, error, before)
        self._note(outcome, error)
        if outcome == REQUEUED:  # noted before: this process may be ended by it
            try:
                jobs.requeue(self.job.job_id)
            except BiokitError as refused:
                outcome = states.FAILED
                self._note(outcome, f"it is saved, but cannot be put back into the queue: {refused}")
        return 0 if outcome in (states.FINISHED, states.STOPPED, REQUEUED) else 1

    def _note(self, outcome: str, error: str) -> None:
        write_job(self.folder, replace(self.job, outcome=outcome, error=error))
        say(f"{outcome}{f': {error}' if error else ''}")

    def _look_after(self) -> None:
        """Until the work has ended, or what was to be saved is saved."""
        asked_at, terminated = 0.0, False
        while not self.work.is_over():
            now = time.monotonic()
            if self.told and now - asked_at > ASK_S:  # again and again: a training that just starts clears an older one
                asked_at = now
                self.work.ask_to_stop()
            if signal.SIGTERM in self.told and not terminated:
                terminated = True
                self.work.terminate()
            if now > self._deadline():
                say("the time is up before the run has saved a checkpoint")
                self.work.cut()
            time.sleep(POLL_S)

    def _deadline(self) -> float:
        """When to give up waiting for the checkpoint, on the monotonic clock."""
        before_s = self.job.signal_before_s
        patience_s = {
            signal.SIGUSR2: max(before_s - MARGIN_S, before_s / 2),
            signal.SIGTERM: CHECKPOINT_S,
            signal.SIGINT: 0.0,
        }
        return min((at + patience_s[signal.Signals(number)] for number, at in self.told.items()), default=float("inf"))

    def _judge(self, outcome: str, error: str, before: dict[str, int]) -> tuple[str, str]:
        """Whether a job that was told to end, or lost a node, is to be put back; (outcome, why it failed)."""
        if not self._goes_on():
            return (
                (outcome, error)
                if outcome == states.STOPPED
                else (states.INTERRUPTED, error or "the job was cancelled")
            )
        after = self.work.saved_steps()
        if any(step > before.get(path, 0) for path, step in after.items()):
            return REQUEUED, ""
        found = "it has saved no new checkpoint since it began, and would go on for ever"
        return (
            states.FAILED,
            f"not put back into the queue: {found}. Give more --time, or a smaller train.save_interval",
        )

    def _goes_on(self) -> bool:
        """Whether Slurm counts the job as running; one that it is ending was cancelled, or it puts it back itself."""
        if signal.SIGINT in self.told:
            return False
        try:
            return jobs.job_state(self.job.job_id) == "RUNNING"
        except BiokitError as error:  # busy, or away: of a time limit that it has told of itself nothing need be asked
            say(str(error))
            return signal.SIGTERM not in self.told

    def _note_signal(self, number: int, _frame: Any) -> None:
        self.told.setdefault(number, time.monotonic())


def say(text: str) -> None:
    """A line of the job's output."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def find_folder(run_dir: Path, is_array: bool) -> RunFolder:
    """The run folder of this job, or of this task of an array.

    Raises:
        RunError: Slurm does not say which task this is.
    """
    if not is_array:
        return RunFolder(run_dir)
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal():
        raise RunError(f"array {run_dir}", "SLURM_ARRAY_TASK_ID is not set", "Submit job.sbatch by sbatch")
    return RunFolder(run_dir / task_name(int(task)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="biokit.launch.slurm.job", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--array", action="store_true", help="the run folder is one of those inside")
    parser.add_argument("--notebook", action="store_true", help="only execute the job's notebook, in this process")
    options = parser.parse_args()
    try:
        folder = find_folder(options.run_dir, options.array)
        job = read_job(folder)
        if job is None:
            raise RunError(f"run {folder.path}", "it was not submitted as a job", "Use `biokit submit`")
        if options.notebook:
            return execute_notebook(folder, job)
        job = replace(job, job_id=own_job_id(), outcome="", error="")
        write_job(folder, job)
        return JobRun(folder, job).run()
    except BiokitError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
