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

Bits = npt.NDArray[np.uint8]
Similarities = npt.NDArray[np.float32]


def fingerprints(molecules: Sequence[str | Mol], radius: int = RADIUS, num_bits: int = NUM_BITS) -> Bits:
    """Morgan fingerprints (N,F) of SMILES or molecules, 0 and 1.

    Raises:
        DataError: a SMILES that cannot be parsed.
    """
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=num_bits)
    bits_NF = np.zeros((len(molecules), num_bits), dtype=np.uint8)
    for row, molecule in enumerate(molecules):
        mol = parse_smiles(molecule) if isinstance(molecule, str) else molecule
        bits_NF[row] = generator.GetFingerprintAsNumPy(mol)
    return bits_NF


def tanimoto(first_NF: Bits, second_MF: Bits) -> Similarities:
    """Similarities (N,M): bits in common over bits in either; 1 for two fingerprints without bits."""
    first_NF, second_MF = first_NF.astype(np.float32), second_MF.astype(np.float32)
    common_NM = first_NF @ second_MF.T
    either_NM = first_NF.sum(1)[:, None] + second_MF.sum(1)[None] - common_NM
    return np.divide(common_NM, either_NM, out=np.ones_like(common_NM), where=either_NM > 0)


def mean_similarity(first_NF: Bits, second_MF: Bits) -> float:
    """The mean over all pairs; NaN where there is none."""
    total = 0.0
    for _, first in _blocks(first_NF):
        total += sum(float(tanimoto(first, second).sum(dtype=np.float64)) for _, second in _blocks(second_MF))
    num_pairs = len(first_NF) * len(second_MF)
    return total / num_pairs if num_pairs else float("nan")


def nearest(first_NF: Bits, second_MF: Bits) -> tuple[npt.NDArray[np.int64], Similarities]:
    """Of each of the first, which of the second is the most alike (the first of equals), and how much (N).

    Without a second one: row -1, similarity -1.
    """
    rows_N = np.full(len(first_NF), -1, dtype=np.int64)
    values_N = np.full(len(first_NF), -1.0, dtype=np.float32)
    for start, first in _blocks(first_NF):
        into = slice(start, start + len(first))
        for offset, second in _blocks(second_MF):
            block = tanimoto(first, second)
            best = block.max(1)
            better = best > values_N[into]
            rows_N[into] = np.where(better, block.argmax(1) + offset, rows_N[into])
            values_N[into] = np.where(better, best, values_N[into])
    return rows_N, values_N


def _blocks(bits_NF: Bits) -> Iterator[tuple[int, Bits]]:
    for start in range(0, len(bits_NF), BLOCK_ROWS):
        yield start, bits_NF[start : start + BLOCK_ROWS]
