"""A 2D drawing with a coloured disc under each atom, its title, and a scale under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biokit.errors import DataError
from biokit.view.canvas import FRAME, GREY, Canvas, Rgb
from biokit.view.molecules import MAX_ATOMS

WIDTH, HEIGHT = 680, 400  # of the drawing in pixels
_MARGIN = 12
_BAR = (240, 14)
_STEPS = 60
_ANGLES = [math.pi * k / 6 for k in range(12)]

# The ends of the scales: Okabe-Ito blue and vermillion, so pale that black letters read on them
COLD: Rgb = (0.38, 0.67, 0.90)
WARM: Rgb = (0.96, 0.56, 0.30)


@dataclass(frozen=True)
class Overlay:
    """A drawing: the sheet, and for each atom its pixel (x, y) on the sheet; `radius` of the discs in pixels."""

    canvas: Canvas
    places: list[tuple[float, float]]
    radius: float


def read_drawable(smiles: str, what: str) -> Any:
    """The molecule to draw on.

    Raises:
        DataError: it is none, or too large to tell its atoms apart.
    """
    from biokit.chem.draw import read_molecule

    molecule = read_molecule(smiles)
    if molecule is None:
        raise DataError(f'{what} of "{smiles[:100]}"', "it is not a molecule", "Give a valid SMILES")
    if not 1 <= (num_atoms := molecule.GetNumAtoms()) <= MAX_ATOMS:
        raise DataError(f'{what} of "{smiles[:100]}"', f"{num_atoms} atoms", f"Give 1 to {MAX_ATOMS}")
    return molecule


def draw_overlay(
    molecule: Any, colours: Mapping[int, Rgb], notes: Mapping[int, str], title: str, foot: int = 0
) -> Overlay:
    """The title, the drawing, and `foot` pixels below it.

    Args:
        colours: atom -> colour of its disc.
        notes: atom -> short text beside its disc.
    """
    from biokit.chem.draw import OVERLAY_RADIUS, draw_with_places

    head = 34 if title else _MARGIN
    canvas = Canvas(WIDTH + 2 * _MARGIN, head + HEIGHT + foot)
    if title:
        canvas.text(_MARGIN, 19, title if len(title) <= 90 else title[:89] + "…", size=15, bold=True)
    png, drawn = draw_with_places(molecule, WIDTH, HEIGHT, colours)
    canvas.image(png, _MARGIN, head, behind=True)
    places = [(x + _MARGIN, y + head) for x, y in drawn]
    radius = OVERLAY_RADIUS / 1.5 * _bond_length(molecule, places)
    for index, text in notes.items():
        canvas.text(*_free_place(places, index, radius), text, size=13, align="center", bold=True)
    return Overlay(canvas, places, radius)


def draw_scale(
    overlay: Overlay, colour: Callable[[float], Rgb], low: float, high: float, ends: Sequence[str], words: str
) -> None:
    """The bar of colours in the last 58 pixels: numbers at its ends and in its middle, and what the ends mean."""
    canvas, (width, height) = overlay.canvas, _BAR
    left, top = (canvas.width - width) / 2, canvas.height - 52
    for step in range(_STEPS):
        value = low + (high - low) * (step + 0.5) / _STEPS
        canvas.bar(left + width * step / _STEPS, top, width / _STEPS + 0.5, height, colour(value))
    for x in (left, left + width):
        canvas.line((x, top), (x, top + height), FRAME)
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        canvas.text(left + share * width, top + height + 9, f"{value:.2g}", size=12, align="center")
    canvas.text(left - 12, top + height / 2, ends[0], size=12, align="right", colour=GREY)
    canvas.text(left + width + 12, top + height / 2, ends[1], size=12, colour=GREY)
    canvas.text(canvas.width / 2, canvas.height - 12, words, size=12, align="center", colour=GREY)


def mix(share: float, end: Rgb) -> Rgb:
    """White for 0, `end` for 1."""
    red, green, blue = (1 + share * (part - 1) for part in end)
    return red, green, blue


def _free_place(places: Sequence[tuple[float, float]], index: int, radius: float) -> tuple[float, float]:
    """Where a short text stands beside an atom's disc, as far from the other atoms as can be."""
    x, y = places[index]
    around = [(x + (radius + 24) * math.cos(angle), y + (radius + 9) * math.sin(angle)) for angle in _ANGLES]
    others = [place for i, place in enumerate(places) if i != index]
    return max(around, key=lambda place: min((math.dist(place, other) for other in others), default=0.0))


def _bond_length(molecule: Any, places: Sequence[tuple[float, float]]) -> float:
    """The middle one in pixels; of a molecule without bonds what a bond would have."""
    ends = ((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds())
    pairs = ((places[first], places[second]) for first, second in ends)
    lengths = sorted(math.dist(first, second) for first, second in pairs)
    return lengths[len(lengths) // 2] if lengths else 50.0
