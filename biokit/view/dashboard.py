"""A run's dashboard: loss, tokens per second, how far the ranks' step times lie apart, and memory.

It reads the metrics files of all ranks, from any process and of any run; the training does nothing for it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biokit.errors import RunError
from biokit.failures import read_failure
from biokit.runs import RunFolder
from biokit.safe_files import parse_object, read_end, to_number, to_whole
from biokit.view.canvas import printable
from biokit.view.comparison import COLOURS
from biokit.view.live import LivePanel
from biokit.view.picture import Picture, picture_of
from biokit.view.training import (
    PANELS,
    RAW,
    SMOOTH,
    Run,
    RunState,
    describe_training,
    draw_panel,
    folder_of,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = tuple(panel for panel in PANELS if panel.key in ("loss", "tokens_per_s"))
MAX_BYTES = 4 << 20  # of all ranks' files together at a look: the ends of them where a run is long
MAX_RANKS = 4096
MAX_LINES = 6  # drawn of ranks; of more ranks the spread is drawn
MIB = float(2**20)
TITLE_SIGNS = 120

Line = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A quantity of several ranks at the steps that all of them have written.

    Attributes:
        values: one sequence a rank, in the order of `ranks`, a value a step.
    """

    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    def ends(self, index: int) -> tuple[float, float, float]:
        """Least, median and most over the ranks at a step."""
        row = [of_rank[index] for of_rank in self.values]
        return min(row), statistics.median(row), max(row)

    @property
    def often_most(self) -> tuple[int, float]:
        """The rank that has the most most often, and in which share of the steps; (-1, 0.0): none stands out."""
        rows = zip(*self.values, strict=True)
        most = Counter(self.ranks[max(range(len(row)), key=row.__getitem__)] for row in rows)
        rank, times = most.most_common(1)[0]
        share = times / len(self.steps)
        return (rank, share) if share > 0.5 + 0.5 / len(self.ranks) else (-1, 0.0)


class Dashboard(LivePanel):
    """The dashboard of a run, which follows it to its end: widgets where there are some, else one PNG and words.

    It draws at most a fifth of the time, as the live panel does, and has its stop button.
    """

    def draw(self) -> Picture:
        """The picture for `state`."""
        while_running = "" if self.state.ended else self._folder.path.name  # the state stands beside the button
        return show_dashboard(self._run, self.state, scale=self._scale, title=self._title or while_running)


def show_dashboard(run: Run, state: RunState, *, scale: str = "linear", title: str = "") -> Picture:
    """The dashboard of this moment as a picture; its words give the figures.

    Raises:
        RunError: no such run folder.
    """
    folder = folder_of(run)
    if not folder.path.is_dir():
        raise RunError(f"dashboard of {folder.path}", "there is no such run folder", "Check the path")
    lines, ranks = folder.read_metrics(), read_ranks(folder)
    seconds, memory = spread_over(ranks, "step_s"), spread_over(ranks, "memory_bytes")
    head = [title or str(state), *_why_it_failed(folder, state)]
    figure = draw_dashboard(lines, seconds, memory, head, scale)
    return picture_of(figure, describe_dashboard(lines, seconds, memory, head))


def read_ranks(folder: RunFolder) -> dict[int, list[Line]]:
    """The newest metrics lines of each rank of the run; of ranks that an earlier layout had more, none."""
    files = sorted(folder.metrics_file().parent.glob("rank_*.jsonl"))[:MAX_RANKS]
    size = _world_size(folder) or len(files)
    ranks = [rank for rank in range(size) if folder.metrics_file(rank) in files]
    limit = MAX_BYTES // max(1, len(ranks))
    found = {}
    for rank in ranks:
        lines = [parse_object(line) for line in read_end(folder.metrics_file(rank), limit).splitlines()]
        found[rank] = [line for line in lines if to_whole(line.get("step")) > 0]
    return found


def spread_over(ranks: Mapping[int, Sequence[Line]], key: str) -> Spread:
    """A quantity at the steps that all ranks which write it have."""
    by_rank = {
        rank: {to_whole(line["step"]): value for line in lines if (value := to_number(line.get(key), math.nan)) >= 0}
        for rank, lines in ranks.items()
    }
    by_rank = {rank: values for rank, values in by_rank.items() if values}
    steps = sorted(set.intersection(*(set(values) for values in by_rank.values()))) if by_rank else []
    values = tuple(tuple(values[step] for step in steps) for values in by_rank.values())
    return Spread(tuple(by_rank), tuple(steps), values)


def draw_dashboard(
    lines: Sequence[dict[str, Any]], seconds: Spread, memory: Spread, head: Sequence[str], scale: str = "linear"
) -> Figure:
    """Four diagrams under a head; one that has nothing to show says so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 5.8), dpi=100, layout="constrained", facecolor="white")
    words = "\n".join(printable(line[:TITLE_SIGNS]) for line in head)
    figure.suptitle(words, fontsize=11, fontweight="bold", x=0.01, ha="left", parse_math=False)
    for place, panel in enumerate(SHOWN, start=1):
        axes = figure.add_subplot(2, 2, place)
        if any(panel.key in line for line in lines):
            draw_panel(axes, panel, lines, scale if panel.can_be_log else "linear")
        else:
            _draw_nothing(axes, panel.title)
    of = f", {len(seconds.ranks)} ranks" if len(seconds.ranks) > 1 else ""
    _draw_spread(figure.add_subplot(2, 2, 3), f"a rank's own seconds a step{of}", seconds, 1.0)
    unit, divisor = _memory_unit(memory)
    _draw_spread(figure.add_subplot(2, 2, 4), f"memory a rank ({unit})", memory, divisor, by_rank=True)
    return figure


def describe_dashboard(lines: Sequence[dict[str, Any]], seconds: Spread, memory: Spread, head: Sequence[str]) -> str:
    """The dashboard in words."""
    words = [*head, describe_training(lines)]
    if seconds.steps:
        least, middle, most = seconds.ends(-1)
        text = (
            f"a rank's own seconds at step {seconds.steps[-1]}: {least:.4g} least, {middle:.4g} median, {most:.4g} most"
        )
        if len(seconds.ranks) > 1:
            rank, share = seconds.often_most
            text += f" of {len(seconds.ranks)} ranks"
            text += f"; slowest in {share:.0%} of the steps: rank {rank}" if share else ""
        words.append(text)
    if memory.steps:
        unit, divisor = _memory_unit(memory)
        last = [values[-1] / divisor for values in memory.values]
        rank = memory.ranks[last.index(max(last))]
        words.append(f"memory a rank: {min(last):.4g} {unit} least, {max(last):.4g} {unit} most (rank {rank})")
    return "\n".join(words)


def _draw_spread(axes: Axes, title: str, spread: Spread, divisor: float, by_rank: bool = False) -> None:
    """A line a rank where they are few and asked for, else the median and the band between least and most."""
    if not spread.steps:
        _draw_nothing(axes, title)
        return
    steps = spread.steps
    marker = "o" if len(steps) < 50 else ""
    style: dict[str, Any] = {"marker": marker, "markersize": 3, "lw": 1.4}
    if by_rank and len(spread.ranks) <= MAX_LINES:
        for rank, values, colour in zip(spread.ranks, spread.values, COLOURS, strict=False):
            axes.plot(steps, [value / divisor for value in values], color=colour, label=f"rank {rank}", **style)
    else:
        least, middle, most = zip(*(spread.ends(index) for index in range(len(steps))), strict=True)
        scaled = [[value / divisor for value in values] for values in (least, middle, most)]
        if len(spread.ranks) > 1:
            rank, share = spread.often_most
            band = "least to most" + (f" (most: rank {rank} in {share:.0%} of the steps)" if share else "")
            axes.fill_between(steps, scaled[0], scaled[2], color=RAW, alpha=0.5, lw=0, label=band)
        axes.plot(steps, scaled[1], color=SMOOTH, label="median" if len(spread.ranks) > 1 else "rank 0", **style)
    axes.set_ylim(0, 1.1 * max(max(values) for values in spread.values) / divisor or 1.0)
    style_axes(axes, title)
    axes.legend(fontsize=8, frameon=False)


def _draw_nothing(axes: Axes, title: str) -> None:
    axes.text(0.5, 0.5, "not in the metrics yet", ha="center", va="center", color="#606060", transform=axes.transAxes)
    style_axes(axes, title)
    axes.set_xticks([])
    axes.set_yticks([])


def _memory_unit(memory: Spread) -> tuple[str, float]:
    most = max((max(values) for values in memory.values if values), default=0.0)
    return ("GiB", 1024 * MIB) if most >= 1024 * MIB else ("MiB", MIB)


def _world_size(folder: RunFolder) -> int:
    """Of the layout that the run has now; 0: not known."""
    with contextlib.suppress(RunError):
        layout = folder.read_manifest().get("layout")
        return min(MAX_RANKS, to_whole(layout.get("world_size"))) if isinstance(layout, dict) else 0
    return 0


def _why_it_failed(folder: RunFolder, state: RunState) -> list[str]:
    if not state.ended or state.status in ("finished", "stopped", "preprocessed"):
        return []
    with contextlib.suppress(RunError):
        failure = read_failure(folder)
        return [failure.headline] if failure is not None else []
    return []
