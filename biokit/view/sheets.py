"""Drawings of many molecules as one small image, cut into tiles by the pages that show them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from biokit.errors import DataError
from biokit.view.interactive import data_address
from biokit.view.molecules import MAX_ATOMS

COLUMNS = 10
NUM_COLOURS = 32  # of the image: drawings have few, and it is a quarter of the size
TILE = (200, 150)  # pixels


def draw_sheet(smiles: Sequence[str], tile: tuple[int, int] = TILE) -> dict[str, Any]:
    """The tiles of molecules, row by row: image (an address), width, height, columns, and which have a drawing.

    A string that is no molecule, or is too large to draw, has an empty tile; the page shows its text.
    """
    width, height = tile
    num_rows = -(-len(smiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, max(1, num_rows) * height), "white")
    drawn = []
    for i, text in enumerate(smiles):
        drawing = _draw(text, width, height)
        drawn.append(drawing is not None)
        if drawing is not None:
            sheet.paste(drawing, (i % COLUMNS * width, i // COLUMNS * height))
    buffer = io.BytesIO()
    sheet.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    image = data_address(buffer.getvalue())
    return {"image": image, "width": width, "height": height, "columns": COLUMNS, "drawn": drawn}


def _draw(text: str, width: int, height: int) -> Image.Image | None:
    from biokit.chem.draw import draw_molecule, read_molecule

    molecule = read_molecule(text)
    if molecule is None or molecule.GetNumAtoms() > MAX_ATOMS:
        return None
    try:
        return Image.open(io.BytesIO(draw_molecule(molecule, width, height))).convert("RGB")
    except DataError:
        return None
