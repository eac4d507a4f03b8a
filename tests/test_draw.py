"""Tiles of molecules: any molecule gives a PNG; atoms, tokens and poses belong together."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from biokit.chem import draw
from biokit.chem.draw import align_drawings, atoms_of_tokens, draw_molecule, read_molecule
from biokit.errors import DataError

ODD = [
    "*",
    "[Na+].[Cl-]",
    "[H][H]",
    "C[Pt](N)(N)Cl",
    "[U]",
    "N[C@@H](C)C(=O)" * 60 + "O",
    "c1ccccc1" + "C" * 90,
    "[13CH4]",
]


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(png)))[..., :3]


@pytest.mark.parametrize("smiles", ["CCO", *ODD])
def test_any_molecule_gives_a_png_of_the_asked_size(smiles: str) -> None:
    molecule = read_molecule(smiles)
    assert molecule is not None
    png = draw_molecule(molecule, 210, 160)
    assert struct.unpack(">II", png[16:24]) == (210, 160)
    assert (_pixels(png) < 0.9).any()


@pytest.mark.parametrize("text", ["", " ", "C1CC(", "CCO name", "not a molecule", "c1cccc1"])
def test_what_is_no_molecule_is_none_and_silent(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert read_molecule(text) is None
    assert capfd.readouterr() == ("", "")


def test_atoms_stand_in_the_order_of_the_text() -> None:
    molecule = read_molecule("OC([H])N")
    assert molecule is not None
    assert [atom.GetSymbol() for atom in molecule.GetAtoms()] == ["O", "C", "H", "N"]


def test_highlights_are_seen_and_only_where_asked() -> None:
    molecule = read_molecule("CCO")
    assert molecule is not None
    orange = (1.0, 0.8, 0.4)
    plain, marked = (_pixels(draw_molecule(molecule, 200, 150, marks)) for marks in ({}, {0: orange}))
    near = (np.abs(marked - orange) < 0.02).all(axis=-1)
    assert near.sum() > 50 and not (np.abs(plain - orange) < 0.02).all(axis=-1).any()
    assert np.nonzero(near)[1].mean() < 100  # the first carbon is at the left


def test_colours_can_be_told_apart_without_hue() -> None:
    """Every element is also written as letters; its colour must read on white: contrast 4.5 (WCAG AA)."""

    def luminance(rgb: tuple[float, float, float]) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for number, rgb in draw.ATOM_COLOURS.items():
        assert 1.05 / (luminance(rgb) + 0.05) >= 4.5, number


def test_tokens_and_atoms() -> None:
    tokens = ["C", "[C@@H]", "(", "Cl", ")", "c", "1", "c", "c", "c", "c", "c", "1", "Br"]
    molecule = read_molecule("".join(tokens))
    assert molecule is not None
    found = atoms_of_tokens(molecule, tokens)
    assert list(found) == [0, 1, 3, 5, 7, 8, 9, 10, 11, 13]
    symbols = [molecule.GetAtomWithIdx(atom).GetSymbol() for atom in found.values()]
    assert symbols == ["C", "C", "Cl", *["C"] * 6, "Br"]
    assert atoms_of_tokens(molecule, tokens[:-1]) == {}  # the numbers do not agree: nothing is claimed


def test_one_molecule_keeps_its_pose_whatever_the_order() -> None:
    first, second = read_molecule("CC(=O)Oc1ccccc1C(=O)O"), read_molecule("c1(OC(=O)C)c(C(O)=O)cccc1")
    assert first is not None and second is not None
    orders = align_drawings([first, second])
    assert orders[0] == list(range(13)) and sorted(orders[1]) == list(range(13)) and orders[1] != orders[0]
    positions = [molecule.GetConformer().GetPositions() for molecule in (first, second)]
    np.testing.assert_array_equal(positions[0][orders[1]], positions[1])
    for theirs, mine in enumerate(orders[1]):
        assert first.GetAtomWithIdx(mine).GetSymbol() == second.GetAtomWithIdx(theirs).GetSymbol()


def test_another_molecule_is_refused() -> None:
    with pytest.raises(DataError, match=r'SMILES 2 of 2: "CCN" is not the first molecule, "CCO"'):
        align_drawings([read_molecule("CCO"), read_molecule("NCC")])
    with pytest.raises(DataError):
        align_drawings([read_molecule("C[C@H](O)N"), read_molecule("C[C@@H](O)N")])
    assert align_drawings([]) == []


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="CNOScnos()[]=#12+-@H", max_size=12))
def test_no_string_makes_drawing_fail(text: str) -> None:
    molecule = read_molecule(text)
    if molecule is not None:
        assert draw_molecule(molecule, 120, 100).startswith(b"\x89PNG")
