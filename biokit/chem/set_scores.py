"""Generated molecules against a reference set, by the definitions of MOSES (Polykovskiy et al. 2020, section 3.2).

Internal diversity, similarity to the nearest neighbour (SNN), scaffold similarity, and how far apart the
distributions of properties are. What MOSES takes from a neural network (FCD) is taken from descriptors here: the
Fréchet distance between the two Gaussians of standardised properties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold

from biokit.chem.descriptors import PROPERTIES, describe
from biokit.chem.molecules import Mol, parse_smiles
from biokit.chem.similarity import fingerprints, mean_similarity, nearest
from biokit.errors import DataError

MIN_RINGS = 2  # of a scaffold that counts
SetScore = Callable[[Sequence[Mol], Sequence[Mol]], float]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SetComparison:
    """Two sets of molecules compared.

    Attributes:
        scores: name -> value, of the generated set against the reference.
        generated, reference: property -> values, a molecule each.
    """

    scores: dict[str, float]
    generated: dict[str, Values] = field(repr=False)
    reference: dict[str, Values] = field(repr=False)

    def __str__(self) -> str:
        width = max(map(len, self.scores))
        return "\n".join(f"{name:<{width}}  {value:8.4f}" for name, value in self.scores.items())


def compare_sets(
    generated: Sequence[str], reference: Sequence[str], extra: Mapping[str, SetScore] | None = None
) -> SetComparison:
    """Score valid generated SMILES against a reference set.

    Args:
        extra: further scores by name; each is called with the molecules of both sets.

    Raises:
        DataError: a set with fewer than 2 molecules, or a SMILES that cannot be parsed.
    """
    for name, smiles in (("generated", generated), ("reference", reference)):
        if len(smiles) < 2:
            found = f"{len(smiles)} molecules are too few for a distribution"
            raise DataError(f"compare sets: the {name} one", found, "Give at least 2")
    new, known = [parse_smiles(text) for text in generated], [parse_smiles(text) for text in reference]
    new_bits, known_bits = fingerprints(new), fingerprints(known)
    values, wanted = describe(new), describe(known)
    scores = {
        "internal diversity": 1.0 - mean_similarity(new_bits, new_bits),
        "SNN": float(nearest(new_bits, known_bits)[1].mean(dtype=np.float64)),
        "scaffold similarity": scaffold_similarity(new, known),
        "Fréchet distance": frechet_distance(*_standardise(values, wanted)),
    }
    for column, name in enumerate(PROPERTIES):
        scores[f"{name} apart"] = wasserstein_distance(values[:, column], wanted[:, column])
    for name, score in (extra or {}).items():
        scores[name] = float(score(new, known))
    return SetComparison(scores, _by_name(values), _by_name(wanted))


def scaffold_similarity(first: Sequence[str | Mol], second: Sequence[str | Mol]) -> float:
    """Cosine between the counts of Bemis-Murcko scaffolds of two rings or more; NaN where a set has none."""
    counts = [Counter(found for molecule in side if (found := _scaffold(molecule))) for side in (first, second)]
    dot = sum(number * counts[1][name] for name, number in counts[0].items())
    norms = [math.sqrt(sum(number**2 for number in count.values())) for count in counts]
    return dot / (norms[0] * norms[1]) if all(norms) else math.nan


def _scaffold(molecule: str | Mol) -> str:
    mol = parse_smiles(molecule) if isinstance(molecule, str) else molecule
    found = MurckoScaffold.GetScaffoldForMol(mol)
    return Chem.MolToSmiles(found) if rdMolDescriptors.CalcNumRings(found) >= MIN_RINGS else ""


def wasserstein_distance(first: Values, second: Values) -> float:
    """Area between two empirical distribution functions (the earth mover's distance in one dimension)."""
    places = np.sort(np.concatenate((first, second)))
    shares = [np.searchsorted(np.sort(side), places[:-1], side="right") / len(side) for side in (first, second)]
    return float(np.sum(np.abs(shares[0] - shares[1]) * np.diff(places)))


def frechet_distance(first_ND: Values, second_MD: Values) -> float:
    """Fréchet distance, squared, between the Gaussians of two samples (Dowson and Landau 1982)."""
    apart = first_ND.mean(0) - second_MD.mean(0)
    one, other = (np.atleast_2d(np.cov(values, rowvar=False)) for values in (first_ND, second_MD))
    root = _square_root(one)
    crossed = np.linalg.eigvalsh(root @ other @ root).clip(min=0)
    return max(0.0, float(apart @ apart + np.trace(one) + np.trace(other) - 2 * np.sqrt(crossed).sum()))


def _square_root(matrix: Values) -> Values:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _standardise(values: Values, wanted: Values) -> tuple[Values, Values]:
    """Both in units of the reference's own mean and spread."""
    middle, spread = wanted.mean(0), wanted.std(0)
    spread[spread == 0] = 1.0
    return (values - middle) / spread, (wanted - middle) / spread


def _by_name(values: Values) -> dict[str, Values]:
    return {name: values[:, column] for column, name in enumerate(PROPERTIES)}
