"""What `biokit launch` becomes on each node of a job: torchrun, or one of the ranks that mpirun started.

Where to start how many is read from the environment, under the names of the source systems' scripts: GPUS_PER_NODE,
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. Under mpirun, OMPI_COMM_WORLD_* say it: with one process a node (as in
ProteinLM's scripts) that process is a node's launcher; with several a node (A4SFramework's) each is a rank already.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from biokit.config import RunConfig
from biokit.errors import ConfigError, EngineError
from biokit.launch.rendezvous import check_port, find_local_address, network_variables, rendezvous_flags
from biokit.layouts import find_layout
from biokit.parallel.grid import Layout
from biokit.process import choose_device

DEFAULT_PORT = 29500  # torchrun's own
MPI = "OMPI_COMM_WORLD_"


@dataclass(frozen=True)
class Nodes:
    """Where this launcher stands among those of the job, and how many processes each of them starts."""

    num_nodes: int = 1
    node_rank: int = 0
    num_processes: int = 1
    master_addr: str = ""
    master_port: int = 0

    @property
    def endpoint(self) -> str:
        """Where they meet, `host:port`; empty for one node that finds a port by itself."""
        return f"{self.master_addr or 'localhost'}:{self.master_port}" if self.master_port else ""


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
        return Launch([sys.executable, "-m", "biokit", *arguments], rank | one_thread(environment), layout, note, port)
    nodes = read_nodes(config, environment)
    layout = find_layout(config, nodes.num_nodes * nodes.num_processes)
    check_devices(config, nodes.num_processes)
    mpi = f"{MPI}SIZE" in environment
    note = f"mpirun started one launcher a node: this is node {nodes.node_rank} of {nodes.num_nodes}." if mpi else ""
    port = 0 if nodes.node_rank else nodes.master_port
    address = find_local_address(nodes.endpoint) if nodes.num_nodes > 1 else ""
    command = torchrun_command(nodes, arguments, Path(config.run_dir).name, address)
    variables = one_thread(environment) | network_variables(address, environment)
    return Launch(command, variables, layout, note, port)


def torchrun_command(nodes: Nodes, arguments: Sequence[str], run_id: str, local_addr: str = "") -> list[str]:
    """The command line that starts `biokit arguments...` in every process of this node.

    Args:
        nodes: one node without a port finds a free one by itself.
        run_id: of the run, the same on all nodes.
        local_addr: under which the other nodes reach this one.
    """
    where = ["--standalone"]
    if nodes.endpoint:
        where = rendezvous_flags(nodes.num_nodes, nodes.node_rank, nodes.endpoint, run_id, local_addr)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(nodes.num_processes)]
    return [*torchrun, "-m", "biokit", *arguments]


def node_commands(
    config_words: Sequence[str],
    num_nodes: int,
    nproc_per_node: int,
    address: str,
    port: int = DEFAULT_PORT,
    further: Sequence[str] = (),
) -> list[str]:
    """The command line to start on each node, quoted for a shell.

    Args:
        config_words: the configuration's name and overrides, as `biokit train` takes them.
        address: of node 0, as every node reaches it; `port`: a free one there.
        further: flags of `biokit launch`.
    """
    where = ["--nnodes", str(num_nodes), "--nproc-per-node", str(nproc_per_node)]
    where += ["--master-addr", address, "--master-port", str(port), *further]
    start = [sys.executable, "-m", "biokit", "launch", *config_words]
    return [shlex.join([*start, *where, "--node-rank", str(node)]) for node in range(num_nodes)]


def list_node_commands(
    config: RunConfig, words: Sequence[str], environment: Mapping[str, str], further: Sequence[str] = ()
) -> list[str]:
    """`node_commands` for the nodes that the environment tells of.

    Raises:
        ConfigError: an impossible layout, a variable that cannot be right, or no MASTER_ADDR.
    """
    defaults = {"MASTER_PORT": str(DEFAULT_PORT), **environment, "NODE_RANK": "0"}
    nodes = read_nodes(config, {name: value for name, value in defaults.items() if not name.startswith(MPI)})
    find_layout(config, nodes.num_nodes * nodes.num_processes)
    sizes = (nodes.num_nodes, nodes.num_processes)
    return node_commands(words, *sizes, nodes.master_addr or "localhost", nodes.master_port, further)


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


def check_devices(config: RunConfig, num_processes: int) -> None:
    """Refuse more processes than this machine has devices of the kind that is asked for.

    Raises:
        EngineError: more processes than CUDA devices, or CUDA asked for where there is none.
    """
    import torch

    if choose_device(config.train.device).type == "cuda" and num_processes > torch.cuda.device_count():
        found = f"this node has {torch.cuda.device_count()} CUDA devices"
        raise EngineError(f"{num_processes} processes", found, "Start as many as devices, or give train.device=cpu")


def one_thread(environment: Mapping[str, str]) -> dict[str, str]:
    """One thread a process, as torchrun would set with a warning; `train.num_threads` decides for the training."""
    return {} if environment.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": "1"}
