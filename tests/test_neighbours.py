"""Neighbours in the latent space: those that a loop over all pairs finds."""

import re

import numpy as np
import pytest

from biokit.errors import ConfigError, DataError
from biokit.generate import neighbours
from biokit.generate.neighbours import find_neighbours

VECTORS = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def test_neighbours_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_QUERIES", 3)
    queries = VECTORS[5:12] + 0.01
    rows, distances = find_neighbours(VECTORS, queries, 4)
    for query, found, far in zip(queries.astype(float), rows, distances, strict=True):
        every = [float(np.sqrt(((vector.astype(float) - query) ** 2).sum())) for vector in VECTORS]
        order = sorted(range(40), key=every.__getitem__)[:4]
        assert list(found) == order
        np.testing.assert_allclose(far, [every[i] for i in order], rtol=1e-12)


def test_a_molecule_finds_itself_and_equals_come_in_order():
    rows, distances = find_neighbours(np.vstack([VECTORS, VECTORS]), VECTORS[:2], 2)
    assert rows.tolist() == [[0, 40], [1, 41]] and not distances.any()
    assert find_neighbours(VECTORS, VECTORS[:0], 3)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("vectors", "queries", "num", "error", "message"),
    [
        (VECTORS, VECTORS[:1], 41, ConfigError, "num_neighbours=41"),
        (VECTORS, VECTORS[:1], 0, ConfigError, "num_neighbours=0"),
        (VECTORS, VECTORS[:1, :5], 1, DataError, "(40, 6) and queries of shape (1, 5)"),
        (VECTORS, VECTORS[0], 1, DataError, "queries of shape (6,)"),
        (VECTORS, np.full((1, 6), np.nan, np.float32), 1, DataError, "NaN or infinity"),
    ],
)
def test_bad_input(vectors, queries, num, error, message):
    with pytest.raises(error, match=re.escape(message)):
        find_neighbours(vectors, queries, num)
