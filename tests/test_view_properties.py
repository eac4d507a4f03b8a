"""Pictures of predicted properties say in words what they show; the table has every method."""

import numpy as np
import pytest

from biokit.errors import ConfigError
from biokit.tasks.property import Outcome, PropertyReport, TestPart
from biokit.tasks.property_baselines import Prediction
from biokit.tasks.property_data import PropertyData
from biokit.tasks.property_metrics import score
from biokit.view.properties import show_calibration, show_predictions, tabulate_properties

NUM = 400


def make_report(kind):
    """One split; the forest is honest, the head's errors are as large, but it is four times too sure of itself."""
    generator = np.random.default_rng(0)
    rows = np.arange(NUM)
    mean = generator.uniform(0.05, 0.95, NUM) if kind == "classification" else generator.normal(5, 2, NUM)
    measured = generator.uniform(0, 1, NUM) < mean if kind == "classification" else generator.normal(mean, 1)
    sure = np.where(mean > 0.5, 0.99, 0.01) if kind == "classification" else mean
    targets = measured.astype(np.float32)
    data = PropertyData("made", "activity", kind, ("C",) * NUM, targets, NUM)
    zeros, ones = np.zeros(NUM, dtype=np.float32), np.ones(NUM, dtype=np.float32)
    predictions = {
        "mean": Prediction(zeros + targets.mean(), zeros + targets.std(), zeros),
        "forest": Prediction(mean.astype(np.float32), zeros, ones),
        "frozen head": Prediction(sure.astype(np.float32), zeros, ones / 4),
    }
    outcomes = [
        Outcome(name, 0, found, score(kind, targets, found.mean, found.std)) for name, found in predictions.items()
    ]
    part = TestPart(rows, rows, rows, np.where(rows < 100, 0.2, 0.8).astype(np.float32))
    return PropertyReport(data, "scaffold", {0: part}, tuple(outcomes))


@pytest.fixture(scope="module")
def regression():
    return make_report("regression")


@pytest.fixture(scope="module")
def classification():
    return make_report("classification")


def test_the_table_has_the_best_first(regression):
    table = tabulate_properties(regression)
    assert table.head == ("method", "RMSE", "MAE", "R2", "calibration error")
    assert [row[0] for row in table.rows] == ["forest", "frozen head", "mean"]
    assert table.rows[0][1] == f"{regression.spread('forest', 'RMSE')[0]:.3f}"


def test_calibration_in_words(regression, classification):
    picture = show_calibration(regression)
    head = next(line for line in picture.alt.splitlines() if line.startswith("frozen head"))
    inside = float(head.split("90 % intervals ")[1].split("%")[0])
    assert 25 < inside < 40  # 0.41 standard deviations on either side hold 32 %
    assert picture.size == (640, 520)
    picture = show_calibration(classification, title="Class")
    lines = picture.alt.splitlines()
    assert [line.split(",")[0] for line in lines] == ["Class", "forest", "frozen head"]
    assert float(lines[1].split("error ")[1]) < 0.06 < 0.2 < float(lines[2].split("error ")[1])


def test_predictions_in_words(regression, classification):
    picture = show_predictions(regression)
    assert picture.size == (960, 520)
    assert "400 test molecules of 1 scaffold splits; 75% have a training molecule of similarity 0.4" in picture.alt
    assert f"forest: RMSE {regression.spread('forest', 'RMSE')[0]:.2f}" in picture.alt
    picture = show_predictions(classification, ["forest"])
    assert picture.size == (480, 520) and "ROC-AUC" in picture.alt and "frozen" not in picture.alt
    for methods in ([], ["tree"]):
        with pytest.raises(ConfigError, match="Valid: mean, forest, frozen head"):
            show_predictions(regression, methods)
