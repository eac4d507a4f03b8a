"""What an optimisation may aim at: functions of a canonical SMILES, higher is better.

Any function `str -> float` will do; NaN says that a molecule cannot be scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from biokit.chem.descriptors import PROPERTIES
from biokit.chem.molecules import parse_smiles
from biokit.chem.similarity import fingerprints, tanimoto
from biokit.errors import ConfigError

Objective = Callable[[str], float]


def property_objective(name: str, weight: float = 1.0) -> Objective:
    """A property of `PROPERTIES` times a weight (below 0: less is better). Raises ConfigError for another name."""
    if name not in PROPERTIES:
        raise ConfigError(f"property {name}", "it is not known", f"Valid: {', '.join(PROPERTIES)}")
    compute = PROPERTIES[name]
    return lambda smiles: weight * compute(parse_smiles(smiles))


def similarity_objective(reference: str, weight: float = 1.0) -> Objective:
    """Tanimoto similarity to a reference (Morgan, radius 2). Raises DataError where that cannot be parsed."""
    wanted = fingerprints([reference])
    return lambda smiles: weight * float(tanimoto(fingerprints([smiles]), wanted)[0, 0])


def constrained(objective: Objective, reference: str, at_least: float, weight: float = 10.0) -> Objective:
    """An objective that costs `weight` for each unit of similarity to a reference that is lacking.

    Raises:
        ConfigError: a similarity that is none. DataError: a reference that cannot be parsed.
    """
    if not 0.0 <= at_least <= 1.0:
        raise ConfigError(f"at_least={at_least}", "it is no similarity", "Give 0 to 1; 0.4 is usual")
    similarity = similarity_objective(reference)
    return lambda smiles: objective(smiles) - weight * max(0.0, at_least - similarity(smiles))


def total(*objectives: Objective) -> Objective:
    """The sum of several objectives; NaN where one of them is."""
    return lambda smiles: math.fsum(objective(smiles) for objective in objectives)
