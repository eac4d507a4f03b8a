"""Which molecules lie next to one in the latent space.

Shapes: N molecules, Q queries, D hidden, K neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from biokit.errors import DataError
from biokit.generate.inputs import check_ranges

BLOCK_QUERIES = 256  # whose distances to all molecules are in memory at once


def find_neighbours(
    vectors_ND: npt.NDArray[np.float32], queries_QD: npt.NDArray[np.float32], num_neighbours: int = 10
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows (Q,K) of the vectors nearest to each query, the nearest first, and their Euclidean distances (Q,K).

    Of equally far ones the first comes first. A query that is among the vectors finds itself.

    Raises:
        ConfigError: a number outside 1 to N. DataError: shapes that do not agree, or values that are not finite.
    """
    if vectors_ND.ndim != 2 or queries_QD.ndim != 2 or vectors_ND.shape[1:] != queries_QD.shape[1:]:
        found = f"vectors of shape {vectors_ND.shape} and queries of shape {queries_QD.shape}"
        raise DataError("find neighbours", found, "Give (N,D) and (Q,D), of the same model")
    if not (np.isfinite(vectors_ND).all() and np.isfinite(queries_QD).all()):
        raise DataError("find neighbours", "a vector holds NaN or infinity", "Leave those molecules out")
    num_vectors = len(vectors_ND)
    valid = f"1 to {num_vectors}, the number of vectors"
    check_ranges({"num_neighbours": (num_neighbours, 1 <= num_neighbours <= num_vectors)}, valid)
    known_ND = vectors_ND.astype(np.float64)
    squares_N = (known_ND**2).sum(1)
    rows, distances = [], []
    for start in range(0, len(queries_QD), BLOCK_QUERIES):
        block_QD = queries_QD[start : start + BLOCK_QUERIES].astype(np.float64)
        squared_QN = (block_QD**2).sum(1)[:, None] + squares_N[None] - 2 * block_QD @ known_ND.T
        nearest_QK = np.argsort(squared_QN, axis=1, kind="stable")[:, :num_neighbours]
        rows.append(nearest_QK)
        distances.append(np.linalg.norm(known_ND[nearest_QK] - block_QD[:, None], axis=-1))
    shape = (0, num_neighbours)
    return np.concatenate([np.empty(shape, np.int64), *rows]), np.concatenate([np.empty(shape), *distances])
