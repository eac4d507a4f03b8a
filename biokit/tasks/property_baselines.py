"""What a model must beat: a random forest on Morgan fingerprints, and the mean of the training targets.

Shapes: N molecules, F bits of a fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from biokit.chem.similarity import Bits
from biokit.tasks.property_data import Targets
from biokit.tasks.property_metrics import import_sklearn

RADIUS, NUM_BITS = 2, 2048  # ECFP4 (Rogers and Hahn 2010)
NUM_TREES = 200
REGRESSION_FEATURES = 1 / 3  # of the bits are looked at for a cut: p/3 (Breiman 2001)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """Predictions (N) with their uncertainty, in the target's unit (or as probabilities of class 1).

    Attributes:
        aleatoric: standard deviation of the measurement, as the predictor believes.
        epistemic: standard deviation between the members of an ensemble.
    """

    mean: Floats
    aleatoric: Floats
    epistemic: Floats

    @property
    def std(self) -> Floats:
        """The whole standard deviation: variances add."""
        return np.hypot(self.aleatoric, self.epistemic)


def combine_members(mean_MN: npt.NDArray[np.floating], variance_MN: npt.NDArray[np.floating]) -> Prediction:
    """The mixture of the members' distributions (Lakshminarayanan, Pritzel and Blundell 2017)."""
    aleatoric = np.sqrt(variance_MN.mean(0))
    return Prediction(*(part.astype(np.float32) for part in (mean_MN.mean(0), aleatoric, mean_MN.std(0))))


def predict_mean(targets: Targets, kind: str, num_molecules: int) -> Prediction:
    """Everything is as the training molecules are on average (class 1 as often as there)."""
    mean = float(targets.mean(dtype=np.float64))
    std = np.sqrt(mean * (1 - mean)) if kind == "classification" else float(targets.std(dtype=np.float64))
    zeros = np.zeros(num_molecules, dtype=np.float32)
    return Prediction(zeros + np.float32(mean), zeros + np.float32(std), zeros)


def predict_by_forest(
    train_bits: Bits, targets: Targets, test_bits: Bits, kind: str, seed: int, num_trees: int = NUM_TREES
) -> Prediction:
    """A random forest on fingerprints (N,F), one thread; its uncertainty is the spread of its trees.

    Raises:
        EngineError: scikit-learn is not installed.
    """
    ensemble = import_sklearn("ensemble")
    if kind == "classification":
        forest = ensemble.RandomForestClassifier(num_trees, random_state=seed, n_jobs=1)
        forest.fit(train_bits, targets.astype(np.int64))
        mean_MN = np.stack([tree.predict_proba(test_bits)[:, 1] for tree in forest.estimators_])
        return combine_members(mean_MN, mean_MN * (1 - mean_MN))
    forest = ensemble.RandomForestRegressor(num_trees, max_features=REGRESSION_FEATURES, random_state=seed, n_jobs=1)
    forest.fit(train_bits, targets)
    mean_MN = np.stack([tree.predict(test_bits) for tree in forest.estimators_])
    return combine_members(mean_MN, np.zeros_like(mean_MN))
