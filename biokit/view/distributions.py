"""Two sets of molecules compared: a table of scores, and the distributions of their properties over one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from biokit.chem.descriptors import PROPERTIES, UNITS
from biokit.chem.scores import Scores
from biokit.chem.set_scores import SetComparison
from biokit.errors import ConfigError
from biokit.view.comparison import COLOURS
from biokit.view.picture import Picture, frame_axes, picture_of
from biokit.view.table import Table

MOSES_PROPERTIES = ("QED", "logP", "SA", "MW")
_NUM_BINS = 30
_PANEL = (4.4, 3.0)  # inches
_MEANINGS = {
    "validity": "share that RDKit can read",
    "uniqueness": "share of the valid ones that differ",
    "novelty": "share of those that are not known",
    "internal diversity": "1 - mean similarity within; 0: all the same",
    "SNN": "mean similarity to the nearest of the reference",
    "scaffold similarity": "1: the same scaffolds equally often",
    "Fréchet distance": "of standardised properties; 0: the same",
}


def tabulate_scores(comparison: SetComparison, scores: Scores | None = None) -> Table:
    """Every score of a set against its reference, with what it means."""
    values = {} if scores is None else {name: getattr(scores, name) for name in ("validity", "uniqueness", "novelty")}
    rows = [
        (name, "–" if math.isnan(value) else f"{value:.3f}", _MEANINGS.get(name, _meaning(name)))
        for name, value in {**values, **comparison.scores}.items()
    ]
    return Table(("score", "value", "meaning"), rows)


def _meaning(name: str) -> str:
    known = name.removesuffix(" apart")
    if known not in PROPERTIES:
        return "a score of your own"
    return f"earth mover's distance of {known}" + (f", {UNITS[known]}" if known in UNITS else "") + "; 0: the same"


def show_distributions(
    comparison: SetComparison,
    properties: Sequence[str] = MOSES_PROPERTIES,
    *,
    names: tuple[str, str] = ("generated", "reference"),
    title: str = "",
) -> Picture:
    """Histograms of properties, generated (line) over reference (filled), each with an area of 1.

    Raises:
        ConfigError: no property, or one that the comparison does not hold.
    """
    unknown = [name for name in properties if name not in comparison.generated]
    if unknown or not properties:
        found = f"{', '.join(unknown)} is not among them" if unknown else "none was asked for"
        raise ConfigError("show distributions", found, f"Valid: {', '.join(comparison.generated)}")
    from matplotlib.figure import Figure

    columns = 2 if len(properties) == 4 else min(3, len(properties))
    num_rows = -(-len(properties) // columns)
    size = (columns * _PANEL[0], num_rows * _PANEL[1] + 0.5)
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    title = title or f"Properties of {names[0]} and {names[1]} molecules"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    alt = [f"{title}: mean and standard deviation of each"]
    for i, name in enumerate(properties, start=1):
        new, known = comparison.generated[name], comparison.reference[name]
        axes = figure.add_subplot(num_rows, columns, i)
        both = np.concatenate((new, known))
        low, high = float(both.min()), float(both.max())
        bins = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1).tolist()
        axes.hist(known, bins, density=True, color=COLOURS[4], alpha=0.55, label=names[1])
        axes.hist(new, bins, density=True, histtype="step", color=COLOURS[1], linewidth=2.2, label=names[0])
        axes.set_xlabel(f"{name} ({UNITS[name]})" if name in UNITS else name, fontsize=12)
        axes.set_yticks([])
        frame_axes(axes)
        if i == 1:
            axes.legend(frameon=False, fontsize=11)
        sides = zip(names, (new, known), strict=True)
        about = (f"{side} {values.mean():.3g} ± {values.std():.2g}" for side, values in sides)
        alt.append(f"{name}: {', '.join(about)}")
    return picture_of(figure, "\n".join(alt))
