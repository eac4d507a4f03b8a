"""Drill: SIGKILL one rank of a training of several processes, at any moment, and start it again.

A trial passes when the loss curve and the last weights are bitwise those of the run that nobody disturbed, no more
steps were done again than lie between two checkpoints, and no completed checkpoint was lost or altered.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from biokit.config import RunConfig, config_from_dict, config_to_dict
from biokit.errors import BiokitError
from biokit.runs import RunFolder
from tests.distributed import CONTEXT, free_port
from tests.drills.kill_and_resume import (
    ITERATIONS,
    SAVE_INTERVAL,
    checkpoint_digests,
    last_weights,
    losses,
    make_config,
)
from tests.drills.outcome import Outcome

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DDP": (2, {}),
    "Zero1": (2, {}),
    "ThreeD": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
GRACE_S = 3.0  # in which the other ranks may notice and end; then they are ended
LIFE_S = 180.0


def under(config: RunConfig, strategy: str) -> RunConfig:
    """The same training under another strategy."""
    tree = config_to_dict(config)
    tree |= {"strategy": strategy, "parallel": {**tree["parallel"], **LAYOUTS[strategy][1], "timeout_s": 60}}
    return config_from_dict(tree)


def run_rank(tree: dict[str, Any], rank: int, world_size: int, port: int, log: str) -> None:
    """Body of a rank's process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from biokit.train import train

    train(config_from_dict(tree))


class Life:
    """One launch of all ranks, on a port of its own."""

    def __init__(self, config: RunConfig) -> None:
        world_size, port = LAYOUTS[config.strategy][0], free_port()
        logs = RunFolder(config.run_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        tree = config_to_dict(config)
        self.processes = [
            CONTEXT.Process(target=run_rank, args=(tree, rank, world_size, port, str(logs / f"rank_{rank}.log")))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    @property
    def is_over(self) -> bool:
        """Whether any rank has ended."""
        return not all(process.is_alive() for process in self.processes)

    def kill(self, rank: int) -> bool:
        """SIGKILL one rank; False where it had ended already."""
        process = self.processes[rank]
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def end(self, timeout_s: float) -> list[int | None]:
        """Wait for all ranks, end those that do not come; their exit codes."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def run_to_the_end(config: RunConfig) -> str:
    """Train; what went wrong, or an empty text."""
    codes = Life(config).end(LIFE_S)
    return f"the ranks ended with {codes}" if any(codes) else ""


def last_step(folder: RunFolder) -> int:
    """The newest step in the metrics."""
    lines = folder.read_metrics()
    return lines[-1]["step"] if lines else 0


def run_trial(config: RunConfig, reference: RunFolder, rng: random.Random) -> tuple[list[str], int]:
    """One training whose ranks lose one of them; (what is wrong, steps done again)."""
    folder, life = RunFolder(config.run_dir), Life(config)
    victim, aim = rng.randrange(len(life.processes)), rng.randrange(1, ITERATIONS)
    deadline = time.monotonic() + LIFE_S
    while last_step(folder) < aim and not life.is_over and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.02))
    killed = life.kill(victim)
    life.end(GRACE_S)
    reached = last_step(folder)
    try:
        known = checkpoint_digests(folder)
    except BiokitError as error:
        return [f"a completed checkpoint is broken: {error}"], 0
    faults = [] if killed else ["the rank had ended before it was killed"]
    fault = run_to_the_end(config)
    if fault:
        return [*faults, f"the run did not go on: {fault}"], 0
    found, redone = checkpoint_digests(folder), reached - folder.read_manifest()["resumed_from"]
    faults += [f"checkpoint {step} was lost or altered" for step in known if found.get(step) != known[step]]
    if redone > SAVE_INTERVAL:
        faults.append(f"{redone} steps were done again")
    if losses(folder) != losses(reference):
        faults.append("the loss curve differs from the undisturbed one")
    if last_weights(folder) != last_weights(reference):
        faults.append("the last weights differ from the undisturbed ones")
    return faults, redone


def run_drill(trials: int, seed: int, strategy: str) -> Outcome:
    """Trials under one strategy."""
    CONTEXT.set_forkserver_preload(["tests.preload", "biokit.train", "biokit.chem.molecules"])
    rng, started, failed, most = random.Random(seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        config = under(make_config(root / "reference", "wehi_mols"), strategy)
        fault = run_to_the_end(config)
        if fault:
            raise SystemExit(f"a training that nobody disturbed: {fault}")
        reference = RunFolder(config.run_dir)
        for number in range(trials):
            run_dir = root / f"trial_{number:03d}"
            again = under(make_config(run_dir, str(reference.path / "data")), strategy)
            faults, redone = run_trial(again, reference, rng)
            failed, most = failed + bool(faults), max(most, redone)
            print(f"{strategy} {number + 1}/{trials}: {'; '.join(faults) or 'bitwise equal'}", flush=True)
    noted = f"at most {most} of {ITERATIONS} steps done again (saved every {SAVE_INTERVAL})"
    name = f"one of {LAYOUTS[strategy][0]} ranks killed, {strategy}"
    return Outcome(name, trials, failed, noted, time.monotonic() - started)
