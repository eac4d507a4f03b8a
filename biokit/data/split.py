"""Train, val and test: by ratio, at random, by scaffold. A split is an int8 array: 0 train, 1 val, 2 test."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from biokit.data.masking import mix_bits
from biokit.errors import ConfigError

PART_NAMES = ("train", "val", "test")

Parts = NDArray[np.int8]


def parse_ratio(text: str) -> NDArray[np.float64]:
    """Three fractions that add up to 1 from e.g. "90,5,5" or "949,50,1"; parts left out are 0.

    Raises:
        ConfigError: not one to three numbers, a negative one, or nothing but zeros.
    """
    try:
        numbers = [float(number) for number in text.replace("/", ",").split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(math.isfinite(n) and n >= 0 for n in numbers) or sum(numbers) <= 0:
        found = f'data.split_ratio is "{text}"'
        raise ConfigError("the split", found, "Give train,val,test as numbers that are not negative, e.g. 90,5,5")
    fractions = np.array([*numbers, 0.0, 0.0][:3])
    return fractions / fractions.sum()


def split_by_ratio(num_molecules: int, fractions: NDArray[np.float64]) -> Parts:
    """Contiguous parts in the order of the rows; no seed moves them (Megatron's `--split`).

    Part k ends at round(n * (f_0 + ... + f_k)), so the sizes add up and each is less than one molecule off.
    """
    ends = np.rint(num_molecules * np.cumsum(fractions)).astype(np.int64)
    ends[-1] = num_molecules
    return np.repeat(np.arange(3, dtype=np.int8), np.diff(ends, prepend=0))


def split_at_random(hashes: NDArray[np.uint64], fractions: NDArray[np.float64], seed: int) -> Parts:
    """Each molecule by itself: its part is a pure function of its canonical SMILES' hash and the seed.

    So a molecule stays in its part when rows are added, moved or doubled. Sizes vary as binomial draws do.
    """
    with np.errstate(over="ignore"):
        mixed = _scatter(hashes.astype(np.uint64) ^ _scatter(np.array([seed], dtype=np.uint64)))
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    bounds = np.cumsum(fractions)[:2]
    return np.searchsorted(bounds, uniform, side="right").astype(np.int8)


def split_by_scaffold(groups: NDArray[np.int64], fractions: NDArray[np.float64], seed: int) -> Parts:
    """Whole groups to parts, so that no scaffold stands in two.

    Groups of more than half of the smaller of val and test go first, largest first, and so to train as long as it
    has room; the others follow in an order that the seed decides. A group goes to the first of train, val and test
    that has room for all of it, else to the one with the most room. Acyclic molecules have no scaffold: the caller
    gives each its own group (by its SMILES), since in one they would be the largest group of all.

    Args:
        groups: (N,) the group of each molecule, numbered from 0 in the order of first appearance.
    """
    sizes = np.bincount(groups)
    quotas = np.rint(len(groups) * fractions)
    held_out = quotas[1:][quotas[1:] > 0]
    large = sizes > (held_out.min() / 2 if len(held_out) else np.inf)
    with np.errstate(over="ignore"):
        keys = _scatter(np.arange(len(sizes), dtype=np.uint64) ^ _scatter(np.array([seed], dtype=np.uint64)))
    order = np.lexsort((keys, np.where(large, -sizes, 0), ~large))
    room = quotas.tolist()
    part_of = np.zeros(len(sizes), dtype=np.int8)
    for group in order.tolist():
        size = int(sizes[group])
        part = next((k for k in range(3) if 0 < size <= room[k]), int(np.argmax(room)))
        room[part] -= size
        part_of[group] = part
    parts: Parts = part_of[groups]
    check_disjoint(groups, parts)
    return parts


def check_disjoint(groups: NDArray[np.int64], parts: Parts) -> None:
    """Raises AssertionError where a group stands in two parts."""
    pairs = np.unique(np.stack([groups, parts.astype(np.int64)]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1], "a scaffold stands in two parts"


def _scatter(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of each number: one to one, well mixed."""
    return mix_bits(numbers + np.uint64(0x9E3779B97F4A7C15))
