"""What a run folder knows of its Slurm job, and what Slurm says of it: submit, look up, cancel, put back.

Slurm's commands are called with argument lists, never through a shell. Where it keeps no accounts (`sacct`), it forgets
a job some minutes after its end; then the run folder alone says how it went.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from biokit.errors import EngineError, RunError
from biokit.launch.orders import HERE, SLURM
from biokit.launch.supervision.agent_file import PARENT
from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import load_object, to_number, to_text, to_whole

SCRIPT_FILE, JOB_FILE = "job.sbatch", "job.json"
COMMAND_S = 60.0  # a Slurm command that has not answered by then is not waited for
KINDS = TRAIN, NOTEBOOK, SWEEP = "train", "notebook", "sweep"
MAX_TASKS = 4_000_001  # of an array, however Slurm is set up
MAX_TEXT = 8192  # characters of an entry of the job's file
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
UNKNOWN = "UNKNOWN"  # Slurm has forgotten the job, or does not answer


class SlurmRefusal(RunError):
    """Slurm says no."""


@dataclass(frozen=True)
class Job:
    """A job as its run folder remembers it.

    Attributes:
        kind: `train`, `notebook`, or `sweep`: an array, whose tasks have the run folders 000, 001, ... inside.
        job_id: `12`, or `12_3` of an array's task; empty: not submitted yet.
        program: path of the notebook in the run folder, or of the configuration.
        notebook: where the notebook came from; it runs as if it stood there.
        parameters: what this run was given; of an array's task, with what sets it apart.
        varied: names of the parameters that differ within the array.
        num_tasks: of an array.
        signal_before_s: how long before its time limit the job is told.
        outcome: how the job itself ended: `finished`, `stopped`, `requeued`, `failed`; empty: it did not say.
        error: why it failed.
    """

    kind: str
    name: str
    program: str = ""
    notebook: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    varied: tuple[str, ...] = ()
    num_tasks: int = 0
    signal_before_s: float = 0.0
    job_id: str = ""
    submitted: float = 0.0
    outcome: str = ""
    error: str = ""


@dataclass(frozen=True)
class QueueEntry:
    """One line of squeue."""

    job_id: str
    state: str
    nodes: str
    reason: str

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_over(self) -> bool:
        return self.state not in (*WAITING, *ACTIVE)

    def __str__(self) -> str:
        """For people: `queued (Priority)`, `running on node[1-2]`, `timeout`."""
        if self.is_waiting:
            return f"queued ({self.reason})" if self.reason not in ("", "None") else "queued"
        return f"{self.state.lower()} on {self.nodes}" if not self.is_over and self.nodes else self.state.lower()


def read_job(folder: RunFolder) -> Job | None:
    """The job that a run folder was submitted as; None: it was not.

    Raises:
        RunError: its file cannot be one that biokit wrote.
    """
    try:
        return job_from_dict(load_object(folder.path / JOB_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        found = f"its {JOB_FILE} cannot be read ({error})"
        raise RunError(f"run {folder.path}", found, "Submit it again, or remove the file") from error


def job_from_dict(values: Mapping[str, Any]) -> Job:
    """A job from plain values; unknown entries are left out.

    Raises:
        ValueError: a kind, an id or a number of tasks that no job has: Slurm would be asked about something else.
    """
    plain: dict[str, Any] = {f.name: to_text(values.get(f.name, ""), MAX_TEXT) for f in fields(Job) if f.type == "str"}
    plain |= {f.name: to_number(values.get(f.name)) for f in fields(Job) if f.type == "float"}
    parameters, varied = values.get("parameters", {}), values.get("varied", [])
    num_tasks = to_whole(values.get("num_tasks"))
    if plain["kind"] not in KINDS:
        raise ValueError(f"kind {plain['kind']!r}")
    if not re.fullmatch(r"([0-9]{1,18}(_[0-9]{1,9})?)?", plain["job_id"]):
        raise ValueError(f"job_id {plain['job_id']!r}")
    if not 0 <= num_tasks <= MAX_TASKS:
        raise ValueError(f"num_tasks {num_tasks}")
    if not isinstance(parameters, dict) or not isinstance(varied, list):
        raise ValueError("parameters or varied of another form")
    return Job(**plain, num_tasks=num_tasks, parameters=parameters, varied=tuple(map(str, varied)))


def write_job(folder: RunFolder, job: Job) -> None:
    """Leave what a job is in its run folder."""
    write_atomically(folder.path / JOB_FILE, json.dumps(asdict(job), indent=1, allow_nan=False) + "\n")


def submit_script(script: Path) -> str:
    """Hand a batch script to Slurm; returns the job's id.

    Raises:
        EngineError: Slurm is not on this machine.
        RunError: it does not take the job.
    """
    folder = script.parent
    if shutil.which("sbatch") is None:
        path, file = shlex.quote(f"{folder}/"), shlex.quote(str(script))
        copy = f"rsync -a {path} HOST:{path}"
        do = f"On a login node that sees the folder: sbatch {file}; where none does, copy it there first: {copy}"
        raise EngineError(f"submit {script}", "sbatch is not on this machine", do)
    answer = ask_slurm(["sbatch", "--parsable", str(script)], "submit the job", environment=_outside())
    return answer.strip().splitlines()[-1].split(";")[0]


def look_up(job_ids: Iterable[str]) -> dict[str, QueueEntry]:
    """What Slurm says of jobs or arrays' tasks that it still knows, by id; nothing of those that it has forgotten."""
    wanted = set(job_ids)
    entries = _list_queue(*sorted({job_id.partition("_")[0] for job_id in wanted}))
    return {entry.job_id: entry for entry in entries if entry.job_id in wanted}


def find_alive(job_id: str) -> QueueEntry | None:
    """A job, or a task of the array, that waits or runs; None: none does, as far as Slurm says."""
    if not job_id or shutil.which("squeue") is None:
        return None
    entries = _list_queue(job_id.partition("_")[0])
    own = [entry for entry in entries if entry.job_id == job_id or entry.job_id.startswith(f"{job_id}_")]
    return next((entry for entry in own if not entry.is_over), None)


def job_state(job_id: str) -> str:
    """Slurm's word for a job (`PENDING`, `RUNNING`, `COMPLETED`, `TIMEOUT`, ...); UNKNOWN: it has forgotten it."""
    if not job_id or shutil.which("squeue") is None:
        return UNKNOWN
    entry = look_up([job_id]).get(job_id)
    return entry.state if entry else _ask_accounts(job_id)


def is_queued(folder: RunFolder) -> bool:
    """Whether a run's job waits in the queue: for the first time, or put back to go on later."""
    job = read_job(folder)
    return job is not None and bool(job.job_id) and job_state(job.job_id) in WAITING


def cancel(job_id: str) -> None:
    """Take a job from the queue, or end it: a training saves a checkpoint as far as Slurm's KillWait lets it.

    Raises:
        EngineError: Slurm is not on this machine.
        RunError: it refuses.
    """
    ask_slurm(["scancel", job_id], f"cancel job {job_id}")


def requeue(job_id: str) -> None:
    """Put a job back into the queue, to begin again.

    Raises:
        EngineError: Slurm is not on this machine.
        RunError: it refuses.
    """
    ask_slurm(["scontrol", "requeue", job_id], f"requeue job {job_id}")


def own_job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The job that this process is part of, as its user knows it; empty: none.

    Of an array's task this is not SLURM_JOB_ID: one of the tasks has the array's own number there, and Slurm would take
    that for all of them.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def has_nodes(num_nodes: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is inside an allocation of at least so many nodes, which srun can reach."""
    given = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "0"
    inside = bool(environment.get("SLURM_JOB_ID") and environment.get("SLURM_JOB_NODELIST"))
    return inside and given.isdecimal() and int(given) >= num_nodes and shutil.which("srun") is not None


def choose_placement(num_nodes: int) -> str:
    """Where several nodes' agents go: to the nodes of the allocation that this process is in, else to this machine."""
    return SLURM if num_nodes > 1 and has_nodes(num_nodes) else HERE


def ask_slurm(
    words: Sequence[str], asked: str, fails: str | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What a Slurm command prints.

    Args:
        asked: what for, in a few words.
        fails: the answer to take where the command fails (a job that Slurm has forgotten is an error there).
        environment: in place of this process's own.

    Raises:
        EngineError: the command is not there.
        SlurmRefusal: it fails.
        RunError: it does not answer.
    """
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            env=None if environment is None else dict(environment),
        )
    except FileNotFoundError as error:
        found = f"{words[0]} is not on this machine"
        raise EngineError(asked, found, "Do it on a machine of the cluster, e.g. a login node") from error
    except subprocess.TimeoutExpired as error:
        found = f"{words[0]} has not answered in {COMMAND_S:g} s"
        raise RunError(asked, found, "Try again later: the job itself does not depend on it") from error
    if done.returncode == 0:
        return done.stdout
    if fails is not None and "invalid job id" in done.stderr.lower():
        return fails
    found = " ".join((done.stderr.strip() or f"{words[0]} ended with exit code {done.returncode}").split())
    raise SlurmRefusal(asked, found, "Mend what it names; options of your own stand in the site file")


def _list_queue(*job_ids: str) -> list[QueueEntry]:
    """What Slurm says of whole jobs; of arrays, a line a task."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={','.join(job_ids)}"]
    lines = ask_slurm(command, "look at the queue", fails="").splitlines()
    return [QueueEntry(*line.split("|", 3)) for line in lines]


def _outside() -> dict[str, str]:
    """The environment for a new job: without what an allocation that this process is in would add to it."""
    inside = "SLURM_JOB_ID" in os.environ
    own = [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"] if inside else []
    return {name: value for name, value in os.environ.items() if name not in (PARENT, *own)}


def _ask_accounts(job_id: str) -> str:
    if shutil.which("sacct") is None:
        return UNKNOWN
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"]
    try:
        lines = ask_slurm(command, "look at the accounts").split()
    except RunError:  # this cluster keeps none
        return UNKNOWN
    return lines[0] if lines else UNKNOWN
