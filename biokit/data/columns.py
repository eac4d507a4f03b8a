"""Which column of a table holds SMILES, which the split, which a name: by name and by content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from biokit.errors import DataError

SMILES_NAMES = (
    "canonical_smiles",
    "smiles",
    "smi",
    "mol",
    "molecule",
    "structure",
    "canonicalsmiles",
    "isomeric_smiles",
)
SPLIT_NAMES = ("set", "split")
NAME_NAMES = (
    "name",
    "id",
    "cid",
    "zinc_id",
    "chembl_id",
    "cmpd_chemblid",
    "compound id",
    "title",
    "identifier",
)

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "devel": "val",
    "test": "test",
    "testing": "test",
}
"""What a split column may say, in lower case, and the part that it means."""

_MIN_SHARE = 0.5  # of a column's sampled cells must be SMILES
_NUM_PARSED = 30
_WORD = re.compile(r"[A-Za-z_][\w .()/%#-]*")
_LIKE_SMILES = re.compile(r"(?:\[[^\[\]\s]+\]|Br|Cl|[BCNOSPFIbcnops*]|[-=#$:/\\.()]|%\d\d|%\(\d+\)|\d)+")
_ATOM = re.compile(r"[A-Zbcnops\[*]")


@dataclass(frozen=True, slots=True)
class Columns:
    """Places of the columns of a table, 0-based; None: there is none. `values` are those asked for by name."""

    has_header: bool
    smiles: int
    num_columns: int
    split: int | None = None
    name: int | None = None
    smiles_name: str = ""
    split_name: str = ""
    values: tuple[int, ...] = ()

    def __str__(self) -> str:
        header = "header in its first row" if self.has_header else "no header"
        split = f', split in "{self.split_name}"' if self.split is not None else ""
        column = f'"{self.smiles_name}"' if self.smiles_name else f"column {self.smiles + 1}"
        return f"{header}, SMILES in {column}{split}"


def choose_columns(
    records: Sequence[Sequence[str]],
    table: str,
    smiles_column: str = "",
    split_column: str = "",
    value_columns: Sequence[str] = (),
    *,
    is_smi: bool = False,
    has_header: bool | None = None,
) -> Columns:
    """Choose from the first records of a table (the header, where there is one, is the first).

    Args:
        smiles_column: name or 0-based number; empty: guessed. Likewise `split_column`.
        value_columns: names or numbers of further columns whose cells are wanted.
        is_smi: SMILES come first unless a header says otherwise.

    Raises:
        DataError: no such column, none that holds SMILES, several that do, or rows that do not fit the header.
    """
    first = list(records[0])
    if has_header is None:
        has_header = _is_header(records, smiles_column, split_column, *value_columns)
    header = first if has_header else []
    rows = [row for row in records[has_header:] if is_smi or len(row) == len(first)]
    if has_header and not rows and len(records) > 1 and not is_smi:
        found = f"the header has {len(first)} fields, the rows have {len(records[1])}"
        raise DataError(f"table {table}", found, "Give every row as many fields as the header")
    if smiles_column:
        smiles = named_column(smiles_column, header, len(first), table, "Set data.smiles_column to")
    elif is_smi and not has_header:
        smiles = 0
    else:
        smiles = _guess_smiles(header, rows, first, table)
    split = _split_column(header, rows, split_column, len(first), table)
    values = tuple(named_column(asked, header, len(first), table) for asked in value_columns)
    name = next((i for i, cell in enumerate(header) if cell.lower() in NAME_NAMES and i not in (smiles, split)), None)
    return Columns(
        has_header,
        smiles,
        len(first),
        split,
        name,
        header[smiles] if header else "",
        header[split] if header and split is not None else "",
        values,
    )


def _is_header(records: Sequence[Sequence[str]], *asked: str) -> bool:
    """A first row is a header if it says so by a known name, or holds no SMILES where the rows below do."""
    first = records[0]
    known = {*SMILES_NAMES, *SPLIT_NAMES, *map(str.lower, asked)} - {""}
    if any(cell.lower() in known and not cell.isdigit() for cell in first):
        return True
    if any(_is_smiles(cell) for cell in first if len(cell) > 1):
        return False
    below = [row for row in records[1:] if len(row) == len(first)]
    return all(_WORD.fullmatch(cell) or not cell for cell in first) and any(
        _share_of_smiles([row[index] for row in below]) >= _MIN_SHARE and not _is_smiles(first[index])
        for index in range(len(first))
    )


def named_column(asked: str, header: Sequence[str], num_columns: int, table: str, do: str = "Give") -> int:
    """The place of a column, by its name (in any case, if none is spelt so) or its 0-based number.

    Raises:
        DataError: there is none, or several bear the name; `do` begins what to do.
    """
    matches = [index for index, cell in enumerate(header) if cell == asked]
    matches = matches or [index for index, cell in enumerate(header) if cell.lower() == asked.lower()]
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:
        raise DataError(
            f'table {table}: column "{asked}"', f"{len(matches)} columns bear the name", "Rename all but one"
        )
    if asked.isdigit() and int(asked) < num_columns:
        return int(asked)
    have = f"it has {', '.join(header)}" if header else f"it has no header and {num_columns} columns"
    raise DataError(f'table {table}: column "{asked}"', have, f"{do} one of them, or a 0-based number")


def _guess_smiles(header: Sequence[str], rows: Sequence[Sequence[str]], first: Sequence[str], table: str) -> int:
    num_columns = len(first)
    lower = [cell.lower().strip() for cell in header]
    shares = [_share_of_smiles([row[index] for row in rows if index < len(row)]) for index in range(num_columns)]
    by_content = [index for index in range(num_columns) if shares[index] >= _MIN_SHARE]
    for name in SMILES_NAMES:
        matches = [index for index, cell in enumerate(lower) if cell == name]
        good = [index for index in matches if index in by_content] or (matches if not by_content else [])
        if len(good) > 1:
            found = f'{len(good)} columns bear the name "{name}"'
            raise DataError(f"table {table}: the SMILES column", found, "Rename all but one, or give its number")
        if good:
            return good[0]
    if len(by_content) == 1:
        return by_content[0]
    if not by_content:
        shown = ", ".join(first)[:200]
        found = f"none holds SMILES (first row: {shown})"
        raise DataError(f"table {table}: the SMILES column", found, "Set data.smiles_column")
    several = ", ".join(header[index] if header else str(index) for index in by_content)
    raise DataError(
        f"table {table}: the SMILES column",
        f"several hold SMILES ({several})",
        "Set data.smiles_column to one of them",
    )


def _split_column(
    header: Sequence[str], rows: Sequence[Sequence[str]], asked: str, num_columns: int, table: str
) -> int | None:
    if asked:
        return named_column(asked, header, num_columns, table, "Set data.split_column to")
    places = []
    for index, cell in enumerate(header):
        if cell.lower() in SPLIT_NAMES:
            values = {row[index].strip().lower() for row in rows if index < len(row)}
            if values & PARTS.keys() or not rows:
                places.append(index)
    if len(places) > 1:
        found = f"several name parts ({', '.join(header[index] for index in places)})"
        raise DataError(f"table {table}: the split column", found, "Set data.split_column to one of them")
    return places[0] if places else None


def _share_of_smiles(cells: Sequence[str]) -> float:
    """The share of cells that are SMILES: by form first, then a few of them by parsing."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    shaped = [cell for cell in filled if _looks_like_smiles(cell)]
    if not filled or len(shaped) < _MIN_SHARE * len(filled) or max(map(len, shaped), default=0) < 2:
        return 0.0
    tried = shaped[:_NUM_PARSED]
    return len(shaped) / len(filled) * sum(map(_is_smiles, tried)) / len(tried)


def _looks_like_smiles(cell: str) -> bool:
    return len(cell) < 5000 and _LIKE_SMILES.fullmatch(cell) is not None and _ATOM.search(cell) is not None


def _is_smiles(cell: str) -> bool:
    if not _looks_like_smiles(cell):
        return False
    from biokit.chem.molecules import parse_smiles

    try:
        parse_smiles(cell)
    except DataError:
        return False
    return True
