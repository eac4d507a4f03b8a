"""How a guided optimisation went: the scores of each generation and the best so far."""

from __future__ import annotations

import math

from biokit.generate.optimisation import Optimisation
from biokit.view.comparison import COLOURS
from biokit.view.picture import Picture, frame_axes, picture_of


def show_search(found: Optimisation, *, title: str = "", name: str = "objective") -> Picture:
    """The scores of all molecules by generation (points), and the best up to each (line); 0 is the start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), dpi=100, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    steps, scores = [0], [found.start_score]
    for number, generation in enumerate(found.generations, start=1):
        real = [score for score in generation.scores if not math.isnan(score)]
        steps += [number] * len(real)
        scores += real
    best = found.best_by_generation
    axes.scatter(steps, scores, s=16, color=COLOURS[4], alpha=0.7, label="a molecule")
    axes.step(range(len(best)), best, where="post", color=COLOURS[1], linewidth=2.2, label="best so far")
    axes.axhline(found.start_score, color="#616161", linestyle=(0, (4, 3)), linewidth=1.2, label="the start")
    axes.set_xlabel("generation", fontsize=12)
    axes.set_ylabel(name, fontsize=12)
    title = title or f"{len(found.found)} different molecules scored in {len(found.generations)} generations"
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    frame_axes(axes)
    axes.legend(frameon=False, fontsize=11, loc="best")
    molecule, score = found.best
    alt = f"{title}: {name} from {found.start_score:.3f} to {score:.3f}; the best is {molecule}"
    return picture_of(figure, alt)
