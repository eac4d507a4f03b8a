"""The agents of a run on the nodes of a Slurm allocation: one srun a life, one agent a node."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from biokit.errors import BiokitError, EngineError, RunError
from biokit.launch.orders import Order
from biokit.launch.rendezvous import first_free_port
from biokit.launch.slurm.jobs import ask_slurm, has_nodes
from biokit.launch.slurm.sbatch import CONTAINER_VARIABLE, SRUN_VARIABLE

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below those that systems give to outgoing connections
STEP_END_S = 30.0  # in which what an earlier life left on other nodes has to be gone


def srun_command(order: Order, run_dir: Path, number: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command line that starts the agents of a life on all its nodes, at a port that no other life has had.

    Args:
        number: of the life, counted from 1.

    Raises:
        EngineError: this process is not inside an allocation of so many nodes.
        RunError: Slurm does not say where its first node is.
    """
    asked = f"a run on {order.num_nodes} nodes by srun"
    if environment.get(CONTAINER_VARIABLE) and shutil.which("srun") is None:
        do = "Bind Slurm's commands into it (srun, scontrol, squeue, scancel; their libraries, munge's socket)"
        raise EngineError(asked, "srun is not in the container of the site file", do)
    if not has_nodes(order.num_nodes, environment):
        found = "this process is not inside a Slurm allocation of so many, or srun is not here"
        do = "Submit it with `biokit submit --nodes`, or get an allocation first"
        raise EngineError(asked, found, do)
    hosts = ask_slurm(["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]], "list the nodes").split()
    nodes = hosts[: order.num_nodes]
    options = [
        f"--nodes={order.num_nodes}",
        f"--ntasks={order.num_nodes}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}",
        "--kill-on-bad-exit=1",
        "--overlap",  # with the step that this process itself is in
        "--input=none",
        f"--job-name={step_name(run_dir)}",
    ]
    if _binds_tasks():
        options.append("--cpu-bind=none")  # the one task of a node is the parent of all its ranks
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        options.append(f"--cpus-per-task={cpus}")  # srun does not take it over by itself from 22.05 on
    endpoint = f"{find_address(nodes[0])}:{_choose_port(nodes[0], run_dir, number, environment)}"
    container = shlex.split(environment.get(CONTAINER_VARIABLE, ""))
    python = [*container, sys.executable, "-u", "-m", "biokit.launch.slurm.node"]
    extra = shlex.split(environment.get(SRUN_VARIABLE, ""))
    return ["srun", *options, *extra, *python, str(run_dir.absolute()), str(number), endpoint]


def find_address(node: str) -> str:
    """Where a node is reached: its name need not mean anything to the system.

    Raises:
        RunError: Slurm does not say.
    """
    said = ask_slurm(["scontrol", "show", "node", "--oneliner", node], f"address of node {node}")
    found = re.search(r"\bNodeAddr=(\S+)", said)
    if not found:
        raise RunError(f"address of node {node}", "`scontrol show node` does not say it", "Look at the node's state")
    return found[1]


def end_steps(run_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
    """End what an earlier life of this run may have left on the nodes of this allocation, and wait for its end.

    An srun that was killed leaves its tasks behind.

    Raises:
        RunError: Slurm refuses, or they are still there after `STEP_END_S` seconds.
    """
    job_id, end = environment["SLURM_JOB_ID"], time.monotonic() + STEP_END_S
    while steps := _list_steps(job_id, step_name(run_dir)):
        if time.monotonic() > end:
            found = f"steps {', '.join(steps)} of an earlier life have not ended in {STEP_END_S:g} s"
            raise RunError(f"run {run_dir}", found, f"Look at them: squeue --steps --jobs={job_id}")
        for step in steps:
            ask_slurm(["scancel", step], f"end step {step}", fails="")
        time.sleep(0.5)


def find_lost_node(environment: Mapping[str, str] = os.environ) -> str:
    """Why the other nodes of this allocation do not all answer; empty: they do. Slurm itself notices minutes later."""
    count = environment.get("SLURM_JOB_NUM_NODES", "1")
    if count == "1":
        return ""
    options = [f"--jobid={environment.get('SLURM_JOB_ID', '')}", f"--nodes={count}", f"--ntasks={count}"]
    options += ["--ntasks-per-node=1", "--overlap", "--input=none", "--kill-on-bad-exit=1"]
    try:
        ask_slurm(["srun", *options, "true"], "reach all nodes")
    except BiokitError as error:
        return error.found
    return ""


def check_nodes(number: int) -> None:
    """Nothing, where a life may begin; asked before all but a run's first.

    Raises:
        RunError: a node has gone, and took the life before with it.
    """
    if number > 1 and (lost := find_lost_node()):
        raise RunError(
            f"life {number}", f"a node does not answer: {lost}", "Submit it again; it goes on from its checkpoint"
        )


def step_name(run_dir: Path) -> str:
    """Name of a run's steps: the same in all its lives, and no other run's."""
    return f"biokit-{hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:12]}"


def _binds_tasks() -> bool:
    """Whether this cluster knows the binding of tasks; where it does not, srun says so at every start."""
    said = ask_slurm(["scontrol", "show", "config"], "look at the cluster's configuration")
    return re.search(r"^TaskPlugin\s*=\s*(task/none)?\s*$", said, re.MULTILINE) is None


def _list_steps(job_id: str, name: str) -> list[str]:
    lines = ask_slurm(["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i|%j"], "list the steps")
    pairs = (line.partition("|") for line in lines.splitlines())
    return [step for step, _, found in pairs if found == name]


def _choose_port(head: str, run_dir: Path, number: int, environment: Mapping[str, str]) -> int:
    """Another one for each run and life; known to be free where this process is on the node that opens it."""
    start = int(step_name(run_dir)[-6:], 16) + int(environment.get("SLURM_JOB_ID", "0")) + number
    port = FIRST_PORT + start % NUM_PORTS
    return first_free_port(port) if environment.get("SLURMD_NODENAME") == head else port
