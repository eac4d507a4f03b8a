"""2D drawings of molecules as PNG tiles (rdkit). Colours are the Okabe-Ito set: told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from biokit.chem.molecules import Mol, parse_smiles
from biokit.chem.tokens import atom_positions
from biokit.errors import DataError

Rgb = tuple[float, float, float]

ATOM_COLOURS: dict[int, Rgb] = {  # atomic number -> colour; every one reads on white, and letters say the element too
    0: (0.35, 0.35, 0.35),
    1: (0.35, 0.35, 0.35),
    6: (0.10, 0.10, 0.10),
    7: (0.00, 0.35, 0.65),  # blue
    8: (0.78, 0.29, 0.00),  # vermillion
    9: (0.00, 0.50, 0.36),  # bluish green
    15: (0.62, 0.28, 0.49),  # reddish purple
    16: (0.55, 0.42, 0.00),  # dark yellow
    17: (0.00, 0.50, 0.36),
    35: (0.00, 0.50, 0.36),
    53: (0.00, 0.50, 0.36),
}

OVERLAY_BOND = 50.0  # pixels at most
OVERLAY_RADIUS = 0.55  # of a disc, in ångström of the drawing, where a bond has 1.5


def read_molecule(smiles: str) -> Mol | None:
    """The molecule of a SMILES, atoms in the order of the text; None where `parse_smiles` refuses it: a picture then
    shows its text.
    """
    try:
        molecule = parse_smiles(smiles)
    except DataError:
        return None
    if "[H]" not in smiles:
        return molecule
    parameters: Any = Chem.SmilesParserParams()
    parameters.removeHs = False
    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles, parameters)


def draw_molecule(
    molecule: Mol,
    width: int,
    height: int,
    highlights: Mapping[int, Rgb] | None = None,
    notes: Mapping[int, str] | None = None,
) -> bytes:
    """One molecule as the bytes of a PNG of `width` x `height` pixels.

    Args:
        highlights: atom index -> colour of a disc under the atom; bonds between two of them are filled as well.
        notes: atom index -> short text beside the atom.

    Raises:
        DataError: rdkit cannot draw it.
    """
    return bytes(_draw(molecule, width, height, highlights, notes).GetDrawingText())


def draw_with_places(
    molecule: Mol,
    width: int,
    height: int,
    highlights: Mapping[int, Rgb] | None = None,
) -> tuple[bytes, list[tuple[float, float]]]:
    """The same for an overlay: larger, in black alone, with wide discs under atoms and none under bonds.

    Returns:
        The bytes of the PNG, and for each atom its pixel (x, y), y down.
    """
    drawer = _draw(molecule, width, height, highlights, None, is_overlay=True)
    points = [drawer.GetDrawCoords(index) for index in range(molecule.GetNumAtoms())]
    return bytes(drawer.GetDrawingText()), [(float(point.x), float(point.y)) for point in points]


def _draw(
    molecule: Mol,
    width: int,
    height: int,
    highlights: Mapping[int, Rgb] | None,
    notes: Mapping[int, str] | None,
    is_overlay: bool = False,
) -> Any:
    """rdkit's drawer, done with a molecule."""
    drawer = rdMolDraw2D.MolDraw2DCairo(width, height)
    options: Any = drawer.drawOptions()
    options.updateAtomPalette(ATOM_COLOURS)
    options.fixedBondLength = 32.0  # pixels at most: small molecules are not blown up
    options.highlightRadius = 0.34
    if is_overlay:
        options.useBWAtomPalette()
        options.atomHighlightsAreCircles = True
        options.fixedBondLength = OVERLAY_BOND
        options.highlightRadius = OVERLAY_RADIUS
    options.padding = 0.06
    options.minFontSize = 10
    options.bondLineWidth = 1.6
    options.annotationFontScale = 0.7
    options.flagCloseContactsDist = -1000  # large molecules overlap in 2D; that is not an error to mark
    copy = Chem.Mol(molecule)
    for index, text in (notes or {}).items():
        copy.GetAtomWithIdx(index).SetProp("atomNote", text)
    atoms: dict[int, Rgb] = dict(highlights or {})
    bonds = {} if is_overlay else _bonds_between(copy, atoms)
    try:
        with rdBase.BlockLogs():
            prepared = _prepare(copy)
            drawer.DrawMolecule(
                prepared,
                highlightAtoms=list(atoms),
                highlightAtomColors=atoms,
                highlightBonds=list(bonds),
                highlightBondColors=bonds,
            )
        drawer.FinishDrawing()
    except (RuntimeError, ValueError) as error:
        raise DataError("draw a molecule", f"rdkit cannot ({error})", "Show its SMILES as text") from error
    return drawer


def align_drawings(molecules: Sequence[Mol]) -> list[list[int]]:
    """Give the same molecule, written in several orders, the same picture: coordinates of the first go to the others.

    Returns:
        For each molecule, the atom of the first molecule that each of its atoms is.

    Raises:
        DataError: the molecules are not all the same.
    """
    if not molecules:
        return []
    first = molecules[0]
    rdDepictor.Compute2DCoords(first)
    positions = first.GetConformer().GetPositions()
    orders: list[list[int]] = [list(range(first.GetNumAtoms()))]
    for number, molecule in enumerate(molecules[1:], start=2):
        same_size = molecule.GetNumAtoms() == first.GetNumAtoms()
        match = list(first.GetSubstructMatch(molecule, useChirality=True)) if same_size else []
        if not match:
            raise DataError(
                f"pictures of one molecule: SMILES {number} of {len(molecules)}",
                f'"{Chem.MolToSmiles(molecule)}" is not the first molecule, "{Chem.MolToSmiles(first)}"',
                "Give SMILES of one molecule",
            )
        conformer = Chem.Conformer(molecule.GetNumAtoms())
        for index, source in enumerate(match):
            conformer.SetAtomPosition(index, positions[source])
        molecule.RemoveAllConformers()
        molecule.AddConformer(conformer)
        orders.append(match)
    return orders


def atoms_of_tokens(molecule: Mol, tokens: Sequence[str]) -> dict[int, int]:
    """Which token writes which atom: token position -> atom index, for a molecule read from these tokens by
    `read_molecule`. Empty where the numbers do not agree, so that no wrong atom is ever marked.
    """
    positions = atom_positions(tokens)
    if len(positions) != molecule.GetNumAtoms():
        return {}
    return dict(zip(positions, range(len(positions)), strict=True))


def _bonds_between(molecule: Mol, atoms: Mapping[int, Rgb]) -> dict[int, Rgb]:
    ends = ((b.GetIdx(), b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds())
    return {index: atoms[max(begin, end)] for index, begin, end in ends if begin in atoms and end in atoms}


def _prepare(molecule: Mol) -> Any:
    """Kekulized, with wedges and 2D coordinates; drawn as written where it cannot be kekulized."""
    try:
        return rdMolDraw2D.PrepareMolForDrawing(molecule, addChiralHs=False)
    except (Chem.KekulizeException, ValueError):
        return rdMolDraw2D.PrepareMolForDrawing(molecule, kekulize=False, addChiralHs=False)
