"""The way from one molecule to another, with a slider."""

from __future__ import annotations

from collections.abc import Sequence

from biokit.errors import DataError
from biokit.view.interactive import InteractiveView
from biokit.view.molecules import show_molecules
from biokit.view.sheets import draw_sheet

TILE = (420, 300)  # pixels


def show_interpolation(smiles: Sequence[str], *, title: str = "") -> InteractiveView:
    """Molecules on the way between the first and the last; a slider moves along it.

    Under each stand how far along it is, and its Tanimoto similarity to both ends (Morgan, radius 2).

    Raises:
        DataError: fewer than 2 molecules, or ends that are no molecules.
    """
    from biokit.chem.draw import read_molecule
    from biokit.chem.similarity import fingerprints, tanimoto

    if len(smiles) < 2:
        raise DataError("show an interpolation", f"{len(smiles)} molecules", "Give 2 or more: a way has two ends")
    molecules = [read_molecule(text) for text in smiles]
    if molecules[0] is None or molecules[-1] is None:
        bad = smiles[0] if molecules[0] is None else smiles[-1]
        raise DataError("show an interpolation", f'its end "{bad}" is not a molecule', "Interpolate between molecules")
    ends = fingerprints([molecules[0], molecules[-1]])
    alike = [None if m is None else tanimoto(fingerprints([m]), ends)[0].round(3).tolist() for m in molecules]
    shares = [i / (len(smiles) - 1) for i in range(len(smiles))]
    legends = [
        f"{share:.2f}\n" + ("not a molecule" if pair is None else f"similarity {pair[0]:.2f} | {pair[1]:.2f}")
        for share, pair in zip(shares, alike, strict=True)
    ]
    title = title or f"From one molecule to another in {len(smiles)} points"
    static = show_molecules(smiles, legends, title=title, max_molecules=len(smiles))
    data = {
        "title": title, "smiles": list(smiles), "shares": shares, "similarities": alike,
        "sheet": draw_sheet(smiles, TILE),
    }  # fmt: skip
    return InteractiveView(static.png, static.alt, "interpolation.js", data)
