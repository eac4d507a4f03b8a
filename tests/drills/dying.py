"""Drill: every way in which a run may end, and how many of its processes are left ten seconds later."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.drills.outcome import Outcome
from tests.ways_to_die import ALONE, LEFT_S, WITH_KERNEL, Kernel, Trial

WAYS = (*WITH_KERNEL, *ALONE)


def try_once(way: str, folder: Path) -> list[str]:
    """One trial; what was wrong."""
    trial = Trial(folder)
    if way in ALONE:
        ALONE[way](trial)
    else:
        with Kernel(trial) as kernel:
            WITH_KERNEL[way](trial, kernel)
    return trial.faults


def run_drill(trials: int, seed: int, way: str) -> Outcome:
    """Trials of one way."""
    started, failed, num_left = time.monotonic(), 0, 0
    for number in range(trials):
        with tempfile.TemporaryDirectory(prefix="biokit-dying-") as folder:
            faults = try_once(way, Path(folder))
        failed, num_left = failed + bool(faults), num_left + sum(fault.startswith("left after") for fault in faults)
        print(f"{way} {number + 1}/{trials}: {'; '.join(faults) or 'nothing left'}", flush=True)
    noted = f"{num_left} processes left after {LEFT_S:g} s"
    return Outcome(f"ended by {way}", trials, failed, noted, time.monotonic() - started)
