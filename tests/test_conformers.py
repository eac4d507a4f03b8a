"""3D structures: deterministic, relaxed, sorted, apart; SD files that rdkit reads back, whatever stands in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers, rdMolAlign

from biokit.chem.conformers import MAX_ATOMS, MAX_CONFORMERS, embed_conformers
from biokit.chem.exports import write_csv, write_sdf
from biokit.chem.molecules import canonicalize
from biokit.data.tables import read_table
from biokit.errors import ConfigError, DataError

IBUPROFEN = "CC(C)Cc1ccc(cc1)C(C)C(=O)O"


def _read(text: str) -> list[Chem.Mol]:
    supplier = Chem.SDMolSupplier()
    supplier.SetData(text, removeHs=False)
    return list(supplier)


def test_the_seed_decides() -> None:
    first, again, other = (embed_conformers(IBUPROFEN, 3, seed).to_sdf() for seed in (5, 5, 6))
    assert first == again != other


def test_conformers_are_relaxed_sorted_and_apart() -> None:
    found = embed_conformers(IBUPROFEN, 12)
    assert found.force_field == "MMFF94" and found.formula == "C13H18O2" and len(found.elements) == 33
    energies = [conformer.energy for conformer in found.conformers]
    assert len(found) > 2 and energies == sorted(energies) and found.relative_energies[0] == 0.0
    molecules = _read(found.to_sdf())
    for molecule, conformer in zip(molecules, found.conformers, strict=True):
        assert conformer.converged and molecule.GetNumAtoms() == 33
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
        energy = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties).CalcEnergy()
        assert energy == pytest.approx(conformer.energy, abs=0.05)  # a mol block has four decimals of an ångström
        assert float(molecule.GetProp("energy_kcal_per_mol")) == pytest.approx(conformer.energy, abs=1e-4)
        np.testing.assert_allclose(molecule.GetConformer().GetPositions(), conformer.positions_N3, atol=1e-4)
    heavy = [Chem.RemoveHs(molecule) for molecule in molecules]
    apart = [rdMolAlign.GetBestRMS(Chem.Mol(a), b) for i, a in enumerate(heavy) for b in heavy[:i]]
    assert min(apart) >= 0.499
    assert len(embed_conformers(IBUPROFEN, 12, min_rmsd=5.0)) == 1


def test_the_longest_extent_runs_along_x_and_no_mirror_image_is_made() -> None:
    for smiles in ("CCCCCC[C@H](F)Cl", "CCCCCC[C@@H](F)Cl"):
        found = embed_conformers(smiles, 2)
        spread = found.conformers[0].positions_N3.std(0)
        assert spread[0] > spread[1] > spread[2]
        for molecule in _read(found.to_sdf()):
            Chem.AssignStereochemistryFrom3D(molecule)
            assert Chem.MolToSmiles(Chem.RemoveHs(molecule)) == canonicalize(smiles)


def test_uff_stands_in_where_mmff_has_no_parameters() -> None:
    assert embed_conformers("CC(C)(C)c1ccccc1B(O)O").force_field == "UFF"


@pytest.mark.parametrize(
    ("smiles", "words"),
    [
        ("C" * 120, f"362 atoms, hydrogens included. Give 1 to {MAX_ATOMS}"),
        ("", "cannot be parsed"),
        ("[C@@H]12C[C@@H]1[C@@H]2C", "ETKDG finds no structure"),
        ("C[Pt](N)(N)Cl", "neither MMFF94 nor UFF"),
        ("C1CC(", "cannot be parsed"),
    ],
)
def test_what_has_no_structure_is_refused(smiles: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError) as caught:
        embed_conformers(smiles)
    assert words in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "values", [{"num_conformers": 0}, {"num_conformers": MAX_CONFORMERS + 1}, {"seed": -1}, {"seed": 2**31},
               {"min_rmsd": -0.1}, {"min_rmsd": float("nan")}]
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        embed_conformers("CCO", **values)


def test_an_sd_file_is_read_back(tmp_path: Path) -> None:
    smiles = ["CCO", "C[C@H](N)C(=O)O", "c1ccc2[nH]ccc2c1"]
    hostile = ["$$$$", "> <evil>\n\n$$$$\nCCO", "two\r\nlines\x00 \ud800"]
    path = write_sdf(
        tmp_path / "sets" / "some.sdf",
        smiles,
        {"log p": [1.5, float("nan"), -2.0], "<note>\n": hostile, "é": [1, 2, None]},
    )
    molecules = list(Chem.SDMolSupplier(str(path)))
    assert [Chem.MolToSmiles(molecule) for molecule in molecules] == [canonicalize(text) for text in smiles]
    first, second, third = (molecule.GetPropsAsDict() for molecule in molecules)
    assert first["log_p"] == 1.5 and "log_p" not in second and third["log_p"] == -2.0
    assert [one["note"].strip() for one in (first, second, third)] == ["$$$$", "> <evil> $$$$ CCO", "two lines \\ud800"]
    assert first["property"] == 1 and "property" not in third
    assert [entry.name for entry in path.parent.iterdir()] == ["some.sdf"]


def test_a_file_that_cannot_be_written_whole_is_not_touched(tmp_path: Path) -> None:
    path = write_sdf(tmp_path / "a.sdf", ["CCO"])
    before = path.read_bytes()
    for smiles, properties, words in (
        (["CCO", "C1CC("], {}, "molecule 2"),
        (["CCO"], {"a": [1, 2]}, "2 values for 1 molecules"),
        (["CCO"], {"a b": [1], "a_b": [2]}, "Rename one"),
    ):
        with pytest.raises(DataError, match=words):
            write_sdf(path, smiles, properties)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="cannot be written"):
        write_sdf(path / "b.sdf", ["CCO"])


def test_a_csv_file_is_what_pandas_and_biokit_read_back(tmp_path):
    columns = {"QED": [0.5, math.nan], "note": ['a "quoted", one', None], "rank": [1, 2]}
    path = write_csv(tmp_path / "new" / "a.csv", ["CCO", "C=C"], columns)
    assert path.read_text() == 'smiles,QED,note,rank\nCCO,0.5,"a ""quoted"", one",1\nC=C,,,2\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["a.csv"]
    assert [row.text for row in read_table([path])] == ["CCO", "C=C"]
    with pytest.raises(DataError, match='property "QED": 1 values for 2 molecules'):
        write_csv(path, ["CCO", "C"], {"QED": [1.0]})
    with pytest.raises(DataError, match='property "smiles"'):
        write_csv(path, ["CCO"], {"smiles": ["C"]})
    with pytest.raises(DataError, match="cannot be written"):
        write_csv(path / "b.csv", ["CCO"])
