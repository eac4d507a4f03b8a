"""Rows of molecules from tables: CSV and TSV, .smi, .sdf, Parquet; text forms plain or gzip; streamed.

A row that cannot be read stays a row, with the cause in `problem`; a file that cannot be read as asked is refused with
file, row and cause. So no row is lost without a word: blank rows come too.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from biokit.data.columns import PARTS, SMILES_NAMES, SPLIT_NAMES, Columns, choose_columns
from biokit.data.paths import expand_paths
from biokit.data.textfiles import LineReader, check_file
from biokit.errors import DataError

BLANK = "blank row"
RAGGED = "ragged row"
QUOTING = "bad quoting"
LONG_FIELD = "field too long"
BROKEN_RECORD = "broken record"

MAX_RECORD_LINES = 200_000
_SAMPLE_ROWS = 100
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_DATA_FIELD = re.compile(r">.*?<([^<>]+)>")


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        row: 1-based line on which it begins (text), or 1-based record (.sdf, Parquet).
        text: the SMILES, or for .sdf the mol block (`is_mol_block`).
        split: what the split column says; "" without one.
        problem: why it cannot be used; "" for a row that was read.
        values: the cells of the columns that were asked for; "" where one is empty.
    """

    file: str
    row: int
    text: str
    split: str = ""
    name: str = ""
    problem: str = ""
    detail: str = ""
    is_mol_block: bool = False
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TableForm:
    """How a file is read: `kind` (csv, smi, sdf, parquet), delimiter, header and columns."""

    path: Path
    kind: str
    columns: Columns
    delimiter: str = ""
    value_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        between = f", {_DELIMITERS.get(self.delimiter, 'white space')} separated" if self.delimiter else ""
        return f"{self.path.name}: {self.kind}{between}, {self.columns}"


def read_table(
    paths: str | Path | Sequence[str | Path],
    *,
    smiles_column: str = "",
    split_column: str = "",
    value_columns: Sequence[str] = (),
) -> Iterator[Row]:
    """Stream the rows of one or several tables (ranges and comma lists as in `expand_paths`).

    Args:
        smiles_column: a column's name, or its 0-based number; empty: guessed from names and content.
        split_column: likewise; empty: `set` or `split` where its values name parts.
        value_columns: further columns (for .sdf: data fields) whose cells the rows are to have, as text.

    Raises:
        DataError: missing files at once; what is wrong inside a file when its rows are reached.
    """
    files = expand_paths(paths)
    values = tuple(value_columns)
    return itertools.chain.from_iterable(_read_file(path, smiles_column, split_column, values) for path in files)


def describe_table(
    path: str | Path, *, smiles_column: str = "", split_column: str = "", value_columns: Sequence[str] = ()
) -> TableForm:
    """How `read_table` would read a file. Raises DataError where it would."""
    path = Path(path)
    kind = _kind(path)
    if kind == "parquet":
        return _describe_parquet(path, smiles_column, split_column, value_columns)
    if kind == "sdf":
        split_name = split_column or _guess_split_field(path)
        columns = Columns(has_header=False, smiles=0, num_columns=1, split_name=split_name)
        return TableForm(path, kind, columns, value_names=tuple(value_columns))
    with LineReader(path) as lines:
        sample = list(itertools.islice(lines, _SAMPLE_ROWS))
    if not any(line.strip() for line in sample):
        raise DataError(f"table {path}", "it is empty" if not sample else "it begins with blank rows only", "Fill it")
    delimiter = "" if kind == "smi" else _sniff(sample, path)
    if not delimiter:
        kind, delimiter = "smi", _sniff_smi(sample)
    records = [record for record in _split_sample(sample, delimiter) if any(record)]
    if not records:
        found = f"none of its first {len(sample)} rows can be read (bad quoting)"
        raise DataError(f"table {path}", found, "Is this a table?")
    columns = choose_columns(records, str(path), smiles_column, split_column, value_columns, is_smi=kind == "smi")
    return TableForm(path, kind, columns, delimiter)


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".sdf"):
        return "sdf"
    return "smi" if name.endswith((".smi", ".smiles")) else "csv"


def _read_file(path: Path, smiles_column: str, split_column: str, value_columns: Sequence[str]) -> Iterator[Row]:
    form = describe_table(path, smiles_column=smiles_column, split_column=split_column, value_columns=value_columns)
    if form.kind == "parquet":
        yield from _read_parquet(form)
        return
    with LineReader(path) as lines:
        if form.kind == "sdf":
            yield from _read_sdf(lines, form)
        elif form.delimiter == " ":
            yield from _read_words(lines, form)
        else:
            yield from _read_csv(lines, form)


# CSV, TSV and .smi ---------------------------------------------------------------------------------------------------


def _reader(lines: Iterable[str], delimiter: str) -> Any:
    return csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")


def _read_csv(lines: LineReader, form: TableForm) -> Iterator[Row]:
    reader = _reader(lines, form.delimiter)
    file, columns = str(form.path), form.columns
    skip_header = columns.has_header
    while True:
        first_line = lines.num_lines + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield _bad_record(error, file, first_line, lines)
            continue
        if record is None:
            return
        if skip_header and any(record):
            skip_header = False
        else:
            yield _to_row(record, file, first_line, columns)


def _to_row(record: Sequence[str], file: str, number: int, columns: Columns) -> Row:
    """A record as a row; blank and ragged ones say so."""
    if len(record) == columns.num_columns:
        text = record[columns.smiles].strip()
        split = record[columns.split].strip() if columns.split is not None else ""
        name = record[columns.name].strip() if columns.name is not None else ""
        if text or any(cell.strip() for cell in record):
            return Row(file, number, text, split, name, values=tuple(record[i].strip() for i in columns.values))
        return Row(file, number, "", problem=BLANK)
    if not any(cell.strip() for cell in record):
        return Row(file, number, "", problem=BLANK)
    detail = f"{len(record)} fields, {columns.num_columns} expected"
    return Row(file, number, ",".join(record), problem=RAGGED, detail=detail)


def _bad_record(error: csv.Error, file: str, first_line: int, lines: LineReader) -> Row:
    """One torn line is a bad row; a quote that swallowed further lines makes the file unreadable."""
    last_line = lines.num_lines
    if last_line > first_line or "unexpected end" in str(error):
        raise DataError(
            f"{file} row {first_line}",
            f"a quote that opens here is not closed properly before row {max(last_line, first_line)} ({error})",
            "Close or double the quote",
        ) from error
    problem = LONG_FIELD if "field limit" in str(error) else QUOTING
    return Row(file, first_line, lines.line.rstrip("\r\n"), problem=problem, detail=str(error))


def _read_words(lines: LineReader, form: TableForm) -> Iterator[Row]:
    """A .smi file separated by white space: the SMILES, then a name that may hold blanks."""
    file, columns = str(form.path), form.columns
    skip_header = columns.has_header
    for line in lines:
        words = line.split()
        if skip_header and words:
            skip_header = False
        elif not words:
            yield Row(file, lines.num_lines, "", problem=BLANK)
        elif columns.has_header and columns.smiles > 0:
            yield _to_row(words, file, lines.num_lines, columns)
        elif len(words) > 1 and words[1][0] == "|":  # a CXSMILES extension belongs to the molecule
            yield Row(file, lines.num_lines, line.strip())
        else:
            split = words[columns.split] if columns.split is not None and len(words) > columns.split else ""
            values = tuple(words[i] if i < len(words) else "" for i in columns.values)
            yield Row(file, lines.num_lines, words[0], split, " ".join(words[1:]), values=values)


def _sniff_smi(sample: Sequence[str]) -> str:
    """A tab where a header says what stands in which column, else white space: the SMILES, then the name."""
    first = next(line for line in sample if line.strip())
    cells = [cell.strip().lower() for cell in first.split("\t")]
    return "\t" if len(cells) > 1 and set(cells) & set(SMILES_NAMES) else " "


def _sniff(sample: Sequence[str], path: Path) -> str:
    """The delimiter that cuts the most rows into as many fields as the first, at least two; else one column.

    "" for a .txt that no delimiter cuts: it is read as .smi.
    """
    first = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    best, best_share = first, 0.0
    for delimiter in sorted(_DELIMITERS, key=lambda delimiter: delimiter != first):
        records = [record for record in _split_sample(sample, delimiter) if any(record)]
        width = len(records[0]) if records else 1
        share = sum(len(record) == width for record in records) / len(records) if width > 1 else 0.0
        if share > best_share + 0.2:
            best, best_share = delimiter, share
    return "" if not best_share and path.name.lower().removesuffix(".gz").endswith(".txt") else best


def _split_sample(sample: Sequence[str], delimiter: str) -> list[list[str]]:
    """The whole records of the first lines; the last is left out where the sample may end inside it."""
    if delimiter == " ":
        return [line.split() for line in sample]
    records: list[list[str]] = []
    reader = _reader(iter(sample), delimiter)
    while True:
        try:
            record = next(reader, None)
        except csv.Error:
            continue
        if record is None:
            return records
        records.append([cell.strip() for cell in record])


# SDF -----------------------------------------------------------------------------------------------------------------


def _read_sdf(lines: LineReader, form: TableForm) -> Iterator[Row]:
    file, split_name = str(form.path), form.columns.split_name
    for number, record in enumerate(_sdf_records(lines), start=1):
        block, fields = _split_record(record)
        name = record[0].strip() if record else ""
        split = fields.get(split_name, "")
        if not any(line.strip() for line in record):
            yield Row(file, number, "", problem=BLANK)
        elif "M  END" not in block:
            yield Row(file, number, block, split, name, BROKEN_RECORD, "no line M  END", True)
        else:
            values = tuple(fields.get(field, "") for field in form.value_names)
            yield Row(file, number, block, split, name, is_mol_block=True, values=values)


def _sdf_records(lines: LineReader) -> Iterator[list[str]]:
    record: list[str] = []
    for line in lines:
        if line.startswith("$$$$"):
            yield record
            record = []
            continue
        record.append(line.rstrip("\r\n"))
        if len(record) > MAX_RECORD_LINES:
            found = f"a record of more than {MAX_RECORD_LINES:,} lines"
            raise DataError(f"{lines.path} row {lines.num_lines}", found, "End each record with $$$$")
    if any(line.strip() for line in record):
        yield record


def _split_record(record: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The mol block and the data fields of a record."""
    fields: dict[str, str] = {}
    end = next((index for index, line in enumerate(record) if line.startswith("M  END")), None)
    if end is None:
        return "\n".join(record), fields
    tail = record[end + 1 :]
    for line, value in itertools.pairwise(tail):
        tag = _DATA_FIELD.match(line)
        if tag:
            fields[tag[1]] = value.strip()
    return "\n".join(record[: end + 1]) + "\n", fields


def _guess_split_field(path: Path) -> str:
    """The field `set` or `split` of the first records, if its values name parts; else ""."""
    values: dict[str, set[str]] = {}
    with LineReader(path) as lines:
        for record in itertools.islice(_sdf_records(lines), _SAMPLE_ROWS):
            for key, value in _split_record(record)[1].items():
                if key.lower() in SPLIT_NAMES:
                    values.setdefault(key, set()).add(value.lower())
    return next((key for key, found in values.items() if found & PARTS.keys()), "")


# Parquet -------------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"table {path}", "pyarrow is not installed", "pip install pyarrow") from error
    check_file(path)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise DataError(f"table {path}", f"it cannot be read as Parquet ({found})", "Get the file again") from error


def _describe_parquet(path: Path, smiles_column: str, split_column: str, value_columns: Sequence[str]) -> TableForm:
    import pyarrow as pa

    with _open_parquet(path) as parquet:
        header = list(parquet.schema_arrow.names)
        try:
            batch = next(parquet.iter_batches(batch_size=_SAMPLE_ROWS), None)
        except (pa.ArrowException, OSError) as error:
            found = f"the file is damaged ({str(error).splitlines()[0]})"
            raise DataError(f"table {path}", found, "Get the file again") from error
    rows = [] if batch is None else [list(row) for row in zip(*map(_cells, batch.columns), strict=True)]
    columns = choose_columns([header, *rows], str(path), smiles_column, split_column, value_columns, has_header=True)
    return TableForm(path, "parquet", columns)


def _read_parquet(form: TableForm) -> Iterator[Row]:
    import pyarrow as pa

    wanted = [form.columns.smiles, form.columns.split, form.columns.name, *form.columns.values]
    number = 0
    with _open_parquet(form.path) as parquet:
        names = parquet.schema_arrow.names
        keep = list(dict.fromkeys(names[index] for index in wanted if index is not None))
        try:
            for batch in parquet.iter_batches(batch_size=4096, columns=keep):
                cells = {name: _cells(batch.column(name)) for name in keep}
                blank = [""] * batch.num_rows
                picked = [cells[names[index]] if index is not None else blank for index in wanted]
                for text, split, name, *values in zip(*picked, strict=True):
                    number += 1
                    problem = "" if text else BLANK
                    yield Row(str(form.path), number, text.strip(), split.strip(), name, problem, values=tuple(values))
        except (pa.ArrowException, OSError) as error:
            found = f"the file is damaged ({str(error).splitlines()[0]})"
            raise DataError(f"{form.path} row {number + 1}", found, "Get the file again") from error


def _cells(column: Any) -> list[str]:
    """Values as text; bytes are text without its type, as some writers leave it."""
    return [
        value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else "" if value is None else str(value)
        for value in column.to_pylist()
    ]
