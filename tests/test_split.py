import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biokit.data.split import check_disjoint, parse_ratio, split_at_random, split_by_ratio, split_by_scaffold
from biokit.errors import ConfigError

HALF = np.array([0.5, 0.25, 0.25])


def sizes(parts: np.ndarray) -> list[int]:
    return np.bincount(parts, minlength=3).tolist()


def test_ratio_text() -> None:
    assert parse_ratio("90,5,5").tolist() == [0.9, 0.05, 0.05]
    assert parse_ratio("949, 50, 1").tolist() == [0.949, 0.05, 0.001]
    assert parse_ratio("1").tolist() == [1, 0, 0]


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1"])
def test_bad_ratios(text: str) -> None:
    with pytest.raises(ConfigError, match="split_ratio"):
        parse_ratio(text)


@given(st.integers(0, 5000), st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any))
def test_ratio_split_is_contiguous_and_within_one(num: int, numbers: list[int]) -> None:
    fractions = parse_ratio(",".join(map(str, numbers)))
    parts = split_by_ratio(num, fractions)
    assert len(parts) == num
    assert (np.diff(parts) >= 0).all()
    assert (np.abs(np.array(sizes(parts)) - num * fractions) <= 1 + 1e-6).all()
    assert not any(size for size, number in zip(sizes(parts), numbers, strict=True) if number == 0)


def test_random_split_is_a_pure_function_of_seed_and_row() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    parts = split_at_random(hashes, HALF, 7)
    order = np.random.default_rng(1).permutation(len(hashes))
    assert np.array_equal(split_at_random(hashes[order][:500], HALF, 7), parts[order][:500])
    assert not np.array_equal(split_at_random(hashes, HALF, 8), parts)
    # six standard deviations of the binomial
    spread = 6 * np.sqrt(20_000 * HALF * (1 - HALF))
    assert (np.abs(np.array(sizes(parts)) - 20_000 * HALF) < spread).all()


def test_random_split_of_consecutive_hashes_is_mixed() -> None:
    parts = split_at_random(np.arange(10_000, dtype=np.uint64), np.array([0.9, 0.05, 0.05]), 0)
    assert (np.abs(np.array(sizes(parts)[1:]) - 500) < 6 * np.sqrt(10_000 * 0.05)).all()
    assert sizes(split_at_random(np.arange(1000, dtype=np.uint64), np.array([1.0, 0, 0]), 0)) == [1000, 0, 0]


def test_scaffold_split() -> None:
    rng = np.random.default_rng(0)
    raw = np.concatenate([np.zeros(400, int), rng.integers(1, 300, 600)])
    groups = np.unique(raw, return_inverse=True)[1]
    parts = split_by_scaffold(groups, HALF, 3)
    check_disjoint(groups, parts)
    assert np.abs(np.array(sizes(parts)) - 1000 * HALF).max() <= 5
    assert set(parts[groups == groups[0]]) == {0}  # the group larger than val and test together
    assert np.array_equal(parts, split_by_scaffold(groups, HALF, 3))
    assert not np.array_equal(parts, split_by_scaffold(groups, HALF, 4))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(0, 5))
def test_scaffolds_are_disjoint(raw: list[int], seed: int) -> None:
    groups = np.unique(raw, return_inverse=True)[1]
    assert len(split_by_scaffold(groups, HALF, seed)) == len(raw)


def test_the_check_of_disjointness_can_fail() -> None:
    with pytest.raises(AssertionError, match="two parts"):
        check_disjoint(np.array([0, 0, 1]), np.array([0, 1, 1], dtype=np.int8))
