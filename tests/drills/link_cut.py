"""Drill: the link between two nodes is cut at any moment of a training, and mended once everybody has been told.

A trial passes when every rank said in time which other one cannot be reached, the run went on by itself to the losses
and the weights of the run that nobody disturbed, and no process is left.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from biokit.runs import RunFolder
from tests.drills.kill_and_resume import losses
from tests.drills.outcome import Outcome
from tests.namespaces.linked import MARGIN_S, LinkedRun, configure
from tests.namespaces.pair import HOSTS, NodePair, missing_parts

STEPS, LIMIT_S = 60, 12.0
DRILL = "link between two nodes cut"


def run_trial(nodes: NodePair, run: LinkedRun, reference: RunFolder, rng: random.Random) -> tuple[list[str], float]:
    """One training that loses its link; (what is wrong, seconds until the last rank was told)."""
    run.reach(rng.randrange(2, STEPS - 10))
    time.sleep(rng.uniform(0.0, 0.05))
    nodes.cut()
    cut_at = time.time()
    try:
        run.wait_until("an error of each rank", lambda: len(run.errors()) == 2, LIMIT_S + 4 * MARGIN_S)
    finally:
        nodes.mend()
    told_s = max(error["time"] for error in run.errors()) - cut_at
    faults = [f"a rank was told after {told_s:.1f} s"] if told_s > LIMIT_S + MARGIN_S else []
    for error, other in zip(run.errors(), reversed(HOSTS), strict=True):
        if f"cannot be reached: rank {1 - error['rank']} on {other}" not in error["message"]:
            faults.append(f"what is lost was not named: {error['message']}")
    codes = run.wait()
    if any(codes):
        faults.append(f"the supervisors ended with {codes}:\n{run.logs()}")
    if losses(run.folder) != losses(reference):
        faults.append("the loss curve differs from the undisturbed one")
    if last_weights(run.folder) != last_weights(reference):
        faults.append("the last weights differ from the undisturbed ones")
    if nodes.pids():
        faults.append(f"{len(nodes.pids())} processes are left")
    return faults, told_s


def last_weights(folder: RunFolder) -> bytes:
    """Of the checkpoint at the end."""
    return (folder.checkpoint_dir(STEPS) / "model.safetensors").read_bytes()


def run_drill(trials: int, seed: int) -> Outcome:
    """Trials in two network namespaces; where these cannot be made it says so and shows nothing."""
    rng, started, failed, longest = random.Random(seed), time.monotonic(), 0, 0.0
    if why := missing_parts():
        return Outcome(DRILL, 0, 0, f"not run: no network namespaces ({why})", 0.0)
    with tempfile.TemporaryDirectory() as scratch, NodePair() as nodes:
        root = Path(scratch)
        undisturbed = LinkedRun(nodes, configure(root / "reference", "wehi_mols", 60.0, STEPS))
        if any(undisturbed.wait()):
            raise SystemExit(f"a training that nobody disturbed:\n{undisturbed.logs()}")
        reference = undisturbed.folder
        for number in range(trials):
            data = str(reference.path / "data")
            run = LinkedRun(nodes, configure(root / f"trial_{number:03d}", data, LIMIT_S, STEPS))
            try:
                faults, told_s = run_trial(nodes, run, reference, rng)
            except AssertionError as error:
                faults, told_s = [str(error)], 0.0
                nodes.end_all()
            failed, longest = failed + bool(faults), max(longest, told_s)
            print(f"link {number + 1}/{trials}: {'; '.join(faults) or f'told after {told_s:.1f} s'}", flush=True)
    noted = f"all told within {longest:.1f} s of a limit of {LIMIT_S:g} s, every run resumed"
    return Outcome(DRILL, trials, failed, noted, time.monotonic() - started)
