"""A small table: HTML for a notebook, aligned columns for a terminal and a screen reader."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LEFT = 'style="text-align:left"'


@dataclass(frozen=True)
class Table:
    """Words in rows under a head; the first word of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __repr__(self) -> str:
        cells = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
        return "\n".join(line.rstrip() for line in padded)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        head, *lines = ([html.escape(cell) for cell in line] for line in [self.head, *self.rows])
        rows = ["".join(f'<th scope="col" {_LEFT}>{cell}</th>' for cell in head)]
        rows += [
            f'<th scope="row" {_LEFT}>{name}</th>' + "".join(f"<td {_LEFT}>{cell}</td>" for cell in cells)
            for name, *cells in lines
        ]
        table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
        return {"text/html": table, "text/plain": repr(self)}
