"""What a drill found, and how sure that makes us."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """A drill's result; printing it gives a row of the table."""

    drill: str
    trials: int
    failed: int
    noted: str
    seconds: float

    @property
    def row(self) -> str:
        """`drill | passed | failed | failure rate below | noted | seconds`."""
        bound = upper_bound(self.failed, self.trials)
        cells = [self.drill, self.trials - self.failed, self.failed, f"{bound:.3f}", self.noted, f"{self.seconds:.0f}"]
        return f"| {' | '.join(map(str, cells))} |"


HEADER = "| drill | passed | failed | failure rate below (95 %) | noted | s |\n|---|---|---|---|---|---|"


def upper_bound(failures: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson upper bound of the failure rate."""
    if failures >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        tail = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures + 1))
        low, high = (rate, high) if tail > 1 - confidence else (low, rate)
    return high
