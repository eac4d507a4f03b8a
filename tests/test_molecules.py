import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biokit.chem.molecules import (
    CleanOptions,
    canonicalize,
    clean_molecule,
    inchikey,
    mol_to_bytes,
    parse_mol_block,
    parse_smiles,
    random_smiles,
    scaffold,
)
from biokit.errors import DataError

STRIP = CleanOptions()


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("C1CC", "unclosed ring"),
        ("C1CC(", "syntax error at position 5"),
        ("C(C)(C)(C)(C)C", "Explicit valence for atom # 0 C, 5"),
        ("c1cccc1", "Can't kekulize mol"),
        ("", "it is empty"),
        ("CC O", "white space at position 3"),
        ("CC |$a$|", "a CXSMILES extension"),
        ("CC |$a$| name", "a CXSMILES extension"),
        ("C\0C", "at position 2"),
        ("C\udc80", "at position 2"),
        ("Cé", "at position 2"),
        ("CCO.CC>>CCOCC", "a reaction"),
        ("CO.CC>[Na+]>COC", "a reaction"),
        ("[99999999999999999999C]", "syntax error"),
        ("C" * 20_001, "20001 characters"),
    ],
)
def test_the_reason_of_a_bad_smiles_is_named(smiles: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_smiles(smiles)
    assert reason in caught.value.found
    assert len(str(caught.value)) < 400


def test_dative_bonds_are_no_reaction() -> None:
    assert canonicalize("[NH3]->[Cu]<-[NH3]")


def test_rdkit_prints_nothing() -> None:
    code = (
        "from biokit.chem.molecules import *\n"
        "for s in ['C1CC(', 'c1cccc1', 'C(C)(C)(C)(C)C', '[H]', '[H+].[H]C']:\n"
        "    try: clean_molecule(s, CleanOptions(neutralize=True, canonical_tautomer=True))\n"
        "    except DataError: pass\n"
        "inchikey('*C'); inchikey('[U+99]')\n"
        "try: parse_mol_block('x')\n"
        "except DataError: pass\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "" and run.stderr == ""


def test_canonical_smiles_do_not_depend_on_the_spelling() -> None:
    assert canonicalize("OCC") == canonicalize("C(C)O") == "CCO"


def test_random_smiles_are_a_pure_function_of_seed() -> None:
    packed = mol_to_bytes("CC(C)Cc1ccc(cc1)C(C)C(=O)O")
    first = random_smiles(packed, 5, 7)
    random_smiles(packed, 3, 8)
    assert random_smiles(packed, 5, 7) == first
    assert random_smiles(packed, 5, 8) != first
    assert random_smiles(packed, 5, 2**63 - 1)
    assert len(set(first)) > 1
    assert {canonicalize(s) for s in first} == {canonicalize("CC(C)Cc1ccc(cc1)C(C)C(=O)O")}


def test_bytes_that_are_no_molecule_are_refused() -> None:
    with pytest.raises(DataError, match="not a molecule"):
        random_smiles(b"nonsense", 1, 0)


def test_scaffold_and_inchikey() -> None:
    assert scaffold("CCc1ccccc1") == "c1ccccc1"
    assert scaffold("CCO") == ""
    assert inchikey("CCO") == "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"
    assert inchikey("*C") == ""


@pytest.mark.parametrize(
    ("text", "options", "smiles", "changes"),
    [
        ("OCC", STRIP, "CCO", ()),
        ("CC(=O)[O-].[Na+]", STRIP, "CC(=O)[O-]", ("salts_stripped",)),
        ("CC(=O)[O-].[Na+]", CleanOptions(salts="keep"), "CC(=O)[O-].[Na+]", ("salts_kept",)),
        ("Cl.[I-].O", STRIP, "[I-]", ("salts_stripped",)),
        ("O=S(=O)(O)O.C", STRIP, "C", ("salts_stripped",)),  # carbon before size
        ("C1.C1", STRIP, "CC", ()),  # a ring bond joins what the dot parts
        ("C1.C1.O", STRIP, "CC", ("salts_stripped",)),
        ("[CH3:1][CH2:2][OH:3]", STRIP, "CCO", ("atom_maps_stripped",)),
        ("[CH3:1]C", CleanOptions(atom_maps="keep"), "C[CH3:1]", ("atom_maps_kept",)),
        ("CC(=O)[O-]", CleanOptions(neutralize=True), "CC(=O)O", ("neutralized", "charge_changed")),
        ("CC(O)=CC", CleanOptions(canonical_tautomer=True), "CCC(C)=O", ("tautomer_changed",)),
        ("C[C@H](C)O", STRIP, "CC(C)O", ("stereo_lost",)),
        ("C[C@H](F)O", STRIP, "C[C@@H](O)F", ()),
        ("F/C=C/F", STRIP, "F/C=C/F", ()),
        ("F/C=C(/F)F", STRIP, "FC=C(F)F", ("stereo_lost",)),
        ("C[C@H]([CH3:1])O", STRIP, "CC(C)O", ("atom_maps_stripped", "stereo_lost")),
        ("CN(=O)=O", STRIP, "C[N+](=O)[O-]", ()),
        ("[2H]C([2H])O", STRIP, "[2H]C([2H])O", ()),
        ("[13CH4]", STRIP, "[13CH4]", ()),
    ],
)
def test_cleaning_tells_what_it_changed(text: str, options: CleanOptions, smiles: str, changes: tuple) -> None:
    cleaned = clean_molecule(text, options)
    assert cleaned.smiles == smiles
    assert cleaned.changes == changes


def test_stereo_of_a_stripped_counter_ion_is_no_loss() -> None:
    tartrate = "OC(=O)[C@H](O)[C@@H](O)C(=O)O"
    cleaned = clean_molecule(f"CCCCCCCCCCCCCCN.{tartrate}", STRIP)
    assert (cleaned.smiles, cleaned.changes) == ("CCCCCCCCCCCCCCN", ("salts_stripped",))


def test_mol_block() -> None:
    from rdkit import Chem

    block = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO"))
    assert clean_molecule(block, STRIP, is_mol_block=True).smiles == "CCO"
    with pytest.raises(DataError, match="cannot be parsed"):
        parse_mol_block("title\nprog\n\n  9  9 nonsense\nM  END\n")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.text(alphabet="CNOcn[]()=#12+-@/\\.H:%*$", max_size=30))
def test_any_text_is_cleaned_or_refused(text: str) -> None:
    try:
        cleaned = clean_molecule(text, STRIP)
    except DataError as error:
        assert error.found
    else:
        assert canonicalize(cleaned.smiles)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2, 2**31 - 1, 2 * (2**31 - 1), 2**62])
def test_random_smiles_depend_on_the_seed_alone(seed):
    molecule = mol_to_bytes("CC(C)Cc1ccc(cc1)C(C)C(=O)O")
    first = random_smiles(molecule, 3, seed)
    random_smiles(molecule, 5, 77)
    assert random_smiles(molecule, 3, seed) == first


STEREO = ["C[C@H](N)C(=O)O", "F/C=C/Cl", "O[C@H]1CC[C@@H](CC1)c1ccccc1", "C[C@@H]1CC2CCC1C2"]


@pytest.mark.parametrize("smiles", STEREO)
def test_random_smiles_are_those_that_rdkit_writes_of_the_stored_molecule(smiles: str) -> None:
    from rdkit import Chem

    molecule = mol_to_bytes(smiles)
    expected = list(Chem.MolToRandomSmilesVect(Chem.Mol(molecule), 20, randomSeed=5 + 1))
    assert random_smiles(molecule, 20, 5) == expected
    assert {canonicalize(text) for text in expected} == {canonicalize(smiles)}
