"""Interleaved measurement: every contender runs a slice in turn, so that a noisy machine troubles all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Units per CPU-second of each contender, a median over the rounds."""

    unit: str
    per_cpu_s: Mapping[str, float]
    ratios: Mapping[str, list[float]]  # of the first contender over each peer, a round each

    def row(self, peer: str) -> str:
        ours = next(iter(self.per_cpu_s))
        ratios = self.ratios[peer]
        return (
            f"| {ours} | {peer} | {self.per_cpu_s[ours]:,.0f} {self.unit} | {self.per_cpu_s[peer]:,.0f} "
            f"| {statistics.median(ratios):.2f}x | {min(ratios):.2f} - {max(ratios):.2f} |"
        )


HEADER = (
    "| ours | peer | ours per CPU-second | peer | ratio (median) | over rounds |\n|---|---|---|---|---|---|"
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
            started = time.process_time()
            units = work()
            seconds = time.process_time() - started
            if number:
                rates[name].append(units / seconds)
    ours, *peers = contenders
    ratios = {p: [a / b for a, b in zip(rates[ours], rates[p], strict=True)] for p in peers}
    return Rates(unit, {name: statistics.median(values) for name, values in rates.items()}, ratios)
