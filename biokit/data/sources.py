"""Which files a configuration names: a named data set, a file, a range, or a folder of parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from biokit.config import DataConfig
from biokit.data.columns import PARTS
from biokit.data.paths import expand_paths, is_table, list_tables
from biokit.data.split import PART_NAMES
from biokit.datasets import DATASETS, find_dataset, locate
from biokit.errors import DataError


@dataclass(frozen=True, slots=True)
class Source:
    """A table, and the part that all of it belongs to; "" where the split decides."""

    path: Path
    part: str = ""


def find_sources(config: DataConfig) -> list[Source]:
    """The tables of `data.dataset_path` and `data.dataset.*`, train first.

    With `data.dataset.train` and so on, relative names start from <dataset_path>/train where there is such a folder,
    else from <dataset_path>. Without them a folder may hold parts, as subfolders (train/, val/, test/) or as files
    (train.csv, ...), or plain tables.

    Raises:
        DataError: nothing there, no permission, a file in two parts, or a folder that can be read in two ways.
    """
    try:
        sources = _find(config)
    except OSError as error:
        found = f"it cannot be reached ({error.strerror})"
        raise DataError(f'files "{config.dataset_path[:200]}"', found, "Check the path and its permissions") from error
    parts = Counter(source.path for source in sources)
    repeated = [str(path) for path, count in parts.items() if count > 1]
    if repeated:
        asked = "data.dataset.train, val and test"
        raise DataError(asked, f"a file stands in two parts: {', '.join(repeated[:5])}", "Give each file to one part")
    return sources


def _find(config: DataConfig) -> list[Source]:
    named = {part: getattr(config.dataset, part) for part in PART_NAMES}
    base = Path(config.dataset_path)
    if any(named.values()):
        return [
            Source(path, part) for part in PART_NAMES if named[part] for path in _find_part(base, part, named[part])
        ]
    if not config.dataset_path.strip():
        raise DataError("data.dataset_path", "it is empty", "Give a file, a folder or a named data set")
    if base.is_dir():
        return _read_folder(base)
    return [Source(path) for path in expand_paths(str(locate_molecules(config.dataset_path)))]


def locate_molecules(name: str | Path) -> Path:
    """The table of a named data set of molecules; what is no name is taken as a path.

    Raises:
        DataError: a set of another kind, one that is not here yet, or a word that is neither a name nor a file.
    """
    path, name = Path(name), str(name)
    if path.exists() or not (name in DATASETS or _is_bare_name(name)):
        return path
    if (kind := find_dataset(name).kind) != "molecules":
        others = ", ".join(other.name for other in DATASETS.values() if other.kind == "molecules")
        raise DataError(f'data set "{name}"', f"its rows are {kind}, molecules are needed", f"Named ones: {others}")
    return locate(name)


def _is_bare_name(text: str) -> bool:
    """A word that can only be meant as a named data set, so that a slip is answered with the nearest name."""
    return text.replace("_", "").isalnum() and not any(expanded.exists() for expanded in _with_extension(text))


def _with_extension(text: str) -> list[Path]:
    parent = Path(text).parent
    return [path for path in parent.glob(f"{Path(text).name}.*") if is_table(path)] if parent.is_dir() else []


def _find_part(base: Path, part: str, pattern: str) -> list[Path]:
    folder = base / part
    if folder.is_dir():
        try:
            return expand_paths(pattern, folder)
        except DataError as error:
            if "exist" not in error.found:
                raise
            try:
                return expand_paths(pattern, base)
            except DataError:
                raise error from None
    return expand_paths(pattern, base)


def _read_folder(folder: Path) -> list[Source]:
    """Parts in subfolders, or parts in files, or tables without parts."""
    subfolders = {path: PARTS[path.name.lower()] for path in folder.iterdir() if path.is_dir() and _names_part(path)}
    if subfolders:
        loose = [path.name for path in folder.iterdir() if path.is_file() and is_table(path)]
        if loose:
            found = f"it holds parts ({', '.join(sorted(p.name for p in subfolders))}) and tables ({', '.join(loose)})"
            raise DataError(f"folder {folder}", found, "Keep one of the two, or set data.dataset.train")
        sources = [Source(path, part) for sub, part in subfolders.items() for path in list_tables(sub)]
        return sorted(sources, key=lambda source: (PART_NAMES.index(source.part), source.path))
    tables = list_tables(folder)
    parts = [PARTS.get(path.name.lower().split(".")[0], "") for path in tables]
    if any(parts) and not all(parts):
        other = ", ".join(path.name for path, part in zip(tables, parts, strict=True) if not part)
        found = f"beside files named after parts it holds {other}"
        raise DataError(f"folder {folder}", found, "Move them away, or set data.dataset.train, val and test")
    sources = [Source(path, part) for path, part in zip(tables, parts, strict=True)]
    return sorted(sources, key=lambda source: (PART_NAMES.index(source.part) if source.part else 0, source.path))


def _names_part(path: Path) -> bool:
    return path.name.lower() in PARTS
