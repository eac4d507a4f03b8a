"""Starts the processes of a run: `biokit launch` on each node of a job, `run_processes` from a notebook.

Where to start how many is read from the environment, under the names of the source systems' scripts: GPUS_PER_NODE,
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. Under mpirun, OMPI_COMM_WORLD_* say it: with one process a node (as in
ProteinLM's scripts) that process is a node's launcher; with several a node (A4SFramework's) each is a rank already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biokit.config import RunConfig, config_to_yaml
from biokit.errors import ConfigError, EngineError, RunError
from biokit.launch.background import BackgroundRun, start_module
from biokit.layouts import find_layout
from biokit.parallel.grid import Layout
from biokit.process import choose_device
from biokit.runs import RunFolder

DEFAULT_PORT = 29500  # torchrun's own
MPI = "OMPI_COMM_WORLD_"
REPORT_S = 1.5  # between two progress lines
STOP_S = 5.0  # that a run has to end by its STOP file, and again by SIGTERM, before it is killed
TAIL_LINES = 6
RANK_OUTPUT = "ranks"  # folder under logs/: torchrun keeps what each rank prints there


@dataclass(frozen=True)
class Nodes:
    """Where this launcher stands among those of the job, and how many processes each of them starts."""

    num_nodes: int = 1
    node_rank: int = 0
    num_processes: int = 1
    master_addr: str = ""
    master_port: int = 0


@dataclass(frozen=True)
class Launch:
    """A command line that is ready to start, its additions to the environment, and the layout that it leads to.

    Attributes:
        port: where this process will wait for the others; 0: it does not, or finds one itself.
    """

    command: list[str]
    environment: dict[str, str]
    layout: Layout
    note: str
    port: int = 0

    def start(self) -> None:
        """Become that command; does not return.

        Raises:
            ConfigError: the port cannot be opened.
        """
        if self.port:
            check_port(self.port)
        os.execve(self.command[0], self.command, {**os.environ, **self.environment})

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def plan_launch(config: RunConfig, words: Sequence[str], environment: Mapping[str, str] = os.environ) -> Launch:
    """What `biokit launch` starts on this node; nothing is started.

    Args:
        words: the configuration's name and overrides, as `biokit train` takes them.

    Raises:
        ConfigError: an impossible layout, or a variable of the environment that cannot be right.
        EngineError: more processes than CUDA devices.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise ConfigError("biokit launch", "torchrun has started this process", "Give torchrun `-m biokit train ...`")
    arguments = ["train", *words]
    rank = read_mpi_rank(environment)
    if rank:
        layout = find_layout(config, int(rank["WORLD_SIZE"]))
        note = f"mpirun started one process a rank: this is rank {rank['RANK']}, and needs no torchrun."
        port = int(rank["MASTER_PORT"]) if rank["RANK"] == "0" else 0
        return Launch([sys.executable, "-m", "biokit", *arguments], rank | _threads(environment), layout, note, port)
    nodes = read_nodes(config, environment)
    layout = find_layout(config, nodes.num_nodes * nodes.num_processes)
    _check_devices(config, nodes.num_processes)
    mpi = f"{MPI}SIZE" in environment
    note = f"mpirun started one launcher a node: this is node {nodes.node_rank} of {nodes.num_nodes}." if mpi else ""
    port = 0 if nodes.node_rank else nodes.master_port
    return Launch(torchrun_command(nodes, arguments), _threads(environment), layout, note, port)


def check_port(port: int) -> None:
    """Open a port and give it back.

    Raises:
        ConfigError: another process has it, or this one may not open it.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as torch does: in use for either is in use
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended does not count
        try:
            probe.bind(("", port))  # and not listen: ranks of other nodes may be trying to connect
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            found = f"port {port} is {reason} on this machine"
            raise ConfigError(
                f"MASTER_PORT={port}", found, "Give another MASTER_PORT, the same on every node"
            ) from error


def torchrun_command(nodes: Nodes, arguments: Sequence[str], output_dir: Path | None = None) -> list[str]:
    """The command line that starts `biokit arguments...` in every process of this node.

    Args:
        nodes: one node without a port finds a free one by itself.
        output_dir: where what each rank prints is kept as well.
    """
    if nodes.num_nodes == 1 and not nodes.master_port:
        where = ["--standalone"]
    else:
        where = ["--nnodes", str(nodes.num_nodes), "--node-rank", str(nodes.node_rank)]
        where += ["--master-addr", nodes.master_addr or "localhost", "--master-port", str(nodes.master_port)]
    kept = ["--log-dir", str(output_dir), "--tee", "3"] if output_dir else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(nodes.num_processes)]
    return [*torchrun, *kept, "-m", "biokit", *arguments]


def read_nodes(config: RunConfig, environment: Mapping[str, str]) -> Nodes:
    """How many processes to start where, as the environment says.

    Raises:
        ConfigError: a value that is not a number in its range, or what several nodes need is missing.
    """
    mpi_size = _number(environment, f"{MPI}SIZE", 1)
    num_nodes = _number(environment, "NNODES", 1) or mpi_size or 1
    if mpi_size and num_nodes != mpi_size:
        found = f"{MPI}SIZE={mpi_size}: mpirun started as many launchers"
        raise ConfigError(f"NNODES={num_nodes}", found, "Leave NNODES out, or start one launcher a node")
    name = "NODE_RANK" if environment.get("NODE_RANK") or not mpi_size else f"{MPI}RANK"
    node_rank = _number(environment, name, 0, num_nodes - 1)
    address, port = environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT", 1, 65535)
    if num_nodes > 1 and (node_rank is None or not address or not port):
        missing = {"NODE_RANK": node_rank is None, "MASTER_ADDR": not address, "MASTER_PORT": not port}
        found = f"{', '.join(name for name, absent in missing.items() if absent)} not set"
        raise ConfigError(f"NNODES={num_nodes}", found, "Give each node its NODE_RANK, and all a free port of node 0")
    num_processes = _number(environment, "GPUS_PER_NODE", 1) or _default_processes(config)
    return Nodes(num_nodes, node_rank or 0, num_processes, address, port or 0)


def read_mpi_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a process that mpirun started as one of several on a node; else empty.

    Raises:
        ConfigError: a value that is not a number in its range, or what several nodes need is missing.
    """
    size, local_size = _number(environment, f"{MPI}SIZE", 1), _number(environment, f"{MPI}LOCAL_SIZE", 1)
    if not size or not local_size or local_size == 1:
        return {}
    rank = _number(environment, f"{MPI}RANK", 0, size - 1)
    local_rank = _number(environment, f"{MPI}LOCAL_RANK", 0, local_size - 1)
    asked = f"{MPI}SIZE={size}"
    if rank is None or local_rank is None:
        raise ConfigError(asked, f"{MPI}RANK or {MPI}LOCAL_RANK is not set", "Start by mpirun")
    per_node = _number(environment, "GPUS_PER_NODE", 1)
    if per_node not in (None, local_size):
        found = f"{MPI}LOCAL_SIZE={local_size}: mpirun started as many on this node"
        raise ConfigError(f"GPUS_PER_NODE={per_node}", found, "Leave it out, or start one launcher a node")
    address, port = environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT", 1, 65535)
    if size > local_size and not (address and port):
        found = f"{size - local_size} of them on other nodes, and MASTER_ADDR or MASTER_PORT not set"
        raise ConfigError(asked, found, "Give every process the same two: mpirun -x MASTER_ADDR -x MASTER_PORT")
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_PORT": port or DEFAULT_PORT}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": address or "localhost"}


def run_processes(config: RunConfig, num_processes: int, timeout_s: float) -> dict[str, Any]:
    """Train in `num_processes` processes of this machine and wait; prints a line of progress every 1.5 s.

    Everything that the processes print is in the run folder's `logs/`. An interrupt, or the time-out, ends them all.

    Returns:
        The run's manifest.

    Raises:
        ConfigError: an impossible layout; nothing was started.
        EngineError: more processes than CUDA devices.
        RunError: a process failed (with its last lines), or the run did not end in `timeout_s` seconds.
    """
    find_layout(config, num_processes)
    _check_devices(config, num_processes)
    folder = RunFolder(config.run_dir)
    folder.create()
    asked = folder.logs / "config_asked.yaml"
    asked.write_text(config_to_yaml(config), encoding="utf-8")
    output_dir = folder.logs / RANK_OUTPUT / f"{time.time_ns()}"
    command = torchrun_command(Nodes(num_processes=num_processes), ["train", str(asked)], output_dir=output_dir)
    run = start_module(folder, command[2], command[3:], _threads(os.environ))
    try:
        _watch(run, num_processes, timeout_s)
    except BaseException:
        run.stop(STOP_S)
        raise
    if run.poll():
        raise RunError(
            f"run {folder.path}",
            f"{_explain(run, output_dir)}\n",
            f"Mend the cause and start it again; all that the processes said is in {run.log_file}",
        )
    return folder.read_manifest()


def _watch(run: BackgroundRun, num_processes: int, timeout_s: float) -> None:
    """Return when the run has ended, however it ended."""
    end = time.monotonic() + timeout_s
    due = 0.0
    while run.alive:
        now = time.monotonic()
        if now >= end:
            found = f"it did not end in {timeout_s:g} s, and was ended"
            raise RunError(f"run {run.folder.path}", found, "Give more time; it goes on from its last checkpoint")
        if now >= due:
            print(_progress(run, num_processes), flush=True)
            due = now + REPORT_S
        time.sleep(0.1)


def _progress(run: BackgroundRun, num_processes: int) -> str:
    lines = [line for line in run.folder.read_metrics() if line["time"] >= run.started]
    elapsed = f"{time.time() - run.started:4.0f} s  "
    if not lines:
        return f"{elapsed}starting {num_processes} process{'es' if num_processes > 1 else ''}"
    last = lines[-1]
    return f"{elapsed}step {last['step']}: loss {last['loss']:.4f}, {last['tokens_per_s']:,.0f} tokens/s"


def _explain(run: BackgroundRun, output_dir: Path) -> str:
    """The last error lines of the ranks that failed by themselves; not of those that only failed with them.

    A rank that failed first may be ended by torchrun (-15) before it could exit, when another one noticed.
    """
    codes = {int(rank): int(code) for rank, code in _EXIT_LINE.findall(run.log_tail(num_lines=200))}
    said = {rank: _last_lines(output_dir, rank) for rank in sorted(codes)}
    failed = [rank for rank in said if codes[rank] != -signal.SIGTERM]
    first = [rank for rank in failed if "See the error of" not in said[rank]]
    ended = [rank for rank in said if said[rank].startswith("biokit: ") and said[rank] != "biokit: interrupted"]
    causes = first or [rank for rank in ended if rank not in failed] or failed
    if not causes:
        return f"torchrun ended with exit code {run.poll()}; the end of its log:\n{run.log_tail()}"
    return "\n".join(
        f"rank {rank} failed with exit code {codes[rank]}:\n{said[rank] or '(it said nothing)'}" for rank in causes
    )


def _last_lines(output_dir: Path, rank: int) -> str:
    """What a rank said about its end: the line for a user's mistake, or the end of its error output."""
    lines = [
        line
        for path in output_dir.glob(f"*/attempt_*/{rank}/stderr.log")
        for line in path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    ]
    if lines and lines[-1].startswith("biokit: "):
        return lines[-1]
    return "\n".join(lines[-TAIL_LINES:])


_EXIT_LINE = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*:\s*(-?\d+)")  # torchrun's summary


def _number(environment: Mapping[str, str], name: str, low: int, high: int | None = None) -> int | None:
    """A whole number between two bounds, both allowed; None where the variable is not set."""
    text = environment.get(name, "")
    if not text:
        return None
    with contextlib.suppress(ValueError):
        number = int(text)
        if low <= number and (high is None or number <= high):
            return number
    valid = f"{low} or more" if high is None else f"{low} to {high}"
    raise ConfigError(f"{name}={text}", "it is not a number that can be", f"Valid: {valid}")


def _default_processes(config: RunConfig) -> int:
    """One, or one a CUDA device where the strategy can use them."""
    import torch

    on_cuda = choose_device(config.train.device).type == "cuda"
    return torch.cuda.device_count() if on_cuda and config.strategy != "Single" else 1


def _check_devices(config: RunConfig, num_processes: int) -> None:
    import torch

    if choose_device(config.train.device).type == "cuda" and num_processes > torch.cuda.device_count():
        found = f"this node has {torch.cuda.device_count()} CUDA devices"
        raise EngineError(f"{num_processes} processes", found, "Start as many as devices, or give train.device=cpu")


def _threads(environment: Mapping[str, str]) -> dict[str, str]:
    """One thread a process, as torchrun would set with a warning; `train.num_threads` decides for the training."""
    return {} if environment.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": "1"}
