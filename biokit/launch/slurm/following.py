"""Follows a job from the queue to its end: Slurm says where it waits and runs, the run folder how far it has come.

Leaving changes nothing: the job belongs to Slurm, and can be followed again from anywhere.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biokit.errors import RunError
from biokit.failures import read_failure
from biokit.launch.slurm import jobs
from biokit.launch.slurm.job import REQUEUED
from biokit.launch.slurm.jobs import NOTEBOOK, SWEEP, Job, QueueEntry, read_job
from biokit.launch.slurm.sweeps import task_name
from biokit.launch.states import FINISHED, STOPPED
from biokit.runs import RunFolder
from biokit.view.cards import failure_card
from biokit.view.table import Table
from biokit.view.training import LINE_EVERY_S, read_state

QUEUE_S = 5.0  # between two looks at the queue: Slurm serves everybody
LAST_WORD_S = 15.0  # in which a job's last word has to come over a shared disk, once Slurm says that it has ended
TAIL_LINES = 15
WELL = (FINISHED, STOPPED)
LOST = "lost"  # Slurm has forgotten the job, and it never said how it ended


@dataclass
class Followed:
    """One run of a job.

    Attributes:
        entry: what the queue said last; None: nothing yet, or it has forgotten the job.
        ended: how it ended: the job's own word, else Slurm's; empty before.
    """

    folder: RunFolder
    job: Job
    entry: QueueEntry | None = None
    ended: str = ""
    _over_at: float = 0.0

    def look(self, entry: QueueEntry | None) -> None:
        """Take in what the queue says now, and what the job has said."""
        if self.ended:
            return
        self.entry, self.job = entry, read_job(self.folder) or self.job
        if entry is not None and not entry.is_over:  # whatever it said: Slurm may put it back
            self._over_at = 0.0
        elif self.job.outcome and self.job.outcome != REQUEUED:
            self.ended = self.job.outcome
        else:
            self._over_at = self._over_at or time.monotonic()
            if time.monotonic() - self._over_at > LAST_WORD_S or (entry and entry.state != "COMPLETED"):
                self.ended = entry.state.lower() if entry else LOST

    @property
    def notebook(self) -> Path | None:
        """The executed notebook; None where there is none."""
        path = self.folder.path / Path(self.job.program).name
        return path if self.job.kind == NOTEBOOK and path.exists() else None

    @property
    def progress(self) -> str:
        """How far it has come, or where it waits."""
        if self.ended:
            return self.ended
        if self.entry is None or self.entry.is_waiting:
            return str(self.entry or "submitted")
        started = self.folder.read_metrics()
        return f"{self.entry}: {read_state(self.folder)}" if started else str(self.entry)


def open_followed(root: RunFolder) -> list[Followed]:
    """The runs of the job that a folder was submitted as.

    Raises:
        RunError: it was not submitted.
    """
    job = read_job(root)
    if job is None or not job.job_id:
        raise RunError(f"job of {root.path}", "it was not submitted", "Use `biokit submit`")
    if job.kind != SWEEP:
        return [Followed(root, job)]
    folders = [RunFolder(root.path / task_name(index)) for index in range(job.num_tasks)]
    return [Followed(folder, read_job(folder) or job) for folder in folders]


def follow_job(root: RunFolder, queue_s: float = QUEUE_S) -> list[Followed]:
    """Say where a job stands until it has ended; then what it brought: executed notebooks, or a table of its runs.

    An interrupt leaves; the job goes on.

    Args:
        queue_s: between two looks at the queue.

    Raises:
        RunError: it failed, or one of its runs did.
    """
    runs, looked_at = open_followed(root), 0.0
    while True:
        if time.monotonic() - looked_at >= queue_s or any(_may_have_ended(run) for run in runs):
            _look(runs)
            looked_at = time.monotonic()
        over = all(run.ended for run in runs)
        print(f"{_describe(runs):<78}", end="\n" if over else "\r", flush=True)
        if over:
            break
        time.sleep(min(LINE_EVERY_S, queue_s))
    _bring_back(root, runs)
    raise_on_failure(root, runs)
    return runs


def raise_on_failure(root: RunFolder, runs: Sequence[Followed]) -> None:
    """Nothing, where all runs finished or were stopped.

    Raises:
        RunError: one ended otherwise; with its failure card, or the end of what it said.
    """
    failed = [run for run in runs if run.ended not in WELL]
    if not failed:
        return
    first = failed[0]
    which = f"{len(failed)} of {len(runs)} runs failed; {first.folder.path.name}: " if len(runs) > 1 else ""
    do = "Mend the cause and submit again: a training goes on from its last checkpoint"
    raise RunError(f"job {first.job.job_id} in {root.path}", f"{which}{first.ended}\n{_explain(first)}\n", do)


def compare_runs(root: RunFolder) -> Table:
    """What the runs of an array were given, and what came of it."""
    runs = open_followed(root)
    _look(runs)
    return _compare(runs)


def leaving_words(root: RunFolder, job_id: str) -> str:
    """What to do with a job that nobody follows any more."""
    path = shlex.quote(str(root.path))
    return f"job {job_id} goes on; look: biokit submit --follow {path}   end it: scancel {job_id}"


def _look(runs: Sequence[Followed]) -> None:
    """Ask the queue once for all that have not ended; where it cannot be asked, the folders are read alone."""
    going = [run for run in runs if not run.ended]
    try:
        entries: Mapping[str, QueueEntry] = jobs.look_up(run.job.job_id for run in going) if going else {}
    except RunError:  # Slurm is busy or away: the job is not
        entries = {run.job.job_id: run.entry or QueueEntry(run.job.job_id, "PENDING", "", "no answer") for run in going}
    for run in going:
        run.look(entries.get(run.job.job_id))


def _may_have_ended(run: Followed) -> bool:
    """Whether the job itself has said something new: then the queue is asked at once."""
    if run.ended:
        return False
    with contextlib.suppress(RunError):
        job = read_job(run.folder)
        return job is not None and bool(job.outcome) and job.outcome not in (REQUEUED, run.job.outcome)
    return False


def _describe(runs: Sequence[Followed]) -> str:
    """One line about all of them."""
    if len(runs) == 1:
        return f"job {runs[0].job.job_id}: {runs[0].progress}"
    ended, waiting = [run for run in runs if run.ended], [run for run in runs if run.entry and run.entry.is_waiting]
    running = [run for run in runs if not run.ended and run not in waiting]
    text = f"job {runs[0].job.job_id.partition('_')[0]}: {len(ended)} of {len(runs)} ended"
    text += f", {len(waiting)} queued" if waiting else ""
    return text + (f", {running[0].folder.path.name} {running[0].progress}" if running else "")


def _bring_back(root: RunFolder, runs: Sequence[Followed]) -> None:
    from biokit.launch.notebooks import trust_notebook

    for run in runs:
        if run.notebook is not None:
            with contextlib.suppress(ImportError):  # where notebooks cannot be opened, nobody needs to trust them
                trust_notebook(run.notebook)
            print(f"executed notebook: {run.notebook}")
    if len(runs) > 1:
        print(_compare(runs))
    print(f"run folder: {root.path}")


def _compare(runs: Sequence[Followed]) -> Table:
    varied = runs[0].job.varied
    head = ["run", *varied, "status", "step", "loss", "val loss"]
    return Table(head, [_row(run, varied) for run in runs])


def _row(run: Followed, varied: Sequence[str]) -> list[str]:
    lines = run.folder.read_metrics()
    last = [next((line[key] for line in reversed(lines) if line.get(key) is not None), None) for key in _COLUMNS]
    values = [str(run.job.parameters.get(name)) for name in varied]
    return [run.folder.path.name, *values, run.ended or run.progress.partition(":")[0], *map(_figure, last)]


_COLUMNS = ("step", "loss", "val_loss")


def _figure(value: Any) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _explain(run: Followed) -> str:
    """Why a run failed: its card, the job's own words, and the end of its output."""
    with contextlib.suppress(RunError):
        if failure := read_failure(run.folder):
            return failure_card(failure).text
    logs = [folder / "logs" / f"slurm-{run.job.job_id}.out" for folder in (run.folder.path, run.folder.path.parent)]
    own = [log for log in logs if log.is_file()]  # an array's stand beside its run folders
    lines = own[0].read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:] if own else []
    tail = [f"the end of {own[0]}:", *lines] if lines else []
    return "\n".join([*([run.job.error] if run.job.error else []), *tail]) or "It left no word."
