"""Drill: every way in which a run may end, and how many of its processes are left ten seconds later."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.drills.outcome import Outcome
from tests.orphans import LEFT_S
from tests.ways_to_die import try_ways


def run_drill(trials: int, seed: int, way: str) -> Outcome:
    """Trials of one way."""
    started, failed, num_left = time.monotonic(), 0, 0
    for number in range(trials):
        with tempfile.TemporaryDirectory(prefix="biokit-dying-") as folder:
            faults = try_ways([way], Path(folder))[way]
        failed, num_left = failed + bool(faults), num_left + sum(fault.startswith("left after") for fault in faults)
        print(f"{way} {number + 1}/{trials}: {'; '.join(faults) or 'nothing left'}", flush=True)
    noted = f"{num_left} processes left after {LEFT_S:g} s"
    return Outcome(f"ended by {way}", trials, failed, noted, time.monotonic() - started)
