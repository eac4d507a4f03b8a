"""Parts of a table of measured properties: molecules to learn from, to stop by, and to test on.

Shapes: N molecules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biokit.chem.molecules import scaffold
from biokit.data.split import PART_NAMES, Parts, split_by_scaffold
from biokit.errors import ConfigError, DataError
from biokit.tasks.property_data import PropertyData

SPLITS = ("scaffold", "random")


def split_molecules(data: PropertyData, split: str, fractions: Sequence[float], seed: int) -> Parts:
    """The part (N,) of each molecule: 0 train, 1 val, 2 test.

    scaffold: no Bemis-Murcko scaffold stands in two parts; acyclic molecules stand each for itself. Scaffolds with
    many molecules go to train whatever the seed; the order of the others, and so who is tested, varies with it
    ("random scaffold split"). random: each molecule by itself.

    Raises:
        ConfigError: another split. DataError: a part, unless it was to be empty, without a molecule or with one class.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split}", "it is not known", f"Valid: {', '.join(SPLITS)}")
    keys = scaffold_keys(data.smiles) if split == "scaffold" else data.smiles
    groups = np.unique(np.array(keys, dtype=object), return_inverse=True)[1].astype(np.int64)
    parts = split_by_scaffold(groups, np.asarray(fractions, dtype=np.float64), seed)
    for number, (name, fraction) in enumerate(zip(PART_NAMES, fractions, strict=True)):
        if fraction:
            _check_part(data, parts == number, f"{name} part of the {split} split with seed {seed}")
    return parts


def scaffold_keys(smiles: Sequence[str]) -> list[str]:
    """Of each molecule its scaffold, or itself where it is acyclic."""
    return [scaffold(text) or f"acyclic {text}" for text in smiles]


def _check_part(data: PropertyData, mask: np.ndarray, asked: str) -> None:
    do = 'Give more molecules, another seed, or split="random"'
    if mask.sum() < 2:
        raise DataError(f"{data.name}: {asked}", f"it has {mask.sum()} molecules", do)
    if len(np.unique(data.targets[mask])) < 2:
        found = f"all {mask.sum()} molecules have the target {data.targets[mask][0]:g}"
        raise DataError(f"{data.name}: {asked}", found, do)
