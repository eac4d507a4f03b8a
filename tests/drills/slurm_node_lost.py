"""Drill: a node of a Slurm job goes without a word, the first or another one, in the middle of a training.

A trial passes when the job came back by itself, went on from a checkpoint to its end with the losses and the last
weights of the job that nobody disturbed, and left no process behind.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from biokit.runs import RunFolder
from tests.drills.outcome import Outcome
from tests.slurm.cluster import NODES, Cluster, missing_parts, processes_with, wait_until
from tests.slurm.jobs import (
    STEPS,
    explain,
    job_of,
    last_step,
    losses,
    submit,
    wait_for_outcome,
    wait_for_state,
    wait_for_step,
    write_config,
)

NAME = "node lost under Slurm"
LOST_S, JOB_S, GONE_S = 90.0, 180.0, 30.0
SAVE_INTERVAL = 10


def run_drill(trials: int, seed: int) -> Outcome:
    """Trials on a Slurm of two nodes on this machine; where there can be none, that is said."""
    if why := missing_parts():
        print(f"{NAME}: skipped: {why}", flush=True)
        return Outcome(NAME, 0, 0, f"skipped: {why}", 0.0)
    rng, started, failed, redone = random.Random(seed), time.monotonic(), 0, 0
    before = dict(os.environ)
    scratch = Path(tempfile.mkdtemp())
    try:
        with Cluster() as cluster:
            os.environ |= {"SLURM_CONF": cluster.environment["SLURM_CONF"], "OMP_NUM_THREADS": "1"}
            os.environ["XDG_STATE_HOME"] = str(scratch / "state")
            reference = start(scratch / "reference")
            wait_for_outcome(cluster, reference, "finished", timeout_s=JOB_S)
            for number in range(trials):
                node = NODES[number % len(NODES)] if trials > 1 else rng.choice(NODES)
                faults, again = run_trial(cluster, scratch / f"trial_{number}", reference, node, rng)
                failed, redone = failed + bool(faults), max(redone, again)
                print(f"{NAME} {number + 1}/{trials}, {node}: {'; '.join(faults) or 'bitwise equal'}", flush=True)
    finally:
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(scratch, ignore_errors=True)
    noted = f"at most {redone} of {STEPS} steps done again (saved every {SAVE_INTERVAL})"
    return Outcome(NAME, trials, failed, noted, time.monotonic() - started)


def start(folder: Path) -> RunFolder:
    """Submit a training on both nodes."""
    return submit(write_config(folder, save_interval=SAVE_INTERVAL), "strategy=DDP", "--nodes", "2")


def run_trial(
    cluster: Cluster, folder: Path, reference: RunFolder, node: str, rng: random.Random
) -> tuple[list[str], int]:
    """One job that loses a node; (what is wrong, steps done again)."""
    aim, run = rng.randrange(SAVE_INTERVAL + 1, STEPS - 20), start(folder)
    job_id = job_of(run).job_id
    try:
        wait_for_step(cluster, run, aim)
        cluster.lose_node(node)
        reached = last_step(run)
        wait_for_state(cluster, run, "PENDING", timeout_s=LOST_S)
        cluster.start_node(node)
        outcome = wait_for_outcome(cluster, run, "finished", "failed", timeout_s=JOB_S).outcome
    except AssertionError as error:
        cluster.ask("scancel", job_id, check=False)
        return [str(error)], 0
    if outcome != "finished":
        return [f"the job {outcome}: {explain(cluster, run)}"], 0
    faults = [] if losses(run) == losses(reference) else ["the loss curve differs from the undisturbed one"]
    faults += [] if weights(run) == weights(reference) else ["the last weights differ from the undisturbed ones"]
    try:
        wait_until(lambda: not processes_with("SLURM_JOB_ID", job_id), GONE_S)
    except AssertionError:
        faults.append(f"{len(processes_with('SLURM_JOB_ID', job_id))} processes are left")
    redone = reached - run.read_manifest()["resumed_from"]
    return [*faults, *([f"{redone} steps were done again"] if redone > SAVE_INTERVAL else [])], redone


def weights(run: RunFolder) -> bytes:
    """The last checkpoint's."""
    return (run.checkpoint_dir(STEPS) / "model.safetensors").read_bytes()
