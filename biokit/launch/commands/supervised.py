"""A training on this node under a supervisor in the foreground, with what its ranks print."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from biokit.config import RunConfig, config_to_yaml
from biokit.errors import ConfigError
from biokit.launch.facts import asked_file
from biokit.launch.orders import HERE, NODES, Order
from biokit.launch.output import OutputTail
from biokit.launch.started import complete_order
from biokit.launch.starting import prepare_folder
from biokit.launch.supervision.supervisor import supervise
from biokit.launch.torchrun import MPI, Nodes, check_devices, read_nodes
from biokit.launch.training_order import training_order
from biokit.runs import RunFolder, write_atomically

LOOK_S = 0.2  # between two looks at what the ranks print


def supervise_training(config: RunConfig, environment: Mapping[str, str], lives: int, timeout_s: float) -> int:
    """Carry out a training on this node in the foreground, with what its ranks print; see `supervise`.

    On several nodes every node's supervisor does its part; they meet in the run folder, which all must see.

    Raises:
        ConfigError: mpirun started this process beside others on its node.
        RunError: a run is alive in the folder.
    """
    if int(environment.get(f"{MPI}LOCAL_SIZE") or 1) > 1:
        found = "mpirun started this process as one of several on its node"
        raise ConfigError("--lives and --timeout", found, "Start one launcher a node, or leave them out")
    nodes = read_nodes(config, environment)
    folder = RunFolder(config.run_dir)
    order = _order(config, folder, nodes, environment, lives, timeout_s)
    if nodes.node_rank:  # node 0 shows what all ranks print
        folder.create()
        return supervise(folder, order, nodes.node_rank, in_terminal=True)
    order = complete_order(folder, order)
    prepare_folder(folder, order)
    write_atomically(asked_file(folder), config_to_yaml(config))
    tail = OutputTail(folder, labelled=nodes.num_nodes * nodes.num_processes > 1, first_life=folder.last_life() + 1)
    ended = threading.Event()
    shown = threading.Thread(target=_show_output, args=(tail, ended), daemon=True)
    shown.start()
    try:
        return supervise(folder, order, in_terminal=True)
    finally:
        ended.set()
        shown.join()


def _order(
    config: RunConfig, folder: RunFolder, nodes: Nodes, environment: Mapping[str, str], lives: int, timeout_s: float
) -> Order:
    check_devices(config, nodes.num_processes)
    alone = nodes.num_nodes == 1
    return training_order(
        config,
        folder,
        nodes.num_processes,
        num_nodes=nodes.num_nodes,
        placement=HERE if alone else NODES,
        endpoint="" if alone else nodes.endpoint,
        max_lives=lives,
        timeout_s=timeout_s,
        environment=environment,
    )


def _show_output(tail: OutputTail, ended: threading.Event) -> None:
    while not ended.wait(LOOK_S):
        tail.look()
    tail.look(ended=True)
