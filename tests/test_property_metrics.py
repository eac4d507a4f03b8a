"""Metrics against values worked out by hand and scikit-learn's own; calibration on data of known noise."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from biokit.errors import EngineError
from biokit.tasks import property_metrics
from biokit.tasks.property_baselines import combine_members, predict_by_forest, predict_mean
from biokit.tasks.property_metrics import (
    CALIBRATION,
    LEVELS,
    coverage,
    coverage_error,
    import_sklearn,
    reliability,
    score,
)

MEASURED, MEAN = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 3.0, 3.0, 4.0])
LABELS, CHANCES = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.1, 0.4, 0.4, 0.9])


def test_regression_by_hand():
    found = score("regression", MEASURED, MEAN, np.ones(4))
    assert found["RMSE"] == pytest.approx(math.sqrt(5 / 4)) and found["MAE"] == pytest.approx(3 / 4)
    assert found["R2"] == pytest.approx(1 - 5 / 14) == pytest.approx(r2_score(MEASURED, MEAN))


def test_classification_by_hand():
    found = score("classification", LABELS, CHANCES, np.zeros(4))
    assert found["ROC-AUC"] == pytest.approx(3.5 / 4) == pytest.approx(roc_auc_score(LABELS, CHANCES))
    # at 0.9 half of class 1 is found with precision 1, at 0.4 the other half with precision 2/3
    assert (
        found["PR-AUC"] == pytest.approx(0.5 + 0.5 * 2 / 3) == pytest.approx(average_precision_score(LABELS, CHANCES))
    )
    assert found[CALIBRATION] == pytest.approx((0.1 * 1 + 0.1 * 2 + 0.1 * 1) / 4)


def test_coverage_by_hand():
    """The central half of a normal distribution ends at 0.674 standard deviations."""
    apart, zeros = np.array([0.67, 0.68, -1.64, 1.65]), np.zeros(4)
    assert coverage(apart, zeros, np.ones(4), (0.5, 0.9)).tolist() == [0.25, 0.75]
    assert coverage(apart, zeros, np.full(4, 10.0), (0.5,)).tolist() == [1.0]


def test_dishonest_uncertainty_is_detected():
    generator = np.random.default_rng(0)
    std = generator.uniform(0.5, 2.0, 20_000)
    measured = generator.normal(3.0, std)
    mean = np.full_like(std, 3.0)
    np.testing.assert_allclose(coverage(measured, mean, std), LEVELS, atol=0.015)
    assert coverage_error(measured, mean, std) < 0.01
    too_sure, too_modest = (coverage(measured, mean, factor * std) for factor in (0.4, 2.5))
    assert (too_sure < np.array(LEVELS) - 0.02).all() and (too_modest > np.array(LEVELS) + 0.02).all()
    assert coverage_error(measured, mean, 0.4 * std) > 0.2
    assert coverage_error(measured, mean, np.full_like(std, 1e-12)) == pytest.approx(0.5)


def test_dishonest_probabilities_are_detected():
    generator = np.random.default_rng(0)
    chances = generator.uniform(0, 1, 20_000)
    labels = (generator.uniform(0, 1, 20_000) < chances).astype(float)
    honest = reliability(labels, chances)
    assert honest.error < 0.02 and honest.counts.sum() == 20_000 and len(honest.counts) == 10
    np.testing.assert_allclose(honest.observed, honest.predicted, atol=0.05)
    pushed = np.where(chances > 0.5, 0.99, 0.01)
    assert reliability(labels, pushed).error == pytest.approx(0.24, abs=0.02)


def test_bins_keep_the_ends():
    found = reliability(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.95]))
    assert found.counts.tolist() == [1, 2] and found.observed.tolist() == [0.0, 1.0]
    assert found.predicted == pytest.approx([0.0, 0.975])


def test_without_scikit_learn_it_says_so(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(property_metrics.importlib, "import_module", missing)
    with pytest.raises(EngineError, match=r"scikit-learn is not installed. pip install"):
        import_sklearn("metrics")


def test_members_are_mixed():
    """Two normal distributions at 0 and 2: variance = mean variance + variance of the means."""
    found = combine_members(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]]))
    assert (
        found.mean.tolist() == [1.0] and found.aleatoric[0] == pytest.approx(2.0) and found.epistemic.tolist() == [1.0]
    )
    assert found.std[0] == pytest.approx(math.sqrt(4.0 + 1.0))


def test_the_mean_predicts_the_mean():
    found = predict_mean(np.array([1, 2, 6], dtype=np.float32), "regression", 2)
    assert found.mean.tolist() == [3.0, 3.0] and found.std[0] == pytest.approx(math.sqrt(14 / 3))
    found = predict_mean(np.array([1, 0, 0, 0], dtype=np.float32), "classification", 1)
    assert found.mean[0] == 0.25 and found.std[0] == pytest.approx(math.sqrt(0.1875))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_forest_learns_what_bits_say(kind):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2, (300, 16), dtype=np.uint8)
    clean = bits[:, 0].astype(np.float32)
    targets = clean if kind == "classification" else 3 * clean + bits[:, 1]
    found = predict_by_forest(bits[:200], targets[:200], bits[200:], kind, 7, num_trees=20)
    again = predict_by_forest(bits[:200], targets[:200], bits[200:], kind, 7, num_trees=20)
    other = predict_by_forest(bits[:200], targets[:200], bits[200:], kind, 8, num_trees=20)
    assert np.abs(found.mean - targets[200:]).mean() < 0.25 * targets.std()
    assert np.array_equal(found.mean, again.mean) and not np.array_equal(found.mean, other.mean)
    assert (found.epistemic > 0).any() and (kind == "classification" or not found.aleatoric.any())
