"""Launching against bare torchrun and accelerate's `notebook_launcher`: wall seconds, all on this machine.

    first step      from the moment a cell is sent (a command is started) until rank 0 of two has averaged the
                    gradients of a first step; the step is the same few lines for everybody
    cold, warm      the first cell of a new kernel, and the second one
    output delay    from a rank's `print` until the text has reached who shows the notebook
    dashboard       CPU seconds of a training that a dashboard in another process follows, over those of the same
                    training while that dashboard follows another run: what a busy neighbour costs falls on both

The kernels themselves are running before the clock starts. `notebook_launcher` forks the kernel, so that torch is there
already; the price is that CUDA must not have been touched before.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from biokit.config import RunConfig, config_to_yaml
from biokit.launch.torchrun import node_commands
from biokit.runs import RunFolder
from biokit.view.dashboard import show_dashboard
from biokit.view.training import read_state
from tests.bench.timing import Row, compare_times
from tests.distributed import free_port
from tests.kernel import CellOutput, Kernel, open_kernel
from tests.small_run import small_config

HAVE_ACCELERATE = importlib.util.find_spec("accelerate") is not None
NO_ACCELERATE = "not measured: accelerate is not installed (`make bench` installs it)"
STEP = """\
import os, time, pathlib, torch, torch.distributed as dist
if not dist.is_initialized():
    dist.init_process_group("gloo")
model = torch.nn.Linear(8, 8)
model(torch.ones(4, 8)).sum().backward()
for weight in model.parameters():
    dist.all_reduce(weight.grad)
if dist.get_rank() == 0:
    pathlib.Path({stamp!r}).write_text(repr(time.time()))
"""
PRINTS = """\
import os, time
for _ in range({lines}):
    if os.environ["RANK"] == "0":
        print("printed", repr(time.time()), flush=True)
    time.sleep(0.05)
"""
BARE = [sys.executable, "-m", "torch.distributed.run"]
TRAIN_S = 240.0
MOST_S = 1.0  # of a second cell in warm ranks

Times = dict[str, list[float]]


def measure_first_steps(rounds: int = 5) -> list[Row]:
    """Two ranks of one machine, from a cell and from a shell."""
    found: Times = {}
    with tempfile.TemporaryDirectory() as name:
        stamp = Path(name) / "stamp"
        for _ in range(rounds):
            _note(found, "bare", _time_command(stamp, Path(name)))
            with open_kernel(Path(name), **_state_home(name)) as kernel:
                kernel.run("%load_ext biokit")
                for cell in ("torchrun cold", "torchrun warm"):
                    _note(found, cell, _time_cell(kernel, "%%torchrun --nproc-per-node 2\n{body}", stamp))
                for cell in ("ranks cold", "ranks warm"):
                    _note(found, cell, _time_cell(kernel, "%%ranks -n 2\n{body}", stamp))
            if HAVE_ACCELERATE:
                with open_kernel(Path(name), **_state_home(name)) as kernel:
                    for cell in ("accelerate cold", "accelerate warm"):
                        _note(found, cell, _time_cell(kernel, ACCELERATE, stamp))
    return _compare_first_steps(found)


def measure_nodes(rounds: int = 3) -> list[Row]:
    """A training on two nodes that are both this machine, from two commands to the first line of its metrics."""
    found: Times = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for who in ("ours", "bare"):
                config = _training(Path(name), f"{who}_{number}", 3)
                _note(found, who, _time_nodes(config, Path(name), ours=who == "ours"))
    what, peer = "two nodes on loopback, supervised: commands to first step", "two torchrun agents, nobody supervises"
    return [compare_times(what, peer, found["ours"], found["bare"])]


def measure_delay(num_lines: int = 40) -> list[Row]:
    """Of each printed line, in a cell of two ranks."""
    with tempfile.TemporaryDirectory() as name:
        with open_kernel(Path(name), **_state_home(name)) as kernel:
            kernel.run("%load_ext biokit")
            ours = _delays(kernel, "%%torchrun --nproc-per-node 2\n{body}", num_lines)
        theirs = []
        if HAVE_ACCELERATE:
            with open_kernel(Path(name), **_state_home(name)) as kernel:
                theirs = _delays(kernel, ACCELERATE, num_lines)
    what, peer = "output delay of a line, `%%torchrun`", "`notebook_launcher`"
    if not theirs:
        return [Row(what, peer, ours=_ms(ours), theirs=NO_ACCELERATE)]
    ratio = f"{statistics.median(ours) / statistics.median(theirs):.2f}x"
    return [Row(what, peer, _ms(ours), _ms(theirs), ratio, f"at most {1e3 * max(ours):,.0f} ms")]


def measure_dashboard(rounds: int = 5, num_steps: int = 150) -> list[Row]:
    """What a dashboard costs the training that it follows."""
    found: Times = {}
    with tempfile.TemporaryDirectory() as name:
        other = RunFolder(_training(Path(name), "other", num_steps).run_dir)
        for number in range(rounds + 1):
            for who in ("followed", "alone"):
                config = _training(Path(name), f"{who}_{number}", num_steps)
                own = RunFolder(config.run_dir)
                _note(found, who, _cpu_seconds(config, Path(name), own if who == "followed" else other))
                other = own
    row = compare_times(
        f"CPU time of a training of {num_steps} steps that a dashboard follows", "it follows another one",
        found["followed"][1:], found["alone"][1:], target=1.05,
    )  # fmt: skip
    return [row]


def measure_all() -> list[Row]:
    return [*measure_first_steps(), *measure_nodes(), *measure_delay(), *measure_dashboard()]


ACCELERATE = """\
from accelerate import notebook_launcher
def body():
{indented}
notebook_launcher(body, num_processes=2, use_port="{port}")
"""


def _compare_first_steps(found: Times) -> list[Row]:
    bare, launcher = "bare torchrun, from a shell", "`notebook_launcher`"
    rows = [
        compare_times("`%%torchrun`: cell to first step, cold", bare, found["torchrun cold"], found["bare"]),
        compare_times("`%%torchrun`: cell to first step, warm", bare, found["torchrun warm"], found["bare"]),
        compare_times("`%%ranks`: cell to first step, cold", bare, found["ranks cold"], found["bare"]),
    ]
    for cell in ("cold", "warm"):
        for magic in ("torchrun", "ranks"):
            what, peer = f"`%%{magic}`: cell to first step, {cell}", f"{launcher}, {cell}"
            if HAVE_ACCELERATE:
                rows.append(compare_times(what, peer, found[f"{magic} {cell}"], found[f"accelerate {cell}"]))
            else:
                rows.append(Row(what, peer, NO_ACCELERATE))
    warm = statistics.median(found["ranks warm"])
    rows.append(
        Row("`%%ranks`: second cell", "a second", _ms(found["ranks warm"]), f"{MOST_S:g} s", f"{warm / MOST_S:.2f}x",
            target=f"at most {MOST_S:g} s", met=warm <= MOST_S)
    )  # fmt: skip
    return rows


def _note(found: Times, name: str, seconds: float) -> None:
    found.setdefault(name, []).append(seconds)


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.1f} ms"


def _state_home(folder: str) -> dict[str, str]:
    return {"XDG_STATE_HOME": f"{folder}/state"}


def _fill(cell: str, body: str) -> str:
    return cell.format(port=free_port(), body=body, indented="\n".join(f"    {line}" for line in body.splitlines()))


def _time_cell(kernel: Kernel, cell: str, stamp: Path) -> float:
    """Seconds from the cell to the first step; waits for the end of the cell."""
    stamp.unlink(missing_ok=True)
    code, sent = _fill(cell, STEP.format(stamp=str(stamp))), time.time()
    output = kernel.run(code)
    if output.status != "ok":
        raise RuntimeError(f"{code}\n{output.text}\n{output.error}")
    return float(stamp.read_text()) - sent


def _time_command(stamp: Path, folder: Path) -> float:
    script = folder / "step.py"
    script.write_text(STEP.format(stamp=str(stamp)) + "dist.destroy_process_group()\n")
    stamp.unlink(missing_ok=True)
    started = time.time()
    subprocess.run([*BARE, "--standalone", "--nproc-per-node", "2", str(script)], check=True, capture_output=True)
    return float(stamp.read_text()) - started


def _training(folder: Path, run: str, num_steps: int) -> RunConfig:
    config = small_config(folder, run, device="cpu", train_iters=num_steps, eval_molecules=0)
    config.strategy = "DDP"
    (folder / f"{run}.yaml").write_text(config_to_yaml(config))
    return config


def _asked(config: RunConfig) -> str:
    return f"{config.run_dir}.yaml"


def _time_nodes(config: RunConfig, folder: Path, ours: bool) -> float:
    """Seconds from two commands to the first step."""
    port = free_port()
    if ours:
        lines = node_commands([_asked(config)], 2, 1, "127.0.0.1", port, ["--lives", "1"])
        commands = [shlex.split(line) for line in lines]
    else:
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        where += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "bare", "--local-addr", "127.0.0.1"]
        commands = [[*BARE, *where, "-m", "biokit", "train", _asked(config)]] * 2
    started = time.time()
    both = [
        subprocess.Popen(
            command, env={**os.environ, **_state_home(str(folder))},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )
        for command in commands
    ]  # fmt: skip
    codes = [process.wait(TRAIN_S) for process in both]
    if any(codes):
        raise RuntimeError(f"a training on two nodes ended with {codes}")
    return RunFolder(config.run_dir).read_metrics()[0]["time"] - started


def _delays(kernel: Kernel, cell: str, num_lines: int) -> list[float]:
    """Seconds from each print to its arrival."""
    delays: list[float] = []

    def look(output: CellOutput) -> None:
        whole = output.text[: output.text.rfind("\n") + 1]
        printed = [float(number) for number in re.findall(r"printed ([\d.]+)", whole)]
        delays.extend(time.time() - at for at in printed[len(delays) :])

    output = kernel.run(_fill(cell, PRINTS.format(lines=num_lines)), look)
    if len(delays) < num_lines:
        raise RuntimeError(f"{len(delays)} of {num_lines} lines came:\n{output.text}\n{output.error}")
    return delays


def _cpu_seconds(config: RunConfig, folder: Path, followed: RunFolder) -> float:
    """Of a training in a process of its own, and its children, while a dashboard follows some run."""
    command = [sys.executable, "-m", "biokit", "train", _asked(config), "strategy=Single"]
    environment = {**os.environ, **_state_home(str(folder))}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        started = time.perf_counter()
        if followed.metrics_file().exists():
            show_dashboard(followed, read_state(followed))
        time.sleep(0.1 + 4 * (time.perf_counter() - started))  # a dashboard draws a fifth of the time
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the training ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime
