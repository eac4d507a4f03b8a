"""Measured properties of molecules: a table with SMILES and a target column, read, checked and put together.

Shapes: N molecules.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from biokit.data.columns import NAME_NAMES, named_column
from biokit.data.sources import locate_molecules
from biokit.data.tables import Row, read_table
from biokit.data.textfiles import LineReader
from biokit.datasets import DATASETS, locate_companions
from biokit.errors import ConfigError, DataError
from biokit.generate.embeddings import max_tokens_of, read_molecule
from biokit.models.molbart import MolBART

if TYPE_CHECKING:
    from biokit.tokenizers import SmilesTokenizer

KINDS = ("regression", "classification")
MIN_MOLECULES = 30  # below it a part of a tenth says nothing
MAX_TARGET = 1e15  # squares of larger ones leave fp32

Targets = npt.NDArray[np.float32]


class Reject(NamedTuple):
    """A row that is not used; `reason` is one of few, `detail` what was found there."""

    file: str
    row: int
    text: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PropertyData:
    """Molecules and what was measured of each.

    Attributes:
        name: of the table; `target`: of its column.
        kind: `regression` or `classification` (targets 0 and 1).
        smiles: canonical, each once.
        targets: (N,).
        num_rows: rows of the table = molecules + rejects + `num_merged`.
        num_merged: rows that repeat a molecule and went into its target (the mean in regression).
        rejects: rows that are not used (on_bad="drop"), and those of molecules whose labels contradict one another.
    """

    name: str
    target: str
    kind: str
    smiles: tuple[str, ...]
    targets: Targets
    num_rows: int
    num_merged: int = 0
    rejects: tuple[Reject, ...] = ()

    def __len__(self) -> int:
        return len(self.smiles)

    @property
    def counts(self) -> dict[str, int]:
        """Rows that are not used, by reason."""
        return dict(Counter(reject.reason for reject in self.rejects))

    def __str__(self) -> str:
        left_out = [f"{number} left out ({reason})" for reason, number in self.counts.items()]
        merged = [f"{self.num_merged} merged with an earlier row of their molecule"] if self.num_merged else []
        told = "".join(f", {part}" for part in [*merged, *left_out])
        return f"{self.name}, {self.target} ({self.kind}): {len(self):,} molecules of {self.num_rows:,} rows{told}"


def read_properties(
    table: str | Path,
    target: str,
    model: MolBART,
    tokenizer: SmilesTokenizer,
    *,
    kind: str = "auto",
    smiles_column: str = "",
    targets_table: str | Path = "",
    on_bad: str = "raise",
) -> PropertyData:
    """Read the molecules of a table that a model can take, and their target.

    Rows of one molecule (by canonical SMILES, salts kept) become one: with the mean of their targets in regression;
    in classification molecules with contradicting labels are left out. All of it is counted, see `PropertyData`.

    Args:
        table: a file that `read_table` reads, or a named data set.
        target: name (or 0-based number) of the column with the measurements.
        kind: `regression`, `classification` (0 and 1), or `auto`: classification if nothing but 0 and 1 is found.
        targets_table: a CSV file that has the targets, joined by the molecules' names; empty: the named data set's
            own second file where it has one, else the table itself.
        on_bad: `raise`, or `drop`: rows without a number or a usable molecule are left out and kept in `rejects`.

    Raises:
        ConfigError: another `kind` or `on_bad`.
        DataError: no such file or column, a bad row, too few molecules, nothing but one class or one value.
    """
    for option, value, valid in (("kind", kind, ("auto", *KINDS)), ("on_bad", on_bad, ("raise", "drop"))):
        if value not in valid:
            raise ConfigError(f"{option}={value}", "it is not known", f"Valid: {', '.join(valid)}")
    reader = _Reader(tokenizer, max_tokens_of(model), on_bad)
    for row, text in _rows_with_targets(str(table), target, smiles_column, str(targets_table)):
        reader.take(row, text)
    asked = f'{table}, target "{target}"'
    kind = _decide_kind(kind, reader, asked)
    smiles, targets = reader.merge(kind)
    num_merged = reader.num_rows - len(smiles) - len(reader.rejects)
    data = PropertyData(
        Path(table).name, target, kind, smiles, targets, reader.num_rows, num_merged, tuple(reader.rejects)
    )
    check_targets(data, asked)
    return data


def check_targets(data: PropertyData, asked: str) -> None:
    """Raises DataError where nothing can be learned: too few molecules, a class with less than 3, or one value."""
    if len(data) < MIN_MOLECULES:
        found = f"{len(data)} usable molecules in {data.num_rows} rows"
        why = "".join(f"; {number} rows: {reason}" for reason, number in data.counts.items())
        raise DataError(asked, found + why, f"Give at least {MIN_MOLECULES}")
    values, counts = np.unique(data.targets, return_counts=True)
    if data.kind == "classification" and (len(values) < 2 or counts.min() < 3):
        found = ", ".join(f"{count} of class {value:g}" for value, count in zip(values, counts, strict=True))
        raise DataError(asked, f"one class only: {found}", "Give at least 3 molecules of each of the classes 0 and 1")
    if len(values) < 2:
        raise DataError(asked, f"every target is {values[0]:g}", "Give a column whose values differ")


class _Reader:
    """Collects usable rows, and the reasons of the others."""

    def __init__(self, tokenizer: SmilesTokenizer, max_tokens: int, on_bad: str) -> None:
        self.tokenizer, self.max_tokens, self.on_bad = tokenizer, max_tokens, on_bad
        self.num_rows = 0
        self.measured: dict[str, list[tuple[Row, float]]] = {}
        self.rejects: list[Reject] = []

    def take(self, row: Row, text: str) -> None:
        self.num_rows += 1
        reason = "no molecule that the model takes"
        try:
            smiles = read_molecule(row, self.tokenizer, self.max_tokens)
            reason = "no number as target"
            value = _read_number(text)
        except DataError as error:
            if self.on_bad == "raise":
                shown = f"{row.file} row {row.row}" + (f": {error.asked}" if error.asked else "")
                raise DataError(shown, error.found, 'Mend the row, or pass on_bad="drop"') from error
            self._reject(row, reason, error.found)
            return
        self.measured.setdefault(smiles, []).append((row, value))

    def merge(self, kind: str) -> tuple[tuple[str, ...], Targets]:
        """Each molecule once, with its target."""
        targets: dict[str, float] = {}
        for smiles, found in self.measured.items():
            values = [value for _, value in found]
            if kind == "classification" and len(set(values)) > 1:
                for row, value in found:
                    self._reject(row, "labels of one molecule contradict one another", f"{value:g} here")
            else:
                targets[smiles] = math.fsum(values) / len(values)
        return tuple(targets), np.array(list(targets.values()), dtype=np.float32)

    def _reject(self, row: Row, reason: str, detail: str) -> None:
        self.rejects.append(Reject(row.file, row.row, row.name if row.is_mol_block else row.text, reason, detail))


def _read_number(text: str) -> float:
    asked, do = f'target "{text[:80]}"', "Give a number"
    if not text:
        raise DataError(asked, "it is empty", do)
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(asked, f'its target "{text[:80]}" is no number', do) from error
    if not abs(value) <= MAX_TARGET:
        raise DataError(asked, f'its target "{text[:80]}" is not finite, or beyond {MAX_TARGET:g}', do)
    return value


def _decide_kind(kind: str, reader: _Reader, asked: str) -> str:
    """What `auto` means here. Raises DataError for a classification with other targets than 0 and 1."""
    values = {value for found in reader.measured.values() for _, value in found}
    if kind == "auto":
        return "classification" if values and values <= {0.0, 1.0} else "regression"
    if kind == "classification" and not values <= {0.0, 1.0}:
        other = min(values - {0.0, 1.0})
        raise DataError(asked, f"{other:g} is among its targets", "Write the classes as 0 and 1, or ask for regression")
    return kind


def _rows_with_targets(table: str, target: str, smiles_column: str, targets_table: str) -> Iterator[tuple[Row, str]]:
    """Rows, and what stands in the target column."""
    path = locate_molecules(table)
    if table in DATASETS and not Path(table).exists() and not targets_table:
        tables = [str(other) for other in locate_companions(table) if other.suffix == ".csv"]
        targets_table = tables[0] if tables else ""
    if not targets_table:
        for row in read_table(path, smiles_column=smiles_column, value_columns=(target,)):
            yield row, row.values[0] if row.values else ""
        return
    by_name = _read_named(Path(targets_table), target)
    for row in read_table(path, smiles_column=smiles_column):
        if row.name not in by_name and not row.problem:
            row = row._replace(problem=f'no row "{row.name[:80]}"', detail=f"in {targets_table}")
        yield row, by_name.get(row.name, "")


def _read_named(path: Path, target: str) -> dict[str, str]:
    """Name -> target, of a CSV file with a header; names stand in a column that bears a usual name, else the first."""
    with LineReader(path) as lines:
        records = [record for record in csv.reader(lines, skipinitialspace=True) if any(record)]
    if not records:
        raise DataError(f"table {path}", "it is empty", "Fill it")
    header, *rows = records
    column = named_column(target, header, len(header), str(path))
    names = [place for place, cell in enumerate(header) if cell.strip().lower() in NAME_NAMES and place != column]
    name = names[0] if names else 0
    _check_named(path, header, rows, name)
    return {row[name].strip(): row[column].strip() for row in rows}


def _check_named(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], name: int) -> None:
    """Raises DataError where a row has other fields than the header, or a name stands twice."""
    ragged = next((row for row in rows if len(row) != len(header)), None)
    if ragged is not None:
        found = f'a row has {len(ragged)} fields ("{",".join(ragged)[:80]}"), the header {len(header)}'
        raise DataError(f"table {path}", found, "Give every row as many fields as the header")
    again, count = Counter(row[name].strip() for row in rows).most_common(1)[0] if rows else ("", 0)
    if count > 1:
        raise DataError(f"table {path}", f'"{again[:80]}" stands there {count} times', "Give each name once")
