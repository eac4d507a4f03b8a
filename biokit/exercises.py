"""Checks for the exercises at the end of each notebook: `check(name, answer)` says whether an answer holds.

The notebooks in `notebooks/solutions/` work every one out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from biokit.errors import DataError

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


@dataclass(frozen=True)
class Exercise:
    """A question, a test of its answer, and a hint for a wrong one."""

    holds: Callable[[Any], bool]
    hint: str


def check(name: str, answer: Any = None) -> str:
    """Say whether `answer` solves the exercise `name`; no answer yet gives the hint.

    Raises:
        DataError: there is no such exercise.
    """
    if name not in EXERCISES:
        raise DataError(f'exercise "{name}"', "there is none of that name", f"Take one of: {', '.join(EXERCISES)}")
    exercise = EXERCISES[name]
    if answer is None:
        return f"{name}: no answer yet. Hint: {exercise.hint}"
    try:
        right = exercise.holds(answer)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, DataError) as error:
        return f"{name}: the answer cannot be checked ({error}). Hint: {exercise.hint}"
    return f"{name}: right." if right else f"{name}: not yet. Hint: {exercise.hint}"


def _is_random_aspirin(smiles: str) -> bool:
    from biokit.chem.molecules import canonicalize

    return smiles != canonicalize(ASPIRIN) and canonicalize(smiles) == canonicalize(ASPIRIN)


def _is_novel_valid(answer: tuple[str, set[str]]) -> bool:
    from biokit.chem.molecules import canonicalize

    smiles, known = answer
    return canonicalize(smiles) not in known


def _is_better_aspirin(smiles: str) -> bool:
    from biokit.chem.descriptors import describe
    from biokit.chem.similarity import fingerprints, tanimoto

    alike = tanimoto(fingerprints([smiles]), fingerprints([ASPIRIN]))[0, 0]
    own, aspirins = describe([smiles, ASPIRIN], ["QED"])[:, 0]
    return bool(alike >= 0.4 and own > aspirins)


def _are_alike_and_different(answer: tuple[str, str]) -> bool:
    from biokit.chem.molecules import canonicalize
    from biokit.chem.similarity import fingerprints, tanimoto

    first, second = (canonicalize(smiles) for smiles in answer)
    return first != second and bool(tanimoto(fingerprints([first]), fingerprints([second]))[0, 0] == 1)


EXERCISES = {
    "aspirin tokens": Exercise(lambda n: n == 21, "SmilesTokenizer.packaged().tokens(smiles) lists them"),
    "uniform loss": Exercise(
        lambda loss: abs(loss - math.log(523)) < 0.005, "a model that knows nothing gives each of 523 tokens 1/523"
    ),
    "novel molecule": Exercise(
        _is_novel_valid, "give (smiles, set of known SMILES) for a sample that is valid and not in the set"
    ),
    "unclosed ring": Exercise(
        lambda smiles: "ring" in _reason(smiles), "a ring bond that is opened, like the 1 in C1CC, must be closed"
    ),
    "another aspirin": Exercise(_is_random_aspirin, "random_smiles(mol_to_bytes(ASPIRIN), 5, seed=1) gives five"),
    "padding": Exercise(
        lambda ratio: 1.0 <= ratio <= 1.05, "padding_ratio(loader.plan(0), lengths) with length buckets on"
    ),
    "largest gradient": Exercise(lambda name: name == "head.tokens", "take max(norms, key=norms.get)"),
    "overfitted": Exercise(
        lambda loss: 0 <= loss < 0.05, "more steps: eight molecules can be learnt by heart to a loss below 0.05"
    ),
    "fewest bytes": Exercise(
        lambda name: name == "Zero3", "rank_memory(layout, parameters).total for the fullest rank of each layout"
    ),
    "tensor sizes": Exercise(
        lambda sizes: sorted(sizes) == [1, 2, 4, 8], "a size must divide the heads; find_layout refuses the others"
    ),
    "pipeline bubble": Exercise(
        lambda share: abs(share - 1 / 5) < 1e-9, "draw both stages turn by turn: how many turns, how many of them idle?"
    ),
    "better aspirin": Exercise(
        _is_better_aspirin, "optimise(model, tokenizer, ASPIRIN, constrained(property_objective('QED'), ASPIRIN, 0.4))"
    ),
    "alike but different": Exercise(
        _are_alike_and_different, "fingerprints see two bonds around each atom, and whether a pattern is there at all"
    ),
    "diversity of one": Exercise(
        lambda value: abs(value) < 1e-9, "compare_sets(['CCO', 'CCO'], known).scores['internal diversity']"
    ),
}


def _reason(smiles: str) -> str:
    from biokit.chem.molecules import canonicalize

    try:
        canonicalize(smiles)
    except DataError as error:
        return str(error)
    return "it is a molecule"
