"""Predicted properties as pictures: predicted against measured, and how honest the uncertainty is; and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from biokit.errors import ConfigError
from biokit.tasks.property import FOREST, FROZEN_HEAD, MEAN, TUNED_HEAD, PropertyReport
from biokit.tasks.property_metrics import CALIBRATION, LEVELS, coverage, coverage_error, reliability
from biokit.view.comparison import COLOURS
from biokit.view.picture import Picture, frame_axes, picture_of
from biokit.view.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR = 0.4  # Tanimoto similarity to a training molecule from which a test molecule counts as alike
_STYLES = {
    MEAN: (COLOURS[3], "D"),
    FOREST: (COLOURS[1], "s"),
    FROZEN_HEAD: (COLOURS[0], "o"),
    TUNED_HEAD: (COLOURS[2], "^"),
}
_REFERENCE: dict[str, Any] = {"color": "#616161", "linestyle": (0, (4, 3)), "linewidth": 1.2}

Values = npt.NDArray[np.float64]


def tabulate_properties(report: PropertyReport) -> Table:
    """Methods, the best first, and their metrics over the splits: mean ± standard deviation."""
    rows = [(method, *(report.describe(method, metric) for metric in report.metrics)) for method in report.rank()]
    return Table(("method", *report.metrics), rows)


def show_calibration(report: PropertyReport, *, title: str = "") -> Picture:
    """Whether predicted uncertainty is true, of every method over the test molecules of all splits.

    Regression: of the measured values, how many lie inside the central interval of each level; below the diagonal
    a method is too sure of itself. Classification: how often class 1 comes true of those predicted alike.
    """
    title = title or f"Calibration: {report.data.target}"
    figure, (axes,) = _make_figure(title, 1, (6.4, 5.2))
    axes.plot([0, 1], [0, 1], label="honest", **_REFERENCE)
    lines = [title]
    is_regression = report.data.kind == "regression"
    for method in (name for name in report.methods if is_regression or name != MEAN):
        measured, mean, std = _pool(report, method)
        if is_regression:
            x, y, error = np.array(LEVELS), coverage(measured, mean, std), coverage_error(measured, mean, std)
            within = np.interp([0.5, 0.9], x, y)
            lines.append(f"{method}: 50 % intervals hold {within[0]:.0%}, 90 % intervals {within[1]:.0%}")
        else:
            bins = reliability(measured, mean)
            x, y, error = bins.predicted, bins.observed, bins.error
            pairs = ", ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(x, y, strict=True))
            lines.append(f"{method}, predicted: observed, {pairs}")
        lines[-1] += f"; {CALIBRATION} {error:.3f}"
        colour, marker = _STYLES[method]
        axes.plot(x, y, f"{marker}-", color=colour, markersize=6, lw=1.8, label=f"{method} ({error:.3f})")
    words = ("level of the interval", "share of measured values inside") if is_regression else (
        "predicted probability of class 1", "share of class 1")  # fmt: skip
    axes.set_xlabel(words[0], fontsize=12)
    axes.set_ylabel(words[1], fontsize=12)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    if is_regression:
        axes.text(0.97, 0.03, "below the line: too sure of itself", ha="right", fontsize=11, color="#616161")
    axes.legend(title=CALIBRATION, frameon=False, fontsize=11, title_fontsize=11, loc="upper left")
    return picture_of(figure, "\n".join(lines))


def show_predictions(
    report: PropertyReport, methods: Sequence[str] = (FROZEN_HEAD, FOREST), *, title: str = ""
) -> Picture:
    """Predicted against measured of the test molecules of all splits, a panel a method.

    Regression: points with error bars (one standard deviation), those with an alike training molecule (similarity of
    `NEAR` or more) apart from the others. Classification: distributions of the predicted probability, a class each.

    Raises:
        ConfigError: no method, or one that the report does not have.
    """
    unknown = [method for method in methods if method not in report.methods]
    if unknown or not methods:
        found = f"{', '.join(unknown)} is not among them" if unknown else "none was asked for"
        raise ConfigError("show predictions", found, f"Valid: {', '.join(report.methods)}")
    title = title or f"{report.data.target}: predicted and measured"
    figure, panels = _make_figure(title, len(methods), (4.8 * len(methods), 5.2))
    similarities = np.concatenate([part.similarities for part in report.parts.values()])
    pooled = {method: _pool(report, method) for method in methods}
    low, high = _common_range(list(pooled.values()))
    lines = [title]
    for axes, method in zip(panels, methods, strict=True):
        scores = ", ".join(f"{metric} {report.describe(method, metric, 2)}" for metric in report.metrics[:-1])
        axes.set_title(f"{method}\n{scores}", loc="left", fontsize=10)
        if report.data.kind == "regression":
            _draw_points(axes, *pooled[method], similarities >= NEAR)
            axes.set(xlim=(low, high), ylim=(low, high))
            axes.set_aspect("equal")
        else:
            _draw_classes(axes, *pooled[method][:2])
        lines.append(f"{method}: {scores}")
    if report.data.kind == "classification":
        for axes in panels:
            axes.set_ylim(0, max(other.get_ylim()[1] for other in panels))
    panels[0].set_ylabel("predicted" if report.data.kind == "regression" else "test molecules", fontsize=12)
    shown, words = panels[0].get_legend_handles_labels()
    figure.legend(shown, words, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    lines.append(
        f"{len(similarities)} test molecules of {len(report.parts)} {report.split} splits; "
        f"{(similarities >= NEAR).mean():.0%} have a training molecule of similarity {NEAR} or more"
    )
    return picture_of(figure, "\n".join(lines))


def _make_figure(title: str, num_panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    panels = [figure.add_subplot(1, num_panels, place) for place in range(1, num_panels + 1)]
    for axes in panels:
        frame_axes(axes)
    return figure, panels


def _pool(report: PropertyReport, method: str) -> tuple[Values, Values, Values]:
    """Measured values, predicted ones and their standard deviations over the test molecules of all splits."""
    found = [outcome for outcome in report.outcomes if outcome.method == method]
    measured = np.concatenate([report.data.targets[report.parts[outcome.seed].rows] for outcome in found])
    mean, std = (
        np.concatenate([getattr(outcome.prediction, name) for outcome in found]).astype(np.float64)
        for name in ("mean", "std")
    )
    return measured.astype(np.float64), mean, std


def _common_range(pooled: Sequence[tuple[Values, Values, Values]]) -> tuple[float, float]:
    values = np.concatenate([part for measured, mean, _ in pooled for part in (measured, mean)])
    margin = 0.05 * float(np.ptp(values)) or 1.0
    return float(values.min()) - margin, float(values.max()) + margin


def _draw_points(axes: Axes, measured: Values, mean: Values, std: Values, is_near: npt.NDArray[np.bool_]) -> None:
    """Points with bars, those far from all training molecules on top."""
    axes.axline((0, 0), slope=1, **_REFERENCE)
    for mask, colour, marker, words in (
        (is_near, COLOURS[0], "o", f"a training molecule is alike (similarity {NEAR} or more)"),
        (~is_near, COLOURS[1], "^", "none is"),
    ):
        if mask.any():
            x, y = measured[mask], mean[mask]
            axes.errorbar(x, y, std[mask], fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.25)
            axes.scatter(x, y, s=16, marker=marker, color=colour, alpha=0.65, lw=0, label=f"{words}: {mask.sum()}")
    axes.set_xlabel("measured", fontsize=12)


def _draw_classes(axes: Axes, labels: Values, probabilities: Values) -> None:
    bins = [place / 20 for place in range(21)]
    axes.hist(probabilities[labels == 0], bins, color=COLOURS[4], alpha=0.6, label="class 0")
    axes.hist(probabilities[labels == 1], bins, histtype="step", color=COLOURS[1], lw=2.2, label="class 1")
    axes.set_xlabel("predicted probability of class 1", fontsize=12)
    axes.set_xlim(0, 1)
