"""Conformers: 3D structures of a molecule by ETKDGv3, relaxed by a force field (rdkit).

ETKDG: Riniker and Landrum 2015, J. Chem. Inf. Model. 55, 2562 (version 3: Wang et al. 2020). MMFF94: Halgren 1996,
J. Comput. Chem. 17, 490. UFF: Rappé et al. 1992, J. Am. Chem. Soc. 114, 10024.
Shapes: N atoms (hydrogens included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolAlign, rdMolDescriptors

from biokit.chem.molecules import Mol, parse_smiles
from biokit.errors import ConfigError, DataError

MAX_ATOMS = 300  # hydrogens included; more take minutes, and a picture of them says nothing
MAX_CONFORMERS = 200
MAX_SEED = 2**31 - 1
_RELAX_STEPS = 2000
_EMBED_ATTEMPTS = 30  # a conformer
_MAX_SYMMETRIES = 1000  # ways to lay a molecule on itself that are tried


@dataclass(frozen=True, eq=False)
class Conformer:
    """One 3D structure.

    Attributes:
        energy: of the force field, in kcal/mol; only differences within a molecule mean something.
        positions_N3: places of the atoms in ångström.
        mol_block: the structure as an MDL mol block.
        converged: whether relaxation came to its end.
    """

    energy: float
    positions_N3: npt.NDArray[np.float64]
    mol_block: str
    converged: bool


@dataclass(frozen=True, eq=False)
class Conformers:
    """The conformers of a molecule, lowest energy first, all laid on the first one.

    The longest extent of the first one runs along x, the shortest along z: seen along z, most is seen.

    Attributes:
        force_field: MMFF94 or UFF.
        elements: the symbol of each atom; those of the SMILES in its order, then hydrogens.
        bonds: (atom, atom, order) each; 1.5 for an aromatic one.
    """

    smiles: str
    formula: str
    force_field: str
    elements: tuple[str, ...]
    bonds: tuple[tuple[int, int, float], ...]
    conformers: tuple[Conformer, ...]

    def __len__(self) -> int:
        return len(self.conformers)

    @property
    def relative_energies(self) -> list[float]:
        """kcal/mol above the lowest one."""
        return [conformer.energy - self.conformers[0].energy for conformer in self.conformers]

    def to_sdf(self) -> str:
        """All conformers as the text of an SD file, with their energies."""
        head = f">  <force_field>\n{self.force_field}\n\n>  <energy_kcal_per_mol>\n"
        return "".join(f"{one.mol_block}{head}{one.energy:.4f}\n\n$$$$\n" for one in self.conformers)


def embed_conformers(smiles: str, num_conformers: int = 1, seed: int = 1234, *, min_rmsd: float = 0.5) -> Conformers:
    """3D structures with hydrogens: embedded by ETKDGv3, relaxed by MMFF94 (by UFF where MMFF94 lacks parameters).

    A pure function of its arguments.

    Args:
        num_conformers: how many are embedded; fewer come back where some are alike or fail.
        min_rmsd: of two that are nearer to each other, the one of higher energy is left out: root mean square
            distance of heavy atoms in ångström, after alignment, symmetry considered.

    Raises:
        ConfigError: a value out of its range.
        DataError: no molecule, more than `MAX_ATOMS` atoms, no structure found, or no force field knows its atoms.
    """
    if not 1 <= num_conformers <= MAX_CONFORMERS:
        raise ConfigError(f"num_conformers={num_conformers}", "it is out of range", f"Give 1 to {MAX_CONFORMERS}")
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed={seed}", "it is out of range", f"Give 0 to {MAX_SEED}")
    if not 0 <= min_rmsd < float("inf"):
        raise ConfigError(f"min_rmsd={min_rmsd}", "it is out of range", "Give 0 or more ångström")
    name = f'conformers of "{smiles[:100]}"'
    molecule = Chem.AddHs(parse_smiles(smiles))
    num_atoms = molecule.GetNumAtoms()
    if not 1 <= num_atoms <= MAX_ATOMS:
        raise DataError(name, f"{num_atoms} atoms, hydrogens included", f"Give 1 to {MAX_ATOMS}; draw others in 2D")
    with rdBase.BlockLogs():
        ids = _embed(molecule, num_conformers, seed)
        if not ids:
            found = "ETKDG finds no structure (a strained ring, or stereo marks that contradict one another?)"
            raise DataError(name, found, "Check its stereo marks, or draw it in 2D")
        force_field, relaxed = _relax(molecule, name)
    order = sorted(ids, key=lambda i: relaxed[i][1])
    kept = _drop_alike(molecule, order, min_rmsd)
    _align(molecule, kept)
    return Conformers(
        smiles=smiles,
        formula=rdMolDescriptors.CalcMolFormula(molecule),
        force_field=force_field,
        elements=tuple(atom.GetSymbol() for atom in molecule.GetAtoms()),
        bonds=tuple((b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble()) for b in molecule.GetBonds()),
        conformers=tuple(_conformer(molecule, i, *relaxed[i]) for i in kept),
    )


def _embed(molecule: Mol, num_conformers: int, seed: int) -> list[int]:
    """Ids of the conformers found; from random coordinates where the usual start finds none."""
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed
    parameters.numThreads = 1
    parameters.maxIterations = _EMBED_ATTEMPTS
    ids = list(rdDistGeom.EmbedMultipleConfs(molecule, num_conformers, parameters))
    if not ids:
        parameters.useRandomCoords = True
        ids = list(rdDistGeom.EmbedMultipleConfs(molecule, num_conformers, parameters))
    return ids


def _relax(molecule: Mol, name: str) -> tuple[str, list[tuple[bool, float]]]:
    """The force field that was used, and for each conformer id whether it converged, and its energy."""
    field: Any = rdForceFieldHelpers
    if field.MMFFHasAllMoleculeParams(molecule):
        force_field = "MMFF94"
        found = field.MMFFOptimizeMoleculeConfs(molecule, numThreads=1, maxIters=_RELAX_STEPS, mmffVariant="MMFF94")
    elif field.UFFHasAllMoleculeParams(molecule):
        force_field = "UFF"
        found = field.UFFOptimizeMoleculeConfs(molecule, numThreads=1, maxIters=_RELAX_STEPS)
    else:
        raise DataError(name, "neither MMFF94 nor UFF has parameters for its atoms", "Draw it in 2D")
    return force_field, [(status == 0, energy) for status, energy in found]


def _drop_alike(molecule: Mol, order: list[int], min_rmsd: float) -> list[int]:
    """Ids whose structures are apart, in this order."""
    heavy = Chem.RemoveAllHs(molecule, sanitize=False)
    if not heavy.GetNumAtoms():
        return order[:1]
    kept: list[int] = []
    for i in order:
        apart = (rdMolAlign.GetBestRMS(heavy, heavy, i, j, maxMatches=_MAX_SYMMETRIES) for j in kept)
        if all(distance >= min_rmsd for distance in apart):
            kept.append(i)
    return kept


def _align(molecule: Mol, ids: list[int]) -> None:
    """Lay all on the first one, then turn all so that the axes of the first one are x, y and z by size."""
    first = molecule.GetConformer(ids[0])
    for i in ids[1:]:
        rdMolAlign.AlignMol(molecule, molecule, prbCid=i, refCid=ids[0])
    positions_N3 = first.GetPositions()
    centre_3 = positions_N3.mean(0)
    axes_33 = np.linalg.svd(positions_N3 - centre_3, full_matrices=True)[2]
    axes_33 *= np.where(axes_33[np.arange(3), np.abs(axes_33).argmax(1)] < 0, -1.0, 1.0)[:, None]
    if np.linalg.det(axes_33) < 0:  # a mirror image would be another molecule
        axes_33[2] *= -1
    for i in ids:
        conformer = molecule.GetConformer(i)
        conformer.SetPositions((conformer.GetPositions() - centre_3) @ axes_33.T)


def _conformer(molecule: Mol, conformer_id: int, converged: bool, energy: float) -> Conformer:
    positions_N3 = np.array(molecule.GetConformer(conformer_id).GetPositions(), dtype=np.float64)
    return Conformer(energy, positions_N3, Chem.MolToMolBlock(molecule, confId=conformer_id), converged)
