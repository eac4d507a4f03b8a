"""Interleaved measurement: every contender runs a slice in turn, so that a noisy machine troubles all alike.

Rates are per CPU-second of this process, all its threads: contenders must not start processes. Times of work on
several processes or on a disk are taken by the benchmark itself, and compared here.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

HEADER = (
    "| what | peer | ours | the peer's | ratio (median) | over rounds | target | met |\n"
    "|---|---|---|---|---|---|---|---|"
)
NOT_MEASURED = "not measured: BIOKIT_REAL_DATA is not set"


@dataclass(frozen=True)
class Row:
    """A line of the table. `met` is None where there is no target, or nothing was measured."""

    what: str
    peer: str
    ours: str = NOT_MEASURED
    theirs: str = "-"
    ratio: str = "-"
    spread: str = "-"
    target: str = "-"
    met: bool | None = None

    def __str__(self) -> str:
        met = {True: "yes", False: "NO", None: "-"}[self.met]
        cells = (self.what, self.peer, self.ours, self.theirs, self.ratio, self.spread, self.target, met)
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Rates:
    """Units per CPU-second of each contender, a median over the rounds."""

    unit: str
    per_cpu_s: Mapping[str, float]
    ratios: Mapping[str, list[float]]  # of the first contender over each peer, a round each

    def rows(self, targets: Mapping[str, float]) -> list[Row]:
        """A row for each peer; `targets` are the least ratios, where there are any."""
        ours = next(iter(self.per_cpu_s))
        return [self._row(ours, peer, targets.get(peer)) for peer in self.ratios]

    def _row(self, ours: str, peer: str, target: float | None) -> Row:
        ratios = self.ratios[peer]
        median = statistics.median(ratios)
        return Row(
            what=ours,
            peer=peer,
            ours=f"{self.per_cpu_s[ours]:,.0f} {self.unit}",
            theirs=f"{self.per_cpu_s[peer]:,.0f}",
            ratio=f"{median:.2f}x",
            spread=f"{min(ratios):.2f} - {max(ratios):.2f}",
            target="-" if target is None else f"at least {target:g}x",
            met=None if target is None else median >= target,
        )


def compare_times(
    what: str, peer: str, ours_s: Sequence[float], theirs_s: Sequence[float], target: float | None = None
) -> Row:
    """A row of times, ours over the peer's, pair by pair; `target` is the greatest ratio, where there is one."""
    ratios = [a / b for a, b in zip(ours_s, theirs_s, strict=True)]
    median = statistics.median(ratios)
    return Row(
        what=what,
        peer=peer,
        ours=f"{1e3 * statistics.median(ours_s):,.1f} ms",
        theirs=f"{1e3 * statistics.median(theirs_s):,.1f} ms",
        ratio=f"{median:.2f}x",
        spread=f"{min(ratios):.2f} - {max(ratios):.2f}",
        target="-" if target is None else f"at most {target:.2f}x",
        met=None if target is None else median <= target,
    )


def compare(contenders: Mapping[str, Callable[[], int]], unit: str, rounds: int = 5) -> Rates:
    """Run every contender once a round, after one warm-up round.

    Args:
        contenders: name -> function that does some work and returns how many units it did; the first one is ours.
        unit: of the work, for the table.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            rate = _time(work)
            if number:
                rates[name].append(rate)
    ours, *peers = contenders
    ratios = {p: [a / b for a, b in zip(rates[ours], rates[p], strict=True)] for p in peers}
    return Rates(unit, {name: statistics.median(values) for name, values in rates.items()}, ratios)


def _time(work: Callable[[], int]) -> float:
    """Units per CPU-second, without the garbage collector, whose turns would fall on either by chance."""
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        return work() / (time.process_time() - started)
    finally:
        gc.enable()
