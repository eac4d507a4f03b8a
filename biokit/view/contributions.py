"""What each atom gives to a number, as colour on the drawing: blue lowers it, vermillion raises it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from biokit.errors import DataError
from biokit.view.canvas import Rgb
from biokit.view.interactive import InteractiveView
from biokit.view.overlay import COLD, WARM, draw_overlay, draw_scale, mix, read_drawable

_NUM_NOTES = 3
_FOOT = 70


def show_contributions(
    smiles: str, values: Sequence[float] | npt.NDArray[np.floating], *, title: str = "", unit: str = ""
) -> InteractiveView:
    """A molecule whose atoms are coloured by their contributions, white at 0, on a scale alike on both sides.

    The largest ones are written beside their atoms; with scripts, pointing at an atom tells its number.

    Args:
        values: one an atom, in the order of the SMILES (`biokit.generate.attention.contributions`).
        unit: what the numbers are, for example "logP".

    Raises:
        DataError: no molecule, another number of values than atoms, NaN or infinity.
    """
    molecule = read_drawable(smiles, "contributions to a score")
    numbers = np.asarray(values, dtype=np.float64)
    symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
    if numbers.shape != (len(symbols),):
        found = f"values of shape {numbers.shape} for {len(symbols)} atoms"
        raise DataError(f'contributions to a score of "{smiles[:100]}"', found, "Give one value an atom")
    if not np.isfinite(numbers).all():
        raise DataError(f'contributions to a score of "{smiles[:100]}"', "NaN or infinity", "Give finite numbers")
    limit = float(np.abs(numbers).max()) or 1.0
    largest = [int(i) for i in np.argsort(-np.abs(numbers), kind="stable")[:_NUM_NOTES] if numbers[i]]
    title = title or "Contribution of each atom"
    overlay = draw_overlay(
        molecule,
        {i: _colour(value, limit) for i, value in enumerate(numbers.tolist())},
        {i: f"{numbers[i]:+.2g}" for i in largest},
        title,
        _FOOT,
    )
    words = f"contribution of an atom{f' ({unit})' if unit else ''}; white: none"
    draw_scale(overlay, lambda value: _colour(value, limit), -limit, limit, ("lowers", "raises"), words)
    labels = [f"{symbol}{i + 1}: {value:+.3g}{f' {unit}' if unit else ''}" for i, (symbol, value) in
              enumerate(zip(symbols, numbers.tolist(), strict=True))]  # fmt: skip
    picture = overlay.canvas.picture(_alt(smiles, title, labels, largest))
    width, height = picture.size
    data = {
        "width": width,
        "height": height,
        "radius": round(overlay.radius, 1),
        "places": [[round(x, 1), round(y, 1)] for x, y in overlay.places],
        "labels": labels,
    }
    return InteractiveView(picture.png, picture.alt, "contributions.js", data)


def _colour(value: float, limit: float) -> Rgb:
    return mix(abs(value) / limit, COLD if value < 0 else WARM)


def _alt(smiles: str, title: str, labels: Sequence[str], largest: Sequence[int]) -> str:
    head = f"{title}: {smiles}, {len(labels)} atoms, numbered in the order of the SMILES"
    first = "; ".join(labels[i] for i in largest) or "none differs from 0"
    return f"{head}\nLargest: {first}\nAll: {', '.join(labels)}"
