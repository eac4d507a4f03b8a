"""Which agents a life of a run has on this machine, and their command lines."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from biokit.errors import ConfigError
from biokit.launch.orders import GIVEN, HERE, NODES, SLURM, Order, flag_name, has_own_output
from biokit.launch.rendezvous import find_local_address, rendezvous_flags
from biokit.launch.slurm.srun import check_nodes, end_steps, srun_command
from biokit.runs import LifeFolder

NO_PYTHON = "--no-python"


@dataclass(frozen=True)
class Agent:
    """A process that the supervisor starts for a life: torchrun's agent of a node, the only rank itself, or srun.

    Attributes:
        tells_its_end: the agent file of its node is its own word (srun starts another process that writes one).
    """

    node: int
    command: list[str]
    is_rank: bool = False
    tells_its_end: bool = True


def place_agents(order: Order, life: LifeFolder, number: int, node_rank: int = 0) -> list[Agent]:
    """The agents to start on this machine for a life.

    Args:
        number: of the life, counted from 1.
        node_rank: of this machine's supervisor, for the placement `nodes`.
    """
    if not order.torchrun and order.placement == HERE and order.num_nodes == 1:
        command = [sys.executable, "-u", "-m", "biokit.launch.supervision.rank", *rank_words(order, life)]
        return [Agent(node_rank, command, is_rank=True)]
    if order.placement == GIVEN:
        return [Agent(node_rank, agent_command(order, life, node_rank, ()))]
    if order.placement == HERE and order.num_nodes == 1:
        return [Agent(0, agent_command(order, life, 0, ["--standalone"]))]
    if order.placement == HERE:
        where = f"127.0.0.1:{free_port()}"
        return [_place_agent(order, life, number, node, where) for node in range(order.num_nodes)]
    if order.placement == NODES:
        return [_place_agent(order, life, number, node_rank, order.endpoint)]
    if order.placement == SLURM:
        run_dir = life.path.absolute().parents[1]
        check_nodes(number)
        end_steps(run_dir)
        return [Agent(0, srun_command(order, run_dir, number), tells_its_end=False)]
    do = "Give `here`, `given`, `nodes` or `slurm`"
    raise ConfigError(f"placement {order.placement!r}", "there is none of this name on one machine", do)


def agent_command(order: Order, life: LifeFolder, node: int, rendezvous: Sequence[str]) -> list[str]:
    """The command line of torchrun's agent on a node."""
    flags = [flag for flag in order.torchrun if flag_name(flag) != NO_PYTHON]
    ranks = ["-m", "biokit.launch.supervision.rank", *rank_words(order, life)]
    return [
        sys.executable,
        "-m",
        "biokit.launch.supervision.agent",
        str(life.path),
        str(node),
        *rendezvous,
        *flags,
        *ranks,
    ]


def rank_words(order: Order, life: LifeFolder) -> list[str]:
    """What `biokit.launch.supervision.rank` is given: where it writes, how, and the program."""
    switches = ["--keep-output"] if has_own_output(order) else []
    switches += ["--exec"] if NO_PYTHON in map(flag_name, order.torchrun) else []
    return [*switches, str(life.path.absolute()), *order.program]


def free_port() -> int:
    """A port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _place_agent(order: Order, life: LifeFolder, number: int, node: int, endpoint: str) -> Agent:
    """The agent of one of several nodes."""
    run_id, address = f"{_run_name(life.path)}-{number}", find_local_address(endpoint)
    where = rendezvous_flags(order.num_nodes, node, endpoint, run_id, address)
    return Agent(node, agent_command(order, life, node, where))


def _run_name(life_path: Path) -> str:
    return life_path.absolute().parents[1].name
