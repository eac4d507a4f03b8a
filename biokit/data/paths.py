"""Which files a data set is made of: names, folders, comma lists and BioNeMo's ranges.

A range `x[000..099]` stands for x000 to x099, both included, zero padded; `x_OP_000..099_CL_` is the same for shells
that read brackets. The extension may be left out. All missing files are named in one error.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from biokit.errors import DataError

TEXT_EXTENSIONS = (".csv", ".tsv", ".txt", ".smi", ".smiles", ".sdf")
TABLE_EXTENSIONS = (
    *TEXT_EXTENSIONS,
    *(f"{extension}.gz" for extension in TEXT_EXTENSIONS),
    ".parquet",
)
MAX_RANGE = 1_000_000

_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_NUM_NAMED = 20


def is_table(path: Path) -> bool:
    """Whether the name ends in one of `TABLE_EXTENSIONS`."""
    return path.name.lower().endswith(TABLE_EXTENSIONS)


def expand_paths(patterns: str | Path | Sequence[str | Path], base: str | Path = "") -> list[Path]:
    """The files that names, ranges, comma lists and `*` stand for, in the order given.

    Args:
        patterns: one or several; an existing file stands for itself, whatever its name holds.
        base: the folder that relative names start from.

    Raises:
        DataError: a malformed range, a name that fits several files, or missing files (all of them named).
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    found: list[Path] = []
    missing: list[Path] = []
    for pattern in patterns:
        for path in _expand(str(pattern), Path(base)):
            match = _existing(path)
            found.extend(match)
            if not match:
                missing.append(path)
    if missing:
        raise DataError(
            f"{len(found) + len(missing)} files of {', '.join(map(str, patterns))}",
            f"{len(missing)} do not exist: {_named(missing)}",
            f"Check the range and the folder; the extension may be left out ({' '.join(TABLE_EXTENSIONS)})",
        )
    if not found:
        asked = f'files "{", ".join(map(str, patterns))}"'
        raise DataError(asked, "no file is named", "Give a path, a range or a list")
    repeated = [path for path, count in Counter(found).items() if count > 1]
    if repeated:
        raise DataError(
            f"files of {', '.join(map(str, patterns))}",
            f"named twice: {_named(repeated)}",
            "Name each file once",
        )
    return found


def list_tables(folder: Path) -> list[Path]:
    """The tables directly inside a folder, sorted by name; hidden files and other kinds are left out.

    A link that leads nowhere is not left out: opening it says so.

    Raises:
        DataError: there is none.
    """
    tables = sorted(
        path
        for path in folder.iterdir()
        if is_table(path) and path.name[0] != "." and (path.is_file() or (path.is_symlink() and not path.exists()))
    )
    if not tables:
        raise DataError(f"folder {folder}", "it holds no table", f"Put files there: {' '.join(TABLE_EXTENSIONS)}")
    return tables


def _expand(pattern: str, base: Path) -> list[Path]:
    path = base / pattern
    if path.exists():
        return [path]
    if "*" in path.name:
        matches = sorted(match for match in path.parent.glob(path.name) if match.is_file())
        return matches or [path]
    return [base / text for part in _split_commas(pattern) for text in _expand_ranges(part, pattern)]


def _split_commas(pattern: str) -> list[str]:
    """Cut at commas that stand outside brackets."""
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\]|\[)+", pattern.replace("_OP_", "[").replace("_CL_", "]"))
    return [part.strip() for part in parts if part.strip()]


def _expand_ranges(text: str, pattern: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\[\]]*)\]", text)
    if any("[" in piece or "]" in piece for piece in pieces):
        raise DataError(f'files "{pattern}"', "its brackets do not pair up", "Write x[000..099] or x_OP_000..099_CL_")
    choices: list[Iterable[str]] = [
        _expand_group(piece, pattern) if index % 2 else [piece] for index, piece in enumerate(pieces)
    ]
    return ("".join(parts) for parts in itertools.product(*choices))


def _expand_group(group: str, pattern: str) -> list[str]:
    names: list[str] = []
    for item in group.split(","):
        item = item.strip()
        match = _RANGE.fullmatch(item)
        if match is None:
            if not item or ".." in item:
                raise DataError(f'files "{pattern}"', f'"[{group}]" is no range', "Write x[000..099] or x[000,007]")
            names.append(item)
            continue
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if last < first or step == 0 or (last - first) // step >= MAX_RANGE:
            raise DataError(
                f'files "{pattern}"',
                f'"{item}" is empty or has more than {MAX_RANGE:,} files',
                "Write the smaller number first: x[000..099], both included",
            )
        padded = any(len(number) > 1 and number[0] == "0" for number in match.group(1, 2))
        width = max(len(match[1]), len(match[2])) if padded else 0
        names.extend(f"{number:0{width}d}" for number in range(first, last + 1, step))
    return names


def _existing(path: Path) -> list[Path]:
    """The file itself, or the one that has a table's extension besides; nothing where there is none."""
    if path.exists():
        return [path]
    matches = [match for extension in TABLE_EXTENSIONS if (match := path.with_name(path.name + extension)).is_file()]
    if len(matches) > 1:
        names = ", ".join(match.name for match in matches)
        raise DataError(f"file {path}", f"several fit: {names}", "Write the extension of the one that is meant")
    return matches


def _named(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NUM_NAMED} more" if len(paths) > _NUM_NAMED else ""
    return ", ".join(map(str, paths[:_NUM_NAMED])) + more
