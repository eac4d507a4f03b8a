"""The checks of the exercises accept right answers, refuse wrong ones, and never fall over."""

import math

import pytest

from biokit.errors import DataError
from biokit.exercises import EXERCISES, check

RIGHT = {
    "aspirin tokens": 21,
    "uniform loss": math.log(523),
    "novel molecule": ("CCO", {"CC"}),
    "unclosed ring": "C1CC",
    "another aspirin": "O=C(C)Oc1ccccc1C(=O)O",
    "padding": 1.03,
    "largest gradient": "head.tokens",
    "overfitted": 0.01,
    "fewest bytes": "Zero3",
    "tensor sizes": [1, 2, 4, 8],
    "pipeline bubble": 0.2,
    "better aspirin": "CCOC(=O)c1ccccc1OC(C)=O",
    "alike but different": ("CCCCCCCC", "CCCCCCCCCC"),
    "diversity of one": 0.0,
}
WRONG = {
    "aspirin tokens": 20,
    "uniform loss": 6.0,
    "novel molecule": ("CC", {"CC"}),
    "unclosed ring": "CC(",
    "another aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "padding": 1.4,
    "largest gradient": "tail",
    "overfitted": 0.5,
    "fewest bytes": "DDP",
    "tensor sizes": [1, 2, 4],
    "pipeline bubble": 0.25,
    "better aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "alike but different": ("CCO", "OCC"),
    "diversity of one": 0.5,
}


def test_every_exercise_is_tried():
    assert set(EXERCISES) == set(RIGHT) == set(WRONG)


@pytest.mark.parametrize("name", EXERCISES)
def test_answers(name):
    assert check(name, RIGHT[name]) == f"{name}: right."
    assert "not yet" in check(name, WRONG[name])
    assert "no answer yet" in check(name)
    assert "right" not in check(name, object())


def test_an_invalid_sample_is_not_novel():
    assert "cannot be checked" in check("novel molecule", ("C1CC", set()))


def test_unknown_exercise():
    with pytest.raises(DataError, match="aspirin tokens"):
        check("none")
