"""How good predictions of a property are, and how honest their uncertainty is.

Shapes: N molecules, L levels, R bins.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from biokit.errors import EngineError

METRICS = {"regression": ("RMSE", "MAE", "R2"), "classification": ("ROC-AUC", "PR-AUC")}
CALIBRATION = "calibration error"
LOWER_IS_BETTER = ("RMSE", "MAE", CALIBRATION)
LEVELS = tuple(level / 20 for level in range(1, 20))  # of central intervals: 5 % to 95 %
NUM_BINS = 10

Values = npt.NDArray[np.floating[Any]]


def import_sklearn(module: str) -> Any:
    """A module of scikit-learn. Raises EngineError where that is not installed."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        do = 'pip install "biokit[analysis]"'
        raise EngineError("prediction of properties", "scikit-learn is not installed", do) from error


def score(kind: str, measured: Values, mean: Values, std: Values) -> dict[str, float]:
    """Every metric of predictions (N), and the calibration error of their uncertainty.

    Args:
        mean: predicted values, or probabilities of class 1.
        std: predicted standard deviations (regression).

    Raises:
        EngineError: scikit-learn is not installed. ValueError: one class only, or fewer than 2 molecules.
    """
    metrics = import_sklearn("metrics")
    if kind == "regression":
        return {
            "RMSE": float(metrics.root_mean_squared_error(measured, mean)),
            "MAE": float(metrics.mean_absolute_error(measured, mean)),
            "R2": float(metrics.r2_score(measured, mean)),
            CALIBRATION: coverage_error(measured, mean, std),
        }
    return {
        "ROC-AUC": float(metrics.roc_auc_score(measured, mean)),
        "PR-AUC": float(metrics.average_precision_score(measured, mean)),
        CALIBRATION: reliability(measured, mean).error,
    }


def coverage(measured: Values, mean: Values, std: Values, levels: Sequence[float] = LEVELS) -> Values:
    """Shares (L) of the measured values inside the central Gaussian intervals of these levels.

    Of honest predictions they equal the levels; below them the predictor is too sure of itself (Kuleshov, Fenner and
    Ermon 2018).
    """
    widths_L = np.array([NormalDist().inv_cdf((1 + level) / 2) for level in levels])
    apart_N = np.abs(np.asarray(measured, dtype=np.float64) - mean)
    return (apart_N[:, None] <= widths_L * np.asarray(std, dtype=np.float64)[:, None]).mean(0)


def coverage_error(measured: Values, mean: Values, std: Values) -> float:
    """Mean distance between the coverage and its level over `LEVELS`; 0 is honest, 0.5 the worst."""
    return float(np.abs(coverage(measured, mean, std) - np.array(LEVELS)).mean())


@dataclass(frozen=True)
class Reliability:
    """Of each bin of predicted probability that is not empty (R): its mean, the share of class 1, the molecules.

    Attributes:
        error: expected calibration error: the mean distance between the first two over the molecules (Guo et al. 2017).
    """

    predicted: Values
    observed: Values
    counts: npt.NDArray[np.int64]

    @property
    def error(self) -> float:
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.counts))


def reliability(labels: Values, probabilities: Values, num_bins: int = NUM_BINS) -> Reliability:
    """Bins of equal width of predicted probabilities (N) against labels 0 and 1."""
    bins_N = np.minimum((np.asarray(probabilities) * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins_N, minlength=num_bins)
    kept = counts > 0
    sums = [np.bincount(bins_N, weights=values, minlength=num_bins)[kept] for values in (probabilities, labels)]
    return Reliability(sums[0] / counts[kept], sums[1] / counts[kept], counts[kept])
