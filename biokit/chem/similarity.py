"""How alike molecules are: Morgan fingerprints and Tanimoto similarity, as MOSES takes them (radius 2, 1,024 bits).

Shapes: N and M molecules, F bits of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rdkit.Chem import rdFingerprintGenerator

from biokit.chem.molecules import Mol, parse_smiles

RADIUS, NUM_BITS = 2, 1024
BLOCK_ROWS = 1024  # of a similarity matrix that is never whole

Bits = npt.NDArray[np.float32]


def fingerprints(molecules: Sequence[str | Mol], radius: int = RADIUS, num_bits: int = NUM_BITS) -> Bits:
    """Morgan fingerprints (N,F) of SMILES or molecules, 0.0 and 1.0.

    Raises:
        DataError: a SMILES that cannot be parsed.
    """
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=num_bits)
    bits_NF = np.zeros((len(molecules), num_bits), dtype=np.float32)
    for row, molecule in enumerate(molecules):
        mol = parse_smiles(molecule) if isinstance(molecule, str) else molecule
        bits_NF[row] = generator.GetFingerprintAsNumPy(mol)
    return bits_NF


def tanimoto(first_NF: Bits, second_MF: Bits) -> Bits:
    """Similarities (N,M): bits in common over bits in either; 1 for two fingerprints without bits."""
    common_NM = first_NF @ second_MF.T
    either_NM = first_NF.sum(1)[:, None] + second_MF.sum(1)[None] - common_NM
    return np.divide(common_NM, either_NM, out=np.ones_like(common_NM), where=either_NM > 0)


def mean_similarity(first_NF: Bits, second_MF: Bits) -> float:
    """The mean over all pairs; NaN where there is none."""
    total = sum(float(block.sum(dtype=np.float64)) for block in _blocks(first_NF, second_MF))
    num_pairs = len(first_NF) * len(second_MF)
    return total / num_pairs if num_pairs else float("nan")


def nearest(first_NF: Bits, second_MF: Bits) -> tuple[npt.NDArray[np.int64], Bits]:
    """Of each of the first, which of the second is the most alike (the first of equals), and how much (N).

    Raises:
        ValueError: there is no second one.
    """
    rows, values = [], []
    for block in _blocks(first_NF, second_MF):
        rows.append(block.argmax(1))
        values.append(block.max(1))
    if not rows:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    return np.concatenate(rows), np.concatenate(values)


def _blocks(first_NF: Bits, second_MF: Bits) -> Iterator[Bits]:
    for start in range(0, len(first_NF), BLOCK_ROWS):
        yield tanimoto(first_NF[start : start + BLOCK_ROWS], second_MF)
