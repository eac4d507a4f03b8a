import dataclasses
import subprocess
import sys

import pytest

from biokit.data.tables import describe_table, read_table
from biokit.datasets import DATASETS, locate, locate_companions, verify
from biokit.errors import DataError


@pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if not dataset.version])
def test_named_data_is_what_was_recorded(name: str) -> None:
    verify(name)
    assert sum(1 for _ in read_table(locate(name))) == DATASETS[name].rows


def test_invalid_rows_are_as_recorded() -> None:
    from biokit.chem.molecules import parse_smiles

    invalid = 0
    for row in read_table(locate("nci_first_5k")):
        try:
            parse_smiles(row.text)
        except DataError:
            invalid += 1
    assert invalid == DATASETS["nci_first_5k"].invalid_rows == 8


def test_a_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = DATASETS["chembl2321810"]
    other = dataclasses.replace(other, files=other.files | {DATASETS["wehi_mols"].path: "0" * 64})
    monkeypatch.setitem(DATASETS, "chembl2321810", other)
    with pytest.raises(DataError, match=r"wehi_mols\.csv has sha256 ef14f29a"):
        verify("chembl2321810")


def test_companions() -> None:
    (activities,) = locate_companions("chembl2321810")
    with pytest.raises(DataError, match="none holds SMILES"):
        describe_table(activities)


def test_every_name_is_recorded_in_full() -> None:
    for name, dataset in DATASETS.items():
        assert dataset.name == name and dataset.licence and dataset.source and dataset.columns and dataset.rows > 0
        assert all(len(digest) == 64 for digest in dataset.files.values())
        names = [path.rsplit("/", 1)[-1] for path in dataset.files]
        assert len(set(names)) == len(names)
        assert bool(dataset.version) == (len(dataset.wheel_sha256) == 64) == (dataset.wheel_bytes > 0)


def test_a_slip_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match='Did you mean "wehi_mols"'):
        locate("wehi_mol")
    with pytest.raises(DataError, match="Named data sets: wehi_mols"):
        locate("zzzzzz")


def test_rdkit_is_not_imported() -> None:
    code = "import sys; from biokit.datasets import locate; locate('wehi_mols'); assert 'rdkit' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
