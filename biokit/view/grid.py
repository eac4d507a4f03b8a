"""A grid of molecules to sort, look through and select from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from biokit.errors import DataError
from biokit.view.interactive import InteractiveView
from biokit.view.molecules import show_molecules
from biokit.view.sheets import draw_sheet

MAX_MOLECULES = 300  # about 2 kB each in the notebook
STATIC_MOLECULES = 12

Column = Sequence[float] | Sequence[str]


def show_grid(
    smiles: Sequence[str],
    columns: Mapping[str, Column] | None = None,
    *,
    title: str = "",
    legend: str = "",
    max_molecules: int = MAX_MOLECULES,
) -> InteractiveView:
    """Molecules in a grid: sort by any column, hover for all values, click to select, copy the selection as SMILES.

    Args:
        columns: name -> one value a molecule, numbers or words; NaN is shown as a dash and sorted to the end.
        legend: the column under each tile; empty: the first one.
        max_molecules: the rest is counted, not shown.

    Raises:
        DataError: a column of another length, an unknown legend, or fewer than 1 molecule to show.
    """
    columns = dict(columns or {})
    for name, column in columns.items():
        if len(column) != len(smiles):
            found = f"{len(column)} values for {len(smiles)} molecules"
            raise DataError(f'grid of molecules: column "{name}"', found, "Give one value a molecule")
    if legend and legend not in columns:
        valid = ", ".join(columns) or "none, there is no column"
        raise DataError(f'grid of molecules: legend "{legend}"', "there is no such column", f"Valid: {valid}")
    if max_molecules < 1:
        raise DataError("grid of molecules", f"max_molecules={max_molecules}", "Give 1 or more")
    shown = list(smiles[:max_molecules])
    legend = legend or next(iter(columns), "")
    values = [[plain(value) for value in column[:max_molecules]] for column in columns.values()]
    legends = [f"{legend} {_words(value)}" for value in columns[legend][:STATIC_MOLECULES]] if legend else []
    static = show_molecules(
        smiles if not legend else smiles[:STATIC_MOLECULES],
        legends,
        title=title or f"{len(smiles)} molecules",
        max_molecules=STATIC_MOLECULES,
    )
    data = {
        "title": title,
        "smiles": shown,
        "columns": list(columns),
        "values": values,
        "legend": list(columns).index(legend) if legend else -1,
        "rest": len(smiles) - len(shown),
        "sheet": draw_sheet(shown),
    }
    return InteractiveView(static.png, static.alt, "grid.js", data)


def plain(value: Any) -> float | str | None:
    """A value as JSON has it: numbers to four digits, words, None for NaN and None."""
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _words(value: Any) -> str:
    shown = plain(value)
    return "–" if shown is None else f"{shown:g}" if isinstance(shown, float) else shown
