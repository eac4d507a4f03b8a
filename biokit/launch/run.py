"""A run as an object: started here or anywhere, alive or ended, it is read from its folder and stopped through it."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biokit.config import RunConfig, config_to_yaml
from biokit.errors import RunError
from biokit.failures import Failure, read_failure
from biokit.launch import states
from biokit.launch.facts import asked_file, describe_run
from biokit.launch.failed_run import RunFailed, explain_end
from biokit.launch.orders import SLURM, Order, has_own_output, read_order
from biokit.launch.slurm import jobs
from biokit.launch.slurm.job_status import cancel_job, find_job
from biokit.launch.slurm.sweeps import task_name
from biokit.launch.started import check_free, find_started, start_order
from biokit.launch.status import find_supervisor, note_interrupted, read_status
from biokit.launch.training_order import training_order
from biokit.launch.tree import end_tree
from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import read_end
from biokit.stacks import Hang, read_hang
from biokit.view.cards import Card, run_card
from biokit.view.training import FINAL_STATES, follow, read_state, show_training

if TYPE_CHECKING:
    from biokit.view.dashboard import Dashboard
    from biokit.view.picture import Picture

__all__ = ["Run", "RunFailed", "start_run", "start_training"]
ENDED_WELL = ("finished", "stopped", "preprocessed")
AT_ONCE_S = 8.0  # from SIGINT to SIGKILL of the supervisor's tree
POLL_S = 0.1
MAX_OUTPUT_BYTES = 1 << 30  # of what a rank printed; the last of it


class Run:
    """A run: of this process, another notebook, another host, or Slurm; alive or ended.

    All of it is read from the run folder at each look. A run that this process started ends with this process unless
    it was detached; letting go of the object ends nothing.

    Attributes:
        folder: the run folder, where everything about the run is found.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @classmethod
    def attach(cls, folder: str | Path | RunFolder) -> Run:
        """The run of a folder, whoever started it.

        Raises:
            RunError: the folder holds no run.
        """
        found = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        job_file = found.path / jobs.JOB_FILE
        found.check_path()
        files = (found.launch_file, found.manifest_file, found.config_file, found.metrics_file(), job_file)
        if not any(file.exists() for file in files):
            what = "it holds no run" if found.path.is_dir() else "there is no such folder"
            raise RunError(f"run {found.path}", what, "Give the folder of a run; `biokit runs list` names them")
        if (job := find_job(found)) is not None and job.kind == jobs.SWEEP:
            do = f"Give one of them, e.g. {found.path / task_name(0)}"
            raise RunError(f"run {found.path}", f"it is an array of {job.num_tasks} runs", do)
        return cls(found)

    @property
    def status(self) -> str:
        """starting, queued, running, stopping, `waiting for life k`; or it has ended: finished, stopped, preprocessed,
        failed, timed out, interrupted, lost (nobody said how it ended, and nobody is there any more).
        """
        ours = find_started(self.folder)
        gone = ours is not None and not ours.alive  # looked up before the folder, where its last word stands by then
        status = read_status(self.folder)
        if ours is not None and ours.alive and status == "lost":  # slow to say its first word
            return "starting"
        return "lost" if status == "starting" and gone else status

    @property
    def ended(self) -> bool:
        return self.status in FINAL_STATES

    @property
    def alive(self) -> bool:
        return not self.ended

    @property
    def owned(self) -> bool:
        """Whether the run ends with this process."""
        ours = find_started(self.folder)
        return ours is not None and not ours.detached and ours.alive

    @property
    def started(self) -> float:
        """When, in unix seconds; 0: not known."""
        if said := states.read_state(self.folder):
            return said.started
        return self.folder.launch_file.stat().st_mtime if self.folder.launch_file.exists() else 0.0

    @property
    def life(self) -> int:
        """The newest launch of its processes, counted from 1; 0: none yet."""
        return self.folder.last_life()

    @property
    def kind(self) -> str:
        """`train`, `script`, `cell` or `ranks`."""
        with contextlib.suppress(RunError):
            return read_order(self.folder).kind
        return "train"  # nobody ordered it: `biokit train` by hand

    @property
    def failure(self) -> Failure | None:
        """Why the newest life that failed did; None where none failed."""
        return read_failure(self.folder)

    @property
    def hang(self) -> Hang | None:
        """Where every rank stood when the run did not go on; None where it went on."""
        return read_hang(self.folder)

    @property
    def result(self) -> dict[str, Any]:
        """What the run gave: the values that rank 0 gave back by name; of a training, its manifest.

        Raises:
            RunFailed: it failed.
            RunError: it has not ended.
        """
        self.raise_on_failure()
        if self.alive:
            raise RunError(f"result of {self.folder.path}", f"the run is {self.status}", "Wait for it with .wait()")
        if self.kind == "train":
            return self.folder.read_manifest()
        from biokit.launch.values import read_values

        return read_values(self.folder.result_file) if self.folder.result_file.exists() else {}

    @property
    def card(self) -> Card:
        """What it is, from what it was made, and where it stands."""
        return run_card(describe_run(self.folder, self.status, with_settings=True))

    def logs(self, rank: int = 0, num_lines: int | None = None, *, life: int = 0) -> str:
        """What a rank printed: standard output and error together, in order; where torchrun's own flags (`--tee`,
        `--redirects`, `--log-dir`) say where that goes, what its agent printed.

        Args:
            num_lines: the last so many; None: all.
            life: of this launch; 0: of the newest.

        Raises:
            RunError: other ranks have printed, this one has not.
        """
        files = self.folder.life(life or self.life)
        file = files.log_of_agent_of(rank) if self._has_own_output() else files.output_file(rank)
        if not file.exists():
            there = sorted(int(path.stem.removeprefix("rank_")) for path in file.parent.glob("rank_*.log"))
            if there and self.ended:  # until then it may still begin
                found = "it has printed nothing"
                raise RunError(f"logs of rank {rank}", found, f"Ranks that have: {', '.join(map(str, there))}")
            return ""
        lines = read_end(file, MAX_OUTPUT_BYTES).splitlines()
        return "\n".join(lines if num_lines is None else lines[max(0, len(lines) - num_lines) :])

    def metrics(self, rank: int = 0) -> list[dict[str, Any]]:
        """The metrics lines of a rank, oldest first."""
        return self.folder.read_metrics(rank)

    def plot(self, *, scale: str = "linear") -> Picture:
        """The training curve."""
        return show_training(self, scale=scale)

    def dashboard(self) -> Dashboard:
        """Curves, the ranks' step times and memory, and a stop button; it follows the run to its end."""
        from biokit.view.dashboard import Dashboard

        return Dashboard(self)

    def stop(self, timeout_s: float = 60.0) -> str:
        """End the run: a training saves a checkpoint at the next step boundary.

        The STOP file asks for it, after `timeout_s` SIGTERM, after as long again SIGKILL ends the whole tree. A Slurm
        job is cancelled: at once where it is queued, else after `timeout_s`.

        Returns:
            The status that it ended with.

        Raises:
            EngineError: it is a Slurm job's, and Slurm is not on this machine.
            RunError: it still runs, and its supervisor is not on this host; or a time that is none.
        """
        if not 0 <= timeout_s < math.inf:
            raise RunError(f"stop {self.folder.path}", f"the time is {timeout_s} s", "Give seconds, 0 or more")
        job, status = find_job(self.folder), self.status
        if job is not None and status == "queued":
            cancel_job(self.folder, job, begun=False)
        elif status not in FINAL_STATES and not self._ended_within(timeout_s, asking=True):
            if job is not None:
                cancel_job(self.folder, job, begun=True)
                self._ended_within(timeout_s)
            else:
                self._signal_and_end(signal.SIGTERM, timeout_s)
            if self.alive:
                said = states.read_state(self.folder)
                host = f" on {said.host}" if said else ""
                found = f"it still runs after {timeout_s:g} s, and nobody on this host supervises it"
                raise RunError(f"stop {self.folder.path}", found, f"Wait longer, or end it{host}")
        return self.status

    def wait(self, timeout_s: float | None = None, *, show: bool = True) -> Run:
        """Return when the run has finished or was stopped; a line says every 1.5 s where it is.

        An interrupt (the stop square of a notebook) asks a training of this process to stop at the next step boundary,
        and it is waited for; a second one ends it at once. Another program of this process it ends at once. A run that
        does not belong to this process (detached, another notebook's, Slurm's) goes on.

        Raises:
            RunFailed: it failed, timed out or was interrupted, with the failure card.
            RunError: it still runs after `timeout_s` seconds.
            KeyboardInterrupt: the run was ended at once, or left.
        """
        owned = self.owned
        limit_s = math.inf if timeout_s is None else timeout_s
        try:
            follow(self, timeout_s=limit_s, show=show, stops=owned and self._saves())
        except KeyboardInterrupt:
            if owned and self.alive:
                self._signal_and_end(signal.SIGINT, AT_ONCE_S)
            raise
        return self

    def raise_on_failure(self) -> None:
        """Nothing where the run goes on, finished or was stopped.

        Raises:
            RunFailed: it ended otherwise.
        """
        status = self.status
        if status in FINAL_STATES and status not in ENDED_WELL:
            raise explain_end(self.folder, status, self.kind)

    def _saves(self) -> bool:
        """Whether it saves a checkpoint when it is asked to stop."""
        with contextlib.suppress(RunError):
            return read_order(self.folder).saves_on_sigterm
        return True  # nobody ordered it: `biokit train` by hand

    def _has_own_output(self) -> bool:
        with contextlib.suppress(RunError):
            return has_own_output(read_order(self.folder))
        return False

    def _ended_within(self, timeout_s: float, asking: bool = False) -> bool:
        end = time.monotonic() + timeout_s
        while self.alive:
            if asking:  # again and again: a training that just starts may clear an older STOP file
                self.folder.request_stop()
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True

    def _signal_and_end(self, number: signal.Signals, timeout_s: float) -> None:
        """Signal the supervisor on this host; what has not ended `timeout_s` seconds later is killed."""
        supervisor = find_supervisor(self.folder)
        if supervisor is None:
            return
        supervisor.send_signal(number)  # refuses where the id has gone to another process
        if not self._ended_within(timeout_s):
            end_tree(supervisor.pid, grace_s=0)
            note_interrupted(self.folder)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card._repr_mimebundle_()

    def __repr__(self) -> str:
        return f"Run({self.folder.path}: {read_state(self)})"


def start_run(
    folder: RunFolder, order: Order, detach: bool = False, *, variables: Mapping[str, str] | None = None
) -> Run:
    """Have an order carried out in a run folder, and return at once. A folder that had a run goes on counting lives.

    Args:
        detach: the run outlives this process; it ends by `stop` or its time limit.
        variables: what the environment of the run has beside this process's own; written nowhere.

    Raises:
        RunError: the folder cannot be made, or a run is alive in it.
    """
    start_order(folder, order, detach, variables)
    return Run(folder)


def start_training(
    config: RunConfig,
    num_processes: int = 1,
    *,
    num_nodes: int = 1,
    max_lives: int = 1,
    timeout_s: float = 0.0,
    detach: bool = False,
) -> Run:
    """Start `biokit train` on a configuration in processes of this machine, and return at once.

    Args:
        num_processes: on each node.
        num_nodes: torchrun's agents, one a node: those of the Slurm allocation that this process is in, where it has as
            many, else all of them on this machine.
        max_lives: launches in all: a run that failed is started again, and goes on from its newest checkpoint.
        timeout_s: of the whole run; 0: none.
        detach: the run outlives this process; it ends by `stop` or its time limit.

    Raises:
        ConfigError: an impossible layout, or `resume=false` with several lives; nothing was started.
        EngineError: more processes than CUDA devices.
        RunError: the run folder cannot be made, or a run is alive in it.
    """
    folder, placement = RunFolder(config.run_dir), jobs.choose_placement(num_nodes)
    order = training_order(
        config,
        folder,
        num_processes,
        num_nodes=num_nodes,
        placement=placement,
        max_lives=max_lives,
        timeout_s=timeout_s,
    )
    from biokit.launch.torchrun import check_devices

    check_devices(config, num_processes if placement == SLURM else num_nodes * num_processes)
    check_free(folder)
    write_atomically(asked_file(folder), config_to_yaml(config))
    return start_run(folder, order, detach)
