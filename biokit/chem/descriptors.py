"""Properties of molecules that RDKit computes: drug-likeness, lipophilicity, ease of synthesis, weight and more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors

from biokit.chem.molecules import Mol, parse_smiles
from biokit.errors import ConfigError

Property = Callable[[Mol], float]


def synthetic_accessibility(mol: Mol) -> float:
    """SA score, 1 (easy to make) to 10 (Ertl and Schuffenhauer 2009); the form in RDKit's Contrib folder."""
    return float(_sascorer().calculateScore(mol))


@functools.cache
def _sascorer() -> Any:
    from rdkit.Contrib.SA_Score import sascorer

    return sascorer


PROPERTIES: Mapping[str, Property] = {
    "QED": lambda mol: float(QED.qed(mol)),
    "logP": lambda mol: float(Crippen.MolLogP(mol)),  # type: ignore[attr-defined]
    "SA": synthetic_accessibility,
    "MW": lambda mol: float(Descriptors.MolWt(mol)),  # type: ignore[attr-defined]
    "TPSA": lambda mol: float(rdMolDescriptors.CalcTPSA(mol)),
    "donors": lambda mol: float(rdMolDescriptors.CalcNumHBD(mol)),
    "acceptors": lambda mol: float(rdMolDescriptors.CalcNumHBA(mol)),
    "rotatable": lambda mol: float(rdMolDescriptors.CalcNumRotatableBonds(mol)),
    "rings": lambda mol: float(rdMolDescriptors.CalcNumRings(mol)),
}
"""Name -> property; weights in g/mol, areas in square Angstrom. The first four are those that MOSES compares."""

UNITS = {"MW": "g/mol", "TPSA": "square Angstrom"}


def describe(molecules: Sequence[str | Mol], names: Sequence[str] = tuple(PROPERTIES)) -> npt.NDArray[np.float64]:
    """Properties (molecules, names) of SMILES or molecules.

    Raises:
        ConfigError: a property that is not known. DataError: a SMILES that cannot be parsed.
    """
    if unknown := [name for name in names if name not in PROPERTIES]:
        valid = f"Valid: {', '.join(PROPERTIES)}"
        raise ConfigError(f"property {', '.join(unknown)}", "it is not known", valid)
    mols = [parse_smiles(one) if isinstance(one, str) else one for one in molecules]
    values = [[PROPERTIES[name](mol) for name in names] for mol in mols]
    return np.array(values, dtype=np.float64).reshape(len(mols), len(names))
