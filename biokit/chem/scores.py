"""Scores of generated SMILES, by the definitions of MOSES (Polykovskiy et al. 2020, section 3.2).

validity = valid / all, uniqueness = distinct / valid, novelty = distinct and not known / distinct. "distinct" compares
canonical SMILES; known are the training set and the prompts. A share of nothing is NaN: with no valid sample,
uniqueness has no value.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from biokit.chem.molecules import canonicalize
from biokit.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One generated string: canonical SMILES where it is a molecule, else the raw text."""

    smiles: str
    valid: bool
    novel: bool


@dataclass(frozen=True)
class Scores:
    """Counts and shares of generated SMILES, with a row for each sample in the order given."""

    samples: tuple[Sample, ...]
    num_samples: int
    num_valid: int
    num_unique: int
    num_novel: int

    @property
    def validity(self) -> float:
        return _share(self.num_valid, self.num_samples)

    @property
    def uniqueness(self) -> float:
        return _share(self.num_unique, self.num_valid)

    @property
    def novelty(self) -> float:
        return _share(self.num_novel, self.num_unique)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"validity   {_percent(self.validity)}  ({self.num_valid} of {self.num_samples} samples are molecules)",
                f"uniqueness {_percent(self.uniqueness)}  ({self.num_unique} distinct of {self.num_valid} valid)",
                f"novelty    {_percent(self.novelty)}  ({self.num_novel} of {self.num_unique} distinct are not among "
                "the known molecules)",
            ]
        )


def canonicalize_all(smiles: Iterable[str]) -> list[str]:
    """Canonical SMILES of each string; "" for one that is no molecule."""
    return [_canonical(text) for text in smiles]


def score_samples(samples: Sequence[str], known: Iterable[str], *, known_is_canonical: bool = False) -> Scores:
    """Score generated strings against the molecules that the model has seen.

    Args:
        samples: generated strings; one that cannot be parsed, or is empty, is invalid.
        known: SMILES of the training set, and of the prompts where the model was prompted: a copied prompt is not
            novel. Those that cannot be parsed are left out.
        known_is_canonical: they are RDKit's canonical SMILES already (token stores hold such), so none is parsed.
    """
    canonical = canonicalize_all(samples)
    seen = set(known if known_is_canonical else canonicalize_all(known))
    rows = tuple(
        Sample(found or raw, bool(found), bool(found) and found not in seen)
        for raw, found in zip(samples, canonical, strict=True)
    )
    distinct = {found for found in canonical if found}
    return Scores(
        samples=rows,
        num_samples=len(rows),
        num_valid=sum(row.valid for row in rows),
        num_unique=len(distinct),
        num_novel=len(distinct - seen),
    )


def write_samples(scores: Scores, path: str | Path) -> Path:
    """Write `smiles,valid,novel`, a row for each sample, invalid ones kept; `True` and `False` as pandas reads them.

    Raises:
        DataError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["smiles", "valid", "novel"])
            writer.writerows([row.smiles, row.valid, row.novel] for row in scores.samples)
    except OSError as error:
        raise DataError(f"write {target}", f"it cannot be written ({error})", "Give another path") from error
    return target


def exact_match_and_invalid(predicted: Sequence[str], targets: Sequence[str]) -> tuple[float, float]:
    """Share of predictions that are their target's molecule, and share that are no molecule; NaN for no prediction.

    Raises:
        DataError: the two differ in length.
    """
    if len(predicted) != len(targets):
        found = f"{len(predicted)} predictions for {len(targets)} targets"
        raise DataError("exact match", found, "Give one prediction a target")
    found_smiles, wanted = canonicalize_all(predicted), canonicalize_all(targets)
    num_exact = sum(bool(found) and found == target for found, target in zip(found_smiles, wanted, strict=True))
    return _share(num_exact, len(targets)), _share(found_smiles.count(""), len(targets))


def _canonical(text: str) -> str:
    try:
        return canonicalize(text)
    except DataError:
        return ""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _percent(share: float) -> str:
    return "   –  " if math.isnan(share) else f"{100 * share:5.1f}%"
