"""Ways in which a run may end, tried with real kernels and papermill: what is left of its processes afterwards.

Ranks are plain Python, which starts faster than torch; where they wait for one another it is torch that waits.

    python -m tests.ways_to_die FOLDER WAY...      tries these ways; FOLDER/faults.json: what was wrong, by way
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil

from tests.kernel import REPOSITORY
from tests.orphans import LEFT_S, READY_S, Trial, TrialKernel, trial_kernel

FAULTS = "faults.json"
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
