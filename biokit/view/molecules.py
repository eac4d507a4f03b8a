"""Pictures of molecules and of their tokens: grids, masked spans, and the orders that random SMILES are written in.

Every function returns a `Picture` (PNG and words), never fails on a string that is no molecule, and works offline.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biokit.errors import DataError
from biokit.view.canvas import BLUE, FRAME, GREY, INK, ORANGE, PALE, VERMILLION, Canvas
from biokit.view.picture import Picture
from biokit.vocabularies import SPECIAL_TOKENS

MAX_ATOMS = 400  # more cannot be told apart in a tile: such a molecule is shown as text
_LEGEND_LINES = 3
_MARGIN = 12
_ALT_ROWS = 24
_BOX = 25  # height of a token's box


@dataclass(frozen=True)
class TokenRow:
    """One row of tokens: a heading, the tokens, and which of them to mark as hidden from the model (or none)."""

    label: str
    tokens: Sequence[str]
    hidden: Sequence[bool] = ()

    def __post_init__(self) -> None:
        if len(self.hidden) not in (0, len(self.tokens)):
            raise DataError(
                f'token row "{self.label}"',
                f"{len(self.tokens)} tokens but {len(self.hidden)} marks",
                "Give one mark a token, or none",
            )


def show_molecules(
    smiles: Sequence[str],
    legends: Sequence[str] = (),
    *,
    title: str = "",
    columns: int = 4,
    max_molecules: int = 40,
) -> Picture:
    """Draw molecules in a grid; a string that is no molecule gets a framed tile with its text.

    Args:
        legends: one line or more under each tile; empty: the SMILES.
        max_molecules: the rest is counted, not drawn.

    Raises:
        DataError: another number of legends than molecules, or no column.
    """
    from biokit.chem.draw import read_molecule

    if legends and len(legends) != len(smiles):
        found = f"{len(smiles)} molecules but {len(legends)} legends"
        raise DataError("grid of molecules", found, "Give one legend a molecule, or none")
    if columns < 1 or max_molecules < 1:
        found = f"columns={columns}, max_molecules={max_molecules}"
        raise DataError("grid of molecules", found, "Give 1 or more of each")
    shown = list(smiles[:max_molecules])
    molecules = [read_molecule(text) for text in shown]
    texts = list(legends[:max_molecules]) or [t if m is not None else "" for t, m in zip(shown, molecules, strict=True)]
    sizes = [molecule.GetNumAtoms() for molecule in molecules if molecule is not None]
    width, height, columns = _tile_size(sizes, columns)
    columns = max(1, min(columns, len(shown)))
    per_line = (width - 12) // (8 if legends else 7)
    lines = [_wrap(text, per_line, _LEGEND_LINES) if text else [] for text in texts]
    legend_height = 8 + 16 * max((len(rows) for rows in lines), default=1)
    head = 34 if title else _MARGIN
    num_rows = -(-len(shown) // columns)
    rest = len(smiles) - len(shown)
    canvas = Canvas(
        max(360, columns * width + 2 * _MARGIN),
        head + max(1, num_rows) * (height + legend_height) + (24 if rest else 0) + _MARGIN,
    )
    if title:
        canvas.text(_MARGIN, 19, _shorten(title), size=15, bold=True)
    for i, molecule in enumerate(molecules):
        x = _MARGIN + i % columns * width
        y = head + i // columns * (height + legend_height)
        _draw_tile(canvas, molecule, shown[i], x, y, width, height)
        for k, line in enumerate(lines[i]):
            canvas.text(
                x + width / 2,
                y + height + 8 + 16 * k,
                line,
                size=12 if legends else 11,
                align="center",
                mono=not legends,
            )
    if not shown:
        canvas.text(canvas.width / 2, head + 60, "no molecules", size=14, align="center", colour=GREY)
    if rest:
        canvas.text(_MARGIN, canvas.height - 18, f"and {rest} more that are not drawn", size=12, colour=GREY)
    return canvas.picture(_grid_alt(shown, list(legends[:max_molecules]), molecules, rest, title))


def show_tokens(smiles: str, rows: Sequence[TokenRow], *, title: str = "") -> Picture:
    """Draw a molecule above rows of its tokens; atoms and tokens that the first row marks as hidden stand out alike."""
    from biokit.chem.draw import atoms_of_tokens, read_molecule

    molecule = read_molecule(smiles)
    highlights = {}
    if molecule is not None and rows and rows[0].hidden:
        chemistry = [i for i, token in enumerate(rows[0].tokens) if token not in SPECIAL_TOKENS]
        written = "".join(rows[0].tokens[i] for i in chemistry)
        molecule = read_molecule(written) or molecule
        atoms = atoms_of_tokens(molecule, [rows[0].tokens[i] for i in chemistry])
        highlights = {atom: ORANGE for position, atom in atoms.items() if rows[0].hidden[chemistry[position]]}
    width, head, height = 960, 34 if title else _MARGIN, 250
    laid_out = [_lay_out(row.tokens, width - 2 * _MARGIN) for row in rows]
    heights = [28 + (_BOX + 6) * (1 + max((line for _, line, _ in boxes), default=0)) + 8 for boxes in laid_out]
    canvas = Canvas(width, head + height + 14 + sum(heights) + 40)
    if title:
        canvas.text(_MARGIN, 19, _shorten(title), size=15, bold=True)
    _draw_tile(canvas, molecule, smiles, _MARGIN, head, width - 2 * _MARGIN, height, highlights)
    if highlights:
        words = f'orange atoms: hidden in "{_shorten(rows[0].label, 60)}"'
        canvas.text(width / 2, head + height + 8, words, size=12, align="center", colour=GREY)
    y = head + height + 14
    for row, boxes, row_height in zip(rows, laid_out, heights, strict=True):
        canvas.text(_MARGIN, y + 14, row.label, size=13, bold=True)
        for i, (x, line, box_width) in enumerate(boxes):
            hidden = bool(row.hidden) and bool(row.hidden[i])
            _draw_token(canvas, row.tokens[i], hidden, _MARGIN + x, y + 28 + line * (_BOX + 6), box_width)
        y += row_height
    _draw_key(canvas, rows, y + 4)
    return canvas.picture(_token_alt(smiles, rows, title))


def show_random_smiles(smiles: Sequence[str], *, title: str = "", columns: int = 4) -> Picture:
    """Draw several SMILES of one molecule in the same pose; shade and number say in which order each writes the atoms.

    Raises:
        DataError: a string is no molecule, or they are not all the same molecule.
    """
    from matplotlib import colormaps

    from biokit.chem.draw import Rgb, align_drawings, draw_molecule, read_molecule

    molecules = []
    for number, text in enumerate(smiles, start=1):
        molecule = read_molecule(text)
        if molecule is None:
            raise DataError(
                f"random SMILES {number} of {len(smiles)}", f'"{text}" is not a molecule', "Give valid SMILES"
            )
        molecules.append(molecule)
    align_drawings(molecules)
    width, height, columns = _tile_size([m.GetNumAtoms() for m in molecules], columns)
    columns = max(1, min(columns, len(molecules)))
    lines = [textwrap.wrap(text, (width - 16) // 7, break_on_hyphens=False) for text in smiles]
    legend_height = 12 + 15 * max((len(rows) for rows in lines), default=1)
    head = 34 if title else _MARGIN
    num_rows = max(1, -(-len(molecules) // columns))
    canvas = Canvas(max(420, columns * width + 2 * _MARGIN), head + num_rows * (height + legend_height) + 30)
    if title:
        canvas.text(_MARGIN, 19, _shorten(title), size=15, bold=True)
    shades = colormaps["YlGnBu"]
    for i, molecule in enumerate(molecules):
        num_atoms = molecule.GetNumAtoms()
        colours: dict[int, Rgb] = {}
        for atom in range(num_atoms):
            red, green, blue = shades(0.08 + 0.5 * atom / max(1, num_atoms - 1))[:3]
            colours[atom] = (red, green, blue)
        notes = {atom: str(atom + 1) for atom in range(num_atoms) if num_atoms <= 40}
        x = _MARGIN + i % columns * width
        y = head + i // columns * (height + legend_height)
        canvas.image(draw_molecule(molecule, width - 8, height - 8, colours, notes), x + 4, y + 4)
        for k, line in enumerate(lines[i]):
            canvas.text(x + 8, y + height + 8 + 15 * k, line, size=11.5, mono=True)
    words = "Shade (pale to dark) and numbers: the order in which the string names the atoms"
    canvas.text(_MARGIN, canvas.height - 14, words, size=12, colour=GREY)
    alt = [title or f"{len(smiles)} SMILES of one molecule, its atoms shaded in the order in which each names them:"]
    return canvas.picture("\n".join([*alt, *(f"{i}. {text}" for i, text in enumerate(smiles, start=1))]))


def _tile_size(num_atoms: Sequence[int], columns: int) -> tuple[int, int, int]:
    """Tile width and height in pixels and the columns that fit in about 960: large molecules get larger tiles."""
    largest = max((n for n in num_atoms if n <= MAX_ATOMS), default=0)
    if largest <= 45:
        return 235, 190, columns
    if largest <= 100:
        return 310, 260, min(columns, 3)
    return 470, 400, min(columns, 2)


def _draw_tile(
    canvas: Canvas,
    molecule: Any,
    text: str,
    x: float,
    y: float,
    width: int,
    height: int,
    highlights: dict[int, tuple[float, float, float]] | None = None,
) -> None:
    """The molecule, or a framed tile with its text where it is none or cannot be drawn."""
    from biokit.chem.draw import draw_molecule

    reason = "not a molecule"
    if molecule is not None:
        num_atoms = molecule.GetNumAtoms()
        reason = f"{num_atoms} atoms: too many to draw"
        if num_atoms <= MAX_ATOMS:
            try:
                canvas.image(draw_molecule(molecule, width - 8, height - 8, highlights), x + 4, y + 4)
            except DataError:
                reason = "rdkit cannot draw it"
            else:
                return
    canvas.box(x + 8, y + 8, width - 16, height - 16, fill=PALE, edge=FRAME, dashed=True)
    canvas.text(x + width / 2, y + 26, reason, size=12, bold=True, align="center", colour=VERMILLION)
    for k, line in enumerate(_wrap(text, (width - 36) // 7, (height - 60) // 15)):
        canvas.text(x + 18, y + 48 + 15 * k, line, size=11.5, mono=True)


def _lay_out(tokens: Sequence[str], width: int) -> list[tuple[float, int, float]]:
    """(x, line, box width) of each token's box, wrapped into lines of at most `width` pixels."""
    boxes: list[tuple[float, int, float]] = []
    x, line = 0.0, 0
    for token in tokens:
        box_width = 12.0 + 8.0 * max(1, len(token))
        if x and x + box_width > width:
            x, line = 0.0, line + 1
        boxes.append((x, line, box_width))
        x += box_width + 4
    return boxes


def _draw_token(canvas: Canvas, token: str, hidden: bool, x: float, y: float, width: float) -> None:
    """Kinds differ in fill and in frame, so that they can be told apart without colour."""
    fill, edge, line_width, dashed, ink = PALE, FRAME, 1.0, False, INK
    if token == "<MASK>":
        fill, edge, ink = BLUE, BLUE, (1.0, 1.0, 1.0)
    elif hidden:
        fill, edge, line_width = ORANGE, INK, 2.0
    elif token in SPECIAL_TOKENS:
        fill, dashed = (1.0, 1.0, 1.0), True
    canvas.box(x, y, width, _BOX, fill=fill, edge=edge, line_width=line_width, dashed=dashed)
    canvas.text(x + width / 2, y + _BOX / 2, token, size=13, mono=True, align="center", colour=ink, bold=hidden)


def _draw_key(canvas: Canvas, rows: Sequence[TokenRow], y: float) -> None:
    kinds = [("C", True, "hidden from the encoder")] if any(any(row.hidden) for row in rows) else []
    used = {token for row in rows for token in row.tokens}
    kinds += [("<MASK>", False, "mask")] if "<MASK>" in used else []
    kinds += [("^", False, "begin, end and other special tokens")] if used & {*SPECIAL_TOKENS} - {"<MASK>"} else []
    x = float(_MARGIN)
    for token, hidden, words in kinds:
        box_width = 12.0 + 8.0 * len(token)
        _draw_token(canvas, token, hidden, x, y, box_width)
        canvas.text(x + box_width + 8, y + _BOX / 2, words, size=12, colour=GREY)
        x += box_width + 34 + 7 * len(words)


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width, break_on_hyphens=False)]
    if not lines:
        return ["(empty)"]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1][: width - 1] + "…"]
    return lines


def _shorten(text: str, max_length: int = 100) -> str:
    return (text if len(text) <= max_length else text[: max_length - 1] + "…") or "(empty)"


def _grid_alt(shown: Sequence[str], legends: Sequence[str], molecules: Sequence[object], rest: int, title: str) -> str:
    invalid = sum(molecule is None for molecule in molecules)
    head = f"{title + ': ' if title else ''}{len(shown)} molecule{'' if len(shown) == 1 else 's'} drawn"
    head += f", {invalid} of them as text because not valid" if invalid else ""
    head += f", {rest} more not drawn" if rest else ""
    lines = [head]
    for i, text in enumerate(shown[:_ALT_ROWS]):
        note = f" ({' '.join(legends[i].split())})" if legends and legends[i] != text else ""
        mark = "" if molecules[i] is not None else " [not valid]"
        lines.append(f"{i + 1}. {_shorten(text)}{note}{mark}")
    if len(shown) > _ALT_ROWS:
        lines.append(f"… and {len(shown) - _ALT_ROWS} more")
    return "\n".join(lines)


def _token_alt(smiles: str, rows: Sequence[TokenRow], title: str) -> str:
    lines = [f"{title + ': ' if title else ''}tokens of {smiles} (hidden ones in [brackets])"]
    for row in rows:
        marks = row.hidden or [False] * len(row.tokens)
        words = (f"[{token}]" if mark else token for token, mark in zip(row.tokens, marks, strict=True))
        lines.append(f"{row.label}: {' '.join(words)}")
    return "\n".join(lines)
