"""Training seen from outside: curves, a live panel with a stop button, and a line a second for runs without a screen.

All of it reads the run folder, so it works on any run, in any process, while it trains and long after.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from biokit.errors import BiokitError, RunError
from biokit.runs import RunFolder
from biokit.safe_files import to_float, to_whole
from biokit.view.picture import Picture, frame_axes, picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAW, SMOOTH, VALIDATION = "#56B4E9", "#00456B", "#D55E00"  # Okabe-Ito: sky blue, blue (darkened), vermillion
LINE_EVERY_S = 1.5
SMOOTH_PARTS = 25  # the smoothed line is the mean of the last 1/25 of the points drawn
MAX_WINDOW = 100  # so that a long run's line does not lag far behind its points
MAX_DRAWN = 4000
MAX_MARKS = 40
RATE_LINES = 20
LOOK_EVERY_S = 0.1
FINAL_STATES = ("finished", "stopped", "failed", "preprocessed", "timed out", "interrupted", "lost")


class Handle(Protocol):
    """A run of which is known whether it is alive (`biokit.launch.run.Run`); a folder alone will do where it is not."""

    folder: RunFolder

    @property
    def started(self) -> float: ...  # unix time
    @property
    def status(self) -> str: ...  # one of FINAL_STATES: it has ended
    def raise_on_failure(self) -> None: ...


Run = Handle | RunFolder | str | Path


@dataclass(frozen=True)
class Panel:
    """One small diagram: a metrics key, its words, and the key of the same quantity on the validation part."""

    key: str
    title: str
    validation_key: str = ""
    can_be_log: bool = False


PANELS = (
    Panel("loss", "loss (nats per token)", "val_loss", can_be_log=True),
    Panel("token_accuracy", "token accuracy", "val_token_accuracy"),
    Panel("lr", "learning rate"),
    Panel("tokens_per_s", "tokens per second"),
)


@dataclass(frozen=True)
class RunState:
    """What a run folder says of a run at one moment."""

    status: str  # starting, running, stopping, ..., or one of FINAL_STATES
    step: int  # 0: none yet
    num_steps: int  # 0: not known
    loss: float  # NaN: none yet
    seconds_left: float  # NaN: not known

    @property
    def ended(self) -> bool:
        return self.status in FINAL_STATES

    def __str__(self) -> str:
        of = f" of {self.num_steps}" if self.num_steps else ""
        words = [f"{self.status}: step {self.step}{of}" if self.step or of else self.status]
        if math.isfinite(self.loss):
            words.append(f"loss {self.loss:.4f}")
        if not self.ended and math.isfinite(self.seconds_left):
            words.append(f"about {_duration(self.seconds_left)} left")
        return ", ".join(words)


def folder_of(run: Run) -> RunFolder:
    """The run folder of a run, of a path, or the folder itself."""
    if isinstance(run, (str, Path)):
        return RunFolder(run)
    return run if isinstance(run, RunFolder) else run.folder


def read_state(run: Run) -> RunState:
    """Status, step, loss and time left, from the manifest and the last metrics lines; a run that knows whether it is
    alive has the last word on the status.
    """
    folder = folder_of(run)
    handle = _handle_of(run)
    known = handle.status if handle else ""  # before the lines are read: a run that has ended has all of them
    lines = folder.read_metrics()
    last = lines[-1] if lines else {}
    try:
        manifest = folder.read_manifest()
    except RunError:
        manifest = {}
    step, loss = last.get("step", 0), to_float(last.get("loss"))
    status, num_steps = str(manifest.get("status", "starting")), to_whole(manifest.get("train_iters"))
    if handle is not None:
        status = known
        if not _written_since(folder.manifest_file, handle.started):
            num_steps, step, loss, lines = 0, 0, math.nan, []  # all of it is an earlier training's
    elif status == "running" and folder.stop_requested():
        status = "stopping"
    left = _seconds_per_step(lines) * (num_steps - step) if num_steps else math.nan
    return RunState(status, step, num_steps, loss, left)


def show_training(run: Run, *, scale: str = "linear", title: str = "") -> Picture:
    """The training curve as a picture; its words give the figures.

    Args:
        scale: `linear` or `log`, of the loss axis.

    Raises:
        RunError: no such run folder, or another scale.
    """
    folder = folder_of(run)
    if not folder.path.is_dir():
        raise RunError(f"training curve of {folder.path}", "there is no such run folder", "Check the path")
    lines = folder.read_metrics()
    return picture_of(draw_training(lines, scale=scale, title=title), describe_training(lines, title))


def draw_training(lines: Sequence[dict[str, Any]], *, scale: str = "linear", title: str = "") -> Figure:
    """The training curve as a matplotlib figure: every quantity of PANELS that the metrics lines hold.

    Raises:
        RunError: a scale other than `linear` and `log`.
    """
    from matplotlib.figure import Figure

    if scale not in ("linear", "log"):
        raise RunError("training curve", f'scale is "{scale}"', "Valid: linear, log")
    panels = [panel for panel in PANELS if any(panel.key in line for line in lines)]
    num_rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(9.2, 0.3 + 2.6 * num_rows), dpi=100, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    if not panels:
        figure.text(0.5, 0.5, "no step finished yet", ha="center", va="center", fontsize=13, color="#606060")
        return figure
    num_columns = min(2, len(panels))
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        draw_panel(axes, panel, lines, scale if panel.can_be_log else "linear")
    return figure


def describe_training(lines: Sequence[dict[str, Any]], title: str = "") -> str:
    """The training curve in words: first, last and best figures, and how many were not finite."""
    head = title or "Training curve"
    if not lines:
        return f"{head}: no step finished yet"
    words = [f"{head}: steps {lines[0]['step']} to {lines[-1]['step']}"]
    for panel in PANELS:
        for key, part in ((panel.key, ""), (panel.validation_key, " on the validation part")):
            values = [to_float(line[key]) for line in lines if line.get(key) is not None]
            finite = [value for value in values if math.isfinite(value)]
            if not finite:
                continue
            text = f"{panel.title}{part}: {finite[0]:.4g} first, {finite[-1]:.4g} last"
            text += f", {min(finite):.4g} lowest, {max(finite):.4g} highest"
            lost = len(values) - len(finite)
            words.append(text + (f" ({lost} not finite, not drawn)" if lost else ""))
    return "\n".join(words)


def follow(run: Run, *, timeout_s: float = math.inf, show: bool = True, stops: bool = True) -> RunState:
    """Wait until the run has ended, rewriting one short line at least every two seconds (for runs without a screen).

    An interrupt (the stop square of a notebook) asks the run to stop at the next step boundary; a second one leaves.

    Args:
        show: False: print nothing.
        stops: False: the first interrupt leaves already.

    Raises:
        KeyboardInterrupt: an interrupt that leaves.
        RunError: the run failed (with the end of its log), or still runs after `timeout_s`.
    """
    folder, handle, end = folder_of(run), _handle_of(run), time.monotonic() + timeout_s
    asked = False
    while True:
        try:
            state = read_state(run)
            if show:
                print(f"{state!s:<78}", end="\n" if state.ended else "\r", flush=True)
            if state.ended:
                break
            if time.monotonic() > end:
                raise RunError(f"run {folder.path}", f"it still runs after {timeout_s:g} s", "Wait longer, or stop it")
            if asked:
                folder.request_stop()  # again: a training that just starts may have cleared an older STOP file
            _wait_a_while(handle, min(LINE_EVERY_S, max(0.0, end - time.monotonic())))
        except KeyboardInterrupt:
            if asked or not stops:
                raise
            asked = True
            folder.request_stop()
            print("\ninterrupted: the run saves a checkpoint and ends; interrupt again not to wait for it", flush=True)
    if handle is not None:
        handle.raise_on_failure()
    elif state.status == "failed":
        raise RunError(f"run {folder.path}", f"it failed: {_reason(folder)}", f"Look at the logs in {folder.logs}")
    return state


def _handle_of(run: Run) -> Handle | None:
    return None if isinstance(run, (RunFolder, str, Path)) else run


def _written_since(file: Path, unix_time: float) -> bool:
    return file.exists() and file.stat().st_mtime >= unix_time


def _wait_a_while(handle: Handle | None, seconds: float) -> None:
    """Less where the run ends before."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and (handle is None or handle.status not in FINAL_STATES):
        time.sleep(min(left, LOOK_EVERY_S))


def _reason(folder: RunFolder) -> str:
    try:
        return str(folder.read_manifest().get("error", "its manifest does not say why"))
    except BiokitError as error:
        return error.found


def _seconds_per_step(lines: Sequence[dict[str, Any]]) -> float:
    """Median over the last lines, so that a pause (evaluation, resume) does not count; NaN where unknown."""
    recent = [line for line in lines[-RATE_LINES:] if "time" in line]
    gaps = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(recent)
        if after["step"] > before["step"]
    ]
    return statistics.median(gaps) if gaps else math.nan


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def draw_panel(axes: Axes, panel: Panel, lines: Sequence[dict[str, Any]], scale: str) -> None:
    """Raw points, the mean of the last few beside them, and the validation points."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps, values = _series(lines, panel.key)
    stride = max(1, -(-len(steps) // MAX_DRAWN))
    few = len(steps) < 2 * SMOOTH_PARTS
    style = "-" if panel.key == "lr" and len(steps) > 1 else "o-" if few else "o"
    label = "each step" if stride == 1 else f"1 step in {stride}"
    axes.plot(
        steps[::stride], values[::stride], style, color=RAW, lw=1.0, markersize=3.5 if few else 1.8, mew=0, label=label
    )
    if panel.key != "lr" and not few:
        window = min(MAX_WINDOW, len(values) // SMOOTH_PARTS)
        means = _trailing_means(values, window)
        label = f"mean of the last {window}"
        axes.plot(steps[window - 1 :][::stride], means[::stride], color=SMOOTH, lw=1.6, label=label)
    val_steps, val_values = _series(lines, panel.validation_key)
    if val_steps:
        style = "D-" if len(val_steps) <= MAX_MARKS else "-"
        axes.plot(val_steps, val_values, style, color=VALIDATION, markersize=5, lw=1.2, label="validation")
    if scale == "log" and any(value > 0 for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        wide = max(values) > 20 * min(value for value in values if value > 0)
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter() if wide else FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(which="minor", labelsize=8)
    if panel.key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style_axes(axes, panel.title + (", log scale" if scale == "log" else ""))
    if panel.key != "lr" and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def style_axes(axes: Axes, title: str) -> None:
    """What all small diagrams over steps have in common."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    frame_axes(axes)


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], to_float(line[key])) for line in lines if line.get(key) is not None]
    finite = [(step, value) for step, value in pairs if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _trailing_means(values: Sequence[float], window: int) -> list[float]:
    """means[i] = mean(values[i : i + window]): only points at or before the step it is drawn at."""
    sums = [math.fsum(values[:window])]
    for old, new in zip(values, values[window:], strict=False):
        sums.append(sums[-1] + new - old)
    return [total / window for total in sums]
