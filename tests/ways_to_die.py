"""Ways in which a run may end, tried with real kernels and papermill: what is left of its processes afterwards.

A process belongs to a trial when a variable of its environment has the trial's random value: whatever its name, its
session and its parent are by then. Ranks are plain Python, which starts faster than torch; where they wait for one
another it is torch that waits.

    python -m tests.ways_to_die FOLDER WAY...      tries these ways; FOLDER/faults.json: what was wrong, by way
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat
import psutil

from tests.kernel import REPOSITORY, Kernel, open_kernel

MARK, FAULTS = "BIOKIT_TRIAL_MARK", "faults.json"
LEFT_S = 10.0  # after which nothing may be left
READY_S = 120.0  # for the ranks of a trial to come up
REPLY_S = 20.0  # for a cell to end after it was interrupted, or lost its run
CELL_TIMEOUT_S = 15  # of papermill's cells, where that is the way; on a slow machine the ranks are still coming up

# what a rank does; {ready} is a path to which it adds its number
COMING_UP = """
import os, pathlib, signal, sys, time
pathlib.Path({ready!r} + os.environ["RANK"]).touch()
"""
LOOP = COMING_UP + "while True:\n    time.sleep(0.02)\n"
DEAF = "import signal\nfor number in (1, 2, 15):\n    signal.signal(number, signal.SIG_IGN)\n" + LOOP
FAILS = (
    COMING_UP
    + """
while os.environ["RANK"] == "0" or not os.path.exists({ready!r} + "go"):
    time.sleep(0.02)
raise ValueError("the trial's")
"""
)
STUCK = (
    "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
    + COMING_UP
    + "dist.barrier() if dist.get_rank() else time.sleep(600)\n"
)
IDLE = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + COMING_UP


@dataclass
class Trial:
    """One trial: its folder, the mark of its processes, and what was wrong."""

    folder: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    faults: list[str] = field(default_factory=list)
    num_left: int = 0
    done_at: float = 0.0

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of the first process has beside this one's; all others inherit it."""
        state = str(self.folder / "state")  # the list of runs
        return {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "XDG_STATE_HOME": state}

    def ready(self, name: str) -> str:
        """Path of the files by which the ranks of a program say that they are up."""
        return str(self.folder / f"ready_{name}_")

    def wait_ready(self, *names: str, num_ranks: int = 2, alive: Callable[[], bool] = lambda: True) -> None:
        """Until all ranks of these programs are up."""
        end = time.monotonic() + READY_S
        wanted = [Path(f"{self.ready(name)}{rank}") for name in names for rank in range(num_ranks)]
        while missing := [path.name for path in wanted if not path.exists()]:
            if time.monotonic() > end or not alive():
                self.faults.append(f"they did not come up: {', '.join(missing)}")
                return
            time.sleep(0.02)
        found = [process for process in self.list_left() if "biokit.launch.supervision.rank" in describe(process)]
        if len(found) < len(wanted):
            self.faults.append(f"{len(wanted)} ranks are up, and {len(found)} of them are seen")

    def begin_count(self) -> None:
        """The deed is done: the time runs."""
        self.done_at = time.monotonic()

    def check_left(self, spared: Collection[int] = (), limit_s: float = LEFT_S) -> None:
        """Note who is left that many seconds after the deed (else from now), and kill them."""
        end = (self.done_at or time.monotonic()) + limit_s
        self.done_at = 0.0
        while (left := self.list_left(spared)) and time.monotonic() < end:
            time.sleep(0.05)
        self.num_left += len(left)
        self.faults += [f"left after {limit_s:g} s: {process.pid} {describe(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def list_left(self, spared: Collection[int] = ()) -> list[psutil.Process]:
        """Living processes of this trial but these."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) not in spared:
                with contextlib.suppress(OSError, psutil.Error):  # empty for zombies, which are nobody any more
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(psutil.Process(int(folder.name)))
        return found


def describe(process: psutil.Process) -> str:
    """Its command line in short."""
    try:
        return " ".join(process.cmdline()[1:6])[:160]
    except psutil.Error:
        return "(gone)"


class TrialKernel:
    """A kernel of a trial, whose cells run while the trial goes on."""

    def __init__(self, trial: Trial, kernel: Kernel) -> None:
        self.trial, self.manager, self.client = trial, kernel.manager, kernel.client

    @property
    def pid(self) -> int:
        """Of the kernel's process."""
        return int(self.manager.provisioner.pid)  # type: ignore[union-attr]

    def begin(self, code: str) -> str:
        """Have a cell run; its message id."""
        return str(self.client.execute(code, allow_stdin=False))

    def end(self, message: str, timeout_s: float = REPLY_S) -> dict[str, Any]:
        """The reply of a cell; a fault, and empty, where it does not end in time."""
        end = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Empty):
            while (left := end - time.monotonic()) > 0:
                reply = self.client.get_shell_msg(timeout=left)
                if reply["parent_header"].get("msg_id") == message:
                    return dict(reply["content"])
        self.trial.faults.append(f"a cell did not end in {timeout_s:g} s")
        return {}

    def run(self, code: str, timeout_s: float = READY_S) -> None:
        """Run a cell that is to succeed."""
        reply = self.end(self.begin(code), timeout_s)
        while reply.get("status") == "aborted":  # what comes right after a failed cell is sent away
            reply = self.end(self.begin(code), timeout_s)
        if reply.get("status") != "ok":
            self.trial.faults.append(f"{code.splitlines()[0]}: {reply.get('ename')}: {reply.get('evalue')}")

    def expect_error(self, message: str, names: Collection[str] = ()) -> None:
        """The cell must fail, and the kernel go on."""
        reply = self.end(message)
        if reply and (reply.get("status") != "error" or (names and reply.get("ename") not in names)):
            self.trial.faults.append(f"the cell ended with {reply.get('status')} {reply.get('ename')}")
        self.run("assert 1 + 1 == 2")

    def restart(self) -> None:
        """As the button does."""
        self.manager.restart_kernel(now=False)
        self.client.wait_for_ready(timeout=READY_S)


@contextlib.contextmanager
def trial_kernel(trial: Trial) -> Iterator[TrialKernel]:
    """A kernel with biokit's magics; nothing of it may be left afterwards."""
    with open_kernel(trial.folder, **trial.variables) as kernel:
        yield TrialKernel(trial, kernel)
    trial.check_left()


def cell(trial: Trial, name: str, program: str, magic: str = "%%torchrun --nproc-per-node 2") -> str:
    """A cell whose ranks run a program."""
    return f"{magic}\n{program.format(ready=trial.ready(name))}"


# ---- the kernel goes on


def interrupt(trial: Trial, kernel: TrialKernel, program: str = LOOP) -> None:
    """The stop square while the ranks run a program in the foreground; a run in the background goes on."""
    name = secrets.token_hex(4)
    message = kernel.begin(cell(trial, name, program))
    trial.wait_ready(name)
    time.sleep(0.3)  # until those who wait do wait
    kernel.manager.interrupt_kernel()
    trial.begin_count()
    kernel.expect_error(message, ("KeyboardInterrupt",))
    trial.check_left([kernel.pid])


def interrupt_stuck(trial: Trial, kernel: TrialKernel) -> None:
    """... while they wait for a rank that never comes."""
    interrupt(trial, kernel, STUCK)


def interrupt_deaf(trial: Trial, kernel: TrialKernel) -> None:
    """... while they ignore SIGTERM."""
    interrupt(trial, kernel, DEAF)


def fail(trial: Trial, kernel: TrialKernel) -> None:
    """A rank raises while the other one goes on; in the foreground and in the background."""
    names = [secrets.token_hex(4) for _ in range(2)]
    kernel.run(cell(trial, names[0], FAILS, "%%torchrun --nproc-per-node 2 --bg"))
    message = kernel.begin(cell(trial, names[1], FAILS))
    trial.wait_ready(*names)
    for name in names:
        Path(f"{trial.ready(name)}go").touch()
    trial.begin_count()
    kernel.expect_error(message, ("RunFailed",))
    trial.check_left([kernel.pid])


def kill_inside(trial: Trial, kernel: TrialKernel, module: str) -> None:
    """SIGKILL to a part of two runs, one in the background whose ranks ignore SIGTERM, one in the foreground."""
    names = [secrets.token_hex(4) for _ in range(2)]
    kernel.run(cell(trial, names[0], DEAF, "%%torchrun --nproc-per-node 2 --bg"))
    message = kernel.begin(cell(trial, names[1], LOOP))
    trial.wait_ready(*names)
    for process in trial.list_left([kernel.pid]):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline()[:5]:
                process.kill()
    trial.begin_count()
    kernel.expect_error(message)
    trial.check_left([kernel.pid])


def kill_agent(trial: Trial, kernel: TrialKernel) -> None:
    """torchrun's agent is killed."""
    kill_inside(trial, kernel, "biokit.launch.supervision.agent")


def kill_supervisor(trial: Trial, kernel: TrialKernel) -> None:
    """The supervisor is killed."""
    kill_inside(trial, kernel, "biokit.launch.supervision.supervisor")


def interrupt_warm(trial: Trial, kernel: TrialKernel) -> None:
    """The stop square while warm ranks wait for one that never comes; then they are stopped."""
    name = secrets.token_hex(4)
    message = kernel.begin(cell(trial, name, STUCK.replace("time.sleep(600)", "None"), "%%ranks -n 2"))
    trial.wait_ready(name)
    kernel.manager.interrupt_kernel()
    kernel.expect_error(message, ("KeyboardInterrupt",))
    trial.begin_count()
    kernel.run("%ranks --stop")
    trial.check_left([kernel.pid])


# ---- the kernel ends


def kill_kernel(trial: Trial) -> None:
    """SIGKILL to the kernel: with a run in the background that ignores SIGTERM, warm ranks that do too, and a run in
    the foreground.
    """
    with trial_kernel(trial) as kernel:
        kernel.run(cell(trial, "deaf", DEAF, "%%torchrun --nproc-per-node 2 --bg"))
        kernel.run(cell(trial, "warm", IDLE, "%%ranks -n 2"))
        kernel.begin(cell(trial, "fore", LOOP))
        trial.wait_ready("deaf", "warm", "fore")
        os.kill(kernel.pid, signal.SIGKILL)
        trial.check_left()


def restart_kernel(trial: Trial) -> None:
    """The kernel is restarted."""
    with trial_kernel(trial) as kernel:
        kernel.run(cell(trial, "back", LOOP, "%%torchrun --nproc-per-node 2 --bg"))
        kernel.begin(cell(trial, "fore", LOOP))
        trial.wait_ready("back", "fore")
        old = kernel.pid
        kernel.restart()
        if kernel.pid == old:
            trial.faults.append("the kernel was not restarted")
        trial.check_left([kernel.pid])


# ---- papermill ends


def write_notebook(trial: Trial) -> Path:
    """One run in the background, one in the foreground, which do not end by themselves."""
    path = trial.folder / "runs.ipynb"
    sources = [
        f'run_dir = "{trial.folder / "run"}"  # folder',
        "%load_ext biokit",
        cell(trial, "back", LOOP, "%%torchrun --nproc-per-node 2 --bg"),
        cell(trial, "fore", LOOP),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


@contextlib.contextmanager
def running(
    trial: Trial, words: list[str], names: Sequence[str] = ("back", "fore")
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs the notebook; these runs are up."""
    with (trial.folder / "program.log").open("ab") as log:
        program = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=trial.folder,
            env={**os.environ, **trial.variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        trial.wait_ready(*names, alive=lambda: program.poll() is None)
        yield program
    finally:
        program.kill()
        program.wait()
        trial.check_left()


def end_papermill(trial: Trial, number: signal.Signals, words: Callable[[Path], list[str]]) -> None:
    """A signal to what runs the notebook."""
    with running(trial, words(write_notebook(trial))) as program:
        program.send_signal(number)
        trial.begin_count()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(LEFT_S)
        if program.poll() is None:
            trial.faults.append(f"it goes on after {number.name}")


def plain_papermill(notebook: Path) -> list[str]:
    """papermill's own command line."""
    return ["papermill", str(notebook), str(notebook.with_name("done.ipynb")), "--no-progress-bar"]


def biokit_notebook(notebook: Path) -> list[str]:
    """biokit's."""
    return ["biokit", "notebook", str(notebook), str(notebook.with_name("run"))]


def time_out(trial: Trial) -> None:
    """A cell takes longer than it may."""
    words = [*plain_papermill(write_notebook(trial)), "--execution-timeout", str(CELL_TIMEOUT_S)]
    with running(trial, words, names=()) as program:
        try:
            if program.wait(READY_S) == 0:
                trial.faults.append("the time-out passed for a success")
            trial.begin_count()
        except subprocess.TimeoutExpired:
            trial.faults.append("papermill goes on after the time-out")


WITH_KERNEL: dict[str, Callable[[Trial, TrialKernel], None]] = {
    "interrupt in a loop": interrupt,
    "interrupt in a collective": interrupt_stuck,
    "interrupt, SIGTERM ignored": interrupt_deaf,
    "interrupt in a collective of warm ranks": interrupt_warm,
    "a rank fails": fail,
    "agent SIGKILL": kill_agent,
    "supervisor SIGKILL": kill_supervisor,
}
ALONE: dict[str, Callable[[Trial], None]] = {
    "kernel SIGKILL": kill_kernel,
    "kernel restart": restart_kernel,
    "cell time-out": time_out,
    "papermill SIGTERM": lambda trial: end_papermill(trial, signal.SIGTERM, plain_papermill),
    "papermill SIGKILL": lambda trial: end_papermill(trial, signal.SIGKILL, plain_papermill),
    "biokit notebook SIGTERM": lambda trial: end_papermill(trial, signal.SIGTERM, biokit_notebook),
    "biokit notebook SIGKILL": lambda trial: end_papermill(trial, signal.SIGKILL, biokit_notebook),
}
WAYS = (*WITH_KERNEL, *ALONE)


def try_ways(ways: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """One trial of each, in a process of their own; what was wrong, by way. Those that spare the kernel share one."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.ways_to_die", str(folder), *ways]  # jupyter_client's loops
    with (folder / "said.log").open("wb") as said:
        done = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False)
    if done.returncode:
        end = (folder / "said.log").read_text(errors="replace")[-2000:]
        return {way: [f"it crashed: {end}"] for way in ways}
    return json.loads((folder / FAULTS).read_text())


def main(words: Sequence[str]) -> None:
    """Try ways, one after the other."""
    folder, faults = Path(words[0]), {}
    for number, way in enumerate(way for way in words[1:] if way in ALONE):
        trial = Trial(folder / f"alone_{number}")
        trial.folder.mkdir()
        ALONE[way](trial)
        faults[way] = trial.faults
    if shared := [way for way in words[1:] if way in WITH_KERNEL]:
        first = Trial(folder)
        with trial_kernel(first) as kernel:
            for way in shared:
                kernel.trial = replace(first, faults=[])
                WITH_KERNEL[way](kernel.trial, kernel)
                faults[way] = kernel.trial.faults
        faults[shared[-1]] += first.faults  # the kernel's own end
    (folder / FAULTS).write_text(json.dumps(faults, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
