"""Runs of the same training under several layouts beside one another: their curves, and how far those differ.

All of it reads run folders.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biokit.errors import RunError
from biokit.parallel.grid import Layout
from biokit.view.picture import Picture, picture_of
from biokit.view.table import Table
from biokit.view.training import Run, folder_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOAT_EPS = 2.0**-23  # relative step of fp32
SUM_ROUNDINGS = 4  # that separate two orders of the sums inside one step's loss
COLOURS = ("#00456B", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe-Ito, the blue darkened
MARKERS = "osD^vP"
ZERO_BELOW = 1e-8  # the difference axis is logarithmic above it


@dataclass(frozen=True)
class RunSummary:
    """What a run folder says of a finished or running training.

    Attributes:
        layout: e.g. `ThreeD x tp2 x pp2`.
        step_s: median seconds of a step, the first (which warms up) left out where there are others.
        losses: step -> global loss.
    """

    layout: str
    num_processes: int
    step_s: float
    losses: dict[int, float]


def summarize_run(run: Run) -> RunSummary:
    """Read layout, losses and step time of a run.

    Raises:
        RunError: no run folder with a manifest, or no step finished yet.
    """
    folder = folder_of(run)
    about, lines = folder.read_manifest().get("layout", {}), folder.read_metrics()
    if not lines:
        raise RunError(f"run {folder.path}", "no step is finished yet", "Wait for its first metrics line")
    layout = Layout(**{key: value for key, value in about.items() if key != "world_size"})
    seconds = [line["num_tokens"] / line["tokens_per_s"] for line in lines[1:] or lines]
    losses = {int(line["step"]): float(line["loss"]) for line in lines}
    return RunSummary(str(layout), layout.world_size, statistics.median(seconds), losses)


def loss_bound(losses: Mapping[int, float]) -> float:
    """The largest difference that fp32 allows between these losses (step -> loss) and another layout's.

    A layout changes the order of sums, nothing else. One step's loss is then off by a few roundings of its own size;
    each update before adds one more by way of the weights. Differences seen are below one rounding in all; a mean of
    means is off by 70 times the bound after 12 steps, a learning rate 0.01 % too high by 7 times. AdamW hides a wrong
    clipping threshold from any look at losses: that takes gradients.
    """
    return FLOAT_EPS * max(map(abs, losses.values())) * (SUM_ROUNDINGS + len(losses))


@dataclass(frozen=True)
class Difference:
    """How far a run's losses are from those of a reference: the largest difference, and the step where it is."""

    name: str
    run: RunSummary
    num_steps: int  # that both have
    largest: float
    step: int
    bound: float

    @property
    def within(self) -> bool:
        """Whether the largest difference is within the bound; a loss that is not finite is not."""
        return self.largest <= self.bound


@dataclass(frozen=True)
class DifferenceTable:
    """Runs against a reference; a notebook shows HTML, a terminal and a screen reader read the words."""

    reference: RunSummary
    rows: list[Difference]

    @property
    def within(self) -> bool:
        """Whether all runs are within their bounds."""
        return all(row.within for row in self.rows)

    def _table(self) -> Table:
        head = ["run", "strategy", "processes", "s a step", "steps", "largest |difference|", "bound", "verdict"]
        first = self.reference
        common = [first.layout, str(first.num_processes), f"{first.step_s:.2f} s", str(len(first.losses))]
        lines = [["the reference", *common, "", "", ""]]
        for row in self.rows:
            run = row.run
            line = [row.name, run.layout, str(run.num_processes), f"{run.step_s:.2f} s", str(row.num_steps)]
            verdict = "within" if row.within else "OUTSIDE"
            lines.append([*line, f"{row.largest:.1e} at step {row.step}", f"{row.bound:.1e}", verdict])
        return Table(head, lines)

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self._table()._repr_mimebundle_()


def difference_table(reference: Run, others: Mapping[str, Run]) -> DifferenceTable:
    """The largest |loss difference| of each run from a reference, beside what fp32 allows (`loss_bound`).

    Args:
        others: by the name that the table gives them.

    Raises:
        RunError: a folder that is no run, or runs without a common step.
    """
    first = summarize_run(reference)
    return DifferenceTable(first, [_compare(first, name, summarize_run(run)) for name, run in others.items()])


def _compare(reference: RunSummary, name: str, run: RunSummary) -> Difference:
    gaps = _find_gaps(reference, run)
    if not gaps:
        found = f"it has no step in common with the reference (steps {min(run.losses)} to {max(run.losses)})"
        raise RunError(f"difference of {name}", found, "Compare runs that began at the same step")
    worst = max(gaps, key=lambda step: math.inf if math.isnan(gaps[step]) else gaps[step])
    bound = loss_bound({step: reference.losses[step] for step in gaps})
    return Difference(name, run, len(gaps), gaps[worst], worst, bound)


def _find_gaps(reference: RunSummary, run: RunSummary) -> dict[int, float]:
    """|loss difference| of every common step."""
    common = [step for step in reference.losses if step in run.losses]
    return {step: abs(run.losses[step] - reference.losses[step]) for step in common}


def compare_curves(runs: Mapping[str, Run], *, title: str = "") -> Picture:
    """Loss curves of several runs on one plot, and beside it how far each is from the first, under the fp32 bound.

    Raises:
        RunError: no run, a folder that is no run, or a run without a finished step.
    """
    from matplotlib.figure import Figure

    if not runs:
        raise RunError("curves of several runs", "there are none", "Give {name: run}")
    found = {name: summarize_run(run) for name, run in runs.items()}
    first, *others = found
    figure = Figure(figsize=(9.2, 3.6), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title or "Loss under each layout", fontsize=12, fontweight="bold", x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    for number, (name, run) in enumerate(found.items()):
        size = 4 + 2.5 * (len(found) - 1 - number)  # the curves lie on one another: the first has the widest marks
        left.plot(*_points(run.losses), mfc="none", ms=size, label=name, **_style(number))
    for number, name in enumerate(others, start=1):
        right.plot(*_points(_find_gaps(found[first], found[name])), ms=5, **_style(number))
    bound = loss_bound(found[first].losses)
    right.axhline(bound, ls="--", color="#404040", lw=1.2)
    right.annotate(
        "what fp32 allows",
        (1, bound),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    right.set_yscale("symlog", linthresh=ZERO_BELOW)
    right.set_ylim(bottom=0)
    left.legend(fontsize=9, frameon=False, labelspacing=0.7).set_in_layout(False)  # many runs would leave no plot
    for axes, words in ((left, "loss (nats per token)"), (right, f"|difference from {first}|")):
        _finish_axes(axes, words)
    return picture_of(figure, _describe_curves(title or "Loss under each layout", found))


def _points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return list(finite), list(finite.values())


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "lw": 1.0}


def _finish_axes(axes: Axes, words: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(words, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9)
    axes.grid(True, color="#e4e4e4", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _describe_curves(title: str, runs: Mapping[str, RunSummary]) -> str:
    first, *others = runs
    lines = [title]
    for name, run in runs.items():
        steps = list(run.losses)
        ends = f"loss {run.losses[steps[0]]:.4f} at step {steps[0]}, {run.losses[steps[-1]]:.4f} at step {steps[-1]}"
        lines.append(f"{name} ({run.layout}): {ends}")
    for name in others:
        gaps = _find_gaps(runs[first], runs[name])
        words = f"at most {max(gaps.values()):.1e} over {len(gaps)} common steps" if gaps else "no common step"
        lines.append(f"{name} differs from {first} by {words}")
    return "\n".join(lines)
