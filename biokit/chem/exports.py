"""Molecules with properties as SD and CSV files, which other programs read; a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor

from biokit.chem.molecules import Mol, parse_smiles
from biokit.errors import DataError

_RECORD_END = "$$$$"
_NOT_IN_NAMES = re.compile(r"[<>\s]+|[^ -~]+")


def write_sdf(path: str | Path, smiles: Sequence[str], properties: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """Write molecules with 2D coordinates and properties; the file appears whole or not at all.

    Names of properties keep printable ASCII without spaces and angle brackets; values become one line; None and NaN
    are left out.

    Args:
        properties: name -> one value a molecule.

    Raises:
        DataError: a string that is no molecule, another number of values than molecules, two names that become one,
            or a file that cannot be written.
    """
    columns: dict[str, Sequence[Any]] = {}
    for name, values in _checked(path, smiles, properties).items():
        written = _NOT_IN_NAMES.sub("_", name).strip("_") or "property"
        if written in columns:
            raise DataError(f'write {path}: property "{name}"', f'another one is called "{written}" too', "Rename one")
        columns[written] = values
    records = []
    for row, text in enumerate(smiles):
        fields = [(name, _one_line(values[row])) for name, values in columns.items()]
        try:
            molecule = parse_smiles(text)
        except DataError as error:
            raise DataError(f"write {path}: molecule {row + 1}: {error.asked}", error.found, error.do) from error
        records.append(_block(molecule) + "".join(f">  <{name}>\n{value}\n\n" for name, value in fields if value))
    return _write(path, "".join(f"{record}{_RECORD_END}\n" for record in records))


def write_csv(path: str | Path, smiles: Sequence[str], properties: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """Write `smiles` and a column a property, as pandas reads it back; None and NaN are empty cells.

    Raises:
        DataError: another number of values than molecules, one called `smiles`, or a file that cannot be written.
    """
    columns = _checked(path, smiles, properties)
    if "smiles" in columns:
        raise DataError(f'write {path}: property "smiles"', "the molecules' own column is called so", "Rename it")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["smiles", *columns])
    writer.writerows([smiles[row], *(_cell(values[row]) for values in columns.values())] for row in range(len(smiles)))
    return _write(path, text.getvalue())


def _checked(
    path: str | Path, smiles: Sequence[str], properties: Mapping[str, Sequence[Any]] | None
) -> Mapping[str, Sequence[Any]]:
    for name, values in (properties or {}).items():
        if len(values) != len(smiles):
            found = f"{len(values)} values for {len(smiles)} molecules"
            raise DataError(f'write {path}: property "{name}"', found, "Give one value a molecule")
    return properties or {}


def _write(path: str | Path, text: str) -> Path:
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        beside.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise DataError(f"write {path}", f"it cannot be written ({error})", "Give another path") from error
    return target


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _block(molecule: Mol) -> str:
    """The mol block; without a name, which is the block's first line and might end the record."""
    with rdBase.BlockLogs():
        rdDepictor.Compute2DCoords(molecule)
        try:
            return Chem.MolToMolBlock(molecule)
        except Chem.KekulizeException:
            return Chem.MolToMolBlock(molecule, kekulize=False)


def _one_line(value: Any) -> str:
    """The value on one line, which does not end the record; empty for None and NaN."""
    text = (
        str(_cell(value)).encode("utf-8", "backslashreplace").decode("utf-8")
    )  # half a surrogate pair fits in no file
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return f" {text}" if text.startswith((_RECORD_END, ">")) else text
