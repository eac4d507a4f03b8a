"""Where the run of a Slurm job stands while no supervisor is at work in its folder: queued, beginning, or over."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace

from biokit.errors import BiokitError, RunError
from biokit.launch.slurm import jobs
from biokit.launch.slurm.jobs import Job, read_job, write_job
from biokit.launch.states import FAILED, FINISHED, STOPPED, TIMED_OUT, read_state
from biokit.runs import RunFolder
from biokit.view.training import FINAL_STATES

LOOK_EVERY_S = 5.0  # Slurm is not asked more often about a job
FORGETS_S = 60.0  # Slurm knows a job at least so long after it was submitted
OUTCOMES = {"COMPLETED": FINISHED, "CANCELLED": STOPPED, "TIMEOUT": TIMED_OUT, "DEADLINE": TIMED_OUT}

_looks: dict[str, tuple[float, str]] = {}  # job id -> (when, Slurm's word)


def find_job(folder: RunFolder) -> Job | None:
    """The job that a run was submitted as; None: it was not, or nobody can tell."""
    with contextlib.suppress(RunError):
        job = read_job(folder)
        return job if job is not None and job.job_id else None
    return None


def status_of_job(folder: RunFolder, job: Job, status: str) -> str:
    """The status of a job's run.

    Args:
        status: what the run folder says, for all it knows.
    """
    if status not in FINAL_STATES and status != "queued":
        return status
    if job.outcome in FINAL_STATES:
        return status if status in FINAL_STATES and job.kind == jobs.TRAIN else job.outcome
    if status in FINAL_STATES and status != "lost" and _is_of_this_start(folder):
        return status
    state = _look_up(job.job_id)
    if state in jobs.WAITING:
        return "queued"
    if state in jobs.ACTIVE:
        return "starting" if job.kind == jobs.TRAIN else "running"
    if state != jobs.UNKNOWN:
        return OUTCOMES.get(state, FAILED)
    if status in FINAL_STATES:
        return status
    return "lost" if shutil.which("squeue") and time.time() - job.submitted > FORGETS_S else "queued"


def cancel_job(folder: RunFolder, job: Job, *, begun: bool) -> None:
    """Take a run's job from the queue, or have Slurm end it.

    Raises:
        EngineError: Slurm is not on this machine.
        RunError: it refuses.
    """
    jobs.cancel(job.job_id)
    if not begun:  # nobody else says how it ended, and Slurm forgets
        write_job(folder, replace(job, outcome=STOPPED))
    _looks.pop(job.job_id, None)


def _is_of_this_start(folder: RunFolder) -> bool:
    """Whether the supervisor was one of the job's newest start, which began by writing the job's file."""
    said = read_state(folder)
    return said is not None and said.started >= (folder.path / jobs.JOB_FILE).stat().st_mtime


def _look_up(job_id: str) -> str:
    when, state = _looks.get(job_id, (-LOOK_EVERY_S, jobs.UNKNOWN))
    if time.monotonic() - when >= LOOK_EVERY_S:
        with contextlib.suppress(BiokitError):  # a controller that does not answer now: what it said last holds
            state = jobs.job_state(job_id)
        _looks[job_id] = time.monotonic(), state
    return state
