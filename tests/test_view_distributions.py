"""Comparisons of sets and searches as tables and pictures: every number shown is the one computed."""

import math
import re

import numpy as np
import pytest

from biokit.chem.scores import score_samples
from biokit.chem.set_scores import compare_sets
from biokit.errors import ConfigError
from biokit.generate.optimisation import Generation, Optimisation
from biokit.view.distributions import show_distributions, tabulate_scores
from biokit.view.search import show_search

FIRST, SECOND = ["CCO", "c1ccccc1O", "CCN"], ["CCO", "CCCCCC", "c1ccncc1", "CC(=O)O"]


@pytest.fixture(scope="module")
def comparison():
    return compare_sets(FIRST, SECOND, {"more": lambda new, known: len(new) - len(known)})


def test_the_table_holds_every_score(comparison):
    table = tabulate_scores(comparison, score_samples([*FIRST, "C("], SECOND))
    shown = {name: value for name, value, _ in table.rows}
    assert shown["validity"] == "0.750" and shown["novelty"] == "0.667" and shown["more"] == "-1.000"
    assert shown["scaffold similarity"] == "–"  # no scaffold of two rings: no value, not 0
    for name, value in comparison.scores.items():
        assert shown[name] == ("–" if math.isnan(value) else f"{value:.3f}")
    assert all(meaning for _, _, meaning in table.rows)


def test_the_picture_says_mean_and_spread(comparison):
    picture = show_distributions(comparison, ("MW", "logP"), names=("mine", "theirs"))
    masses = comparison.generated["MW"]
    assert f"mine {np.mean(masses):.3g} ± {np.std(masses):.2g}" in picture.alt
    assert show_distributions(comparison).png != picture.png
    for properties, message in ((["mass"], "mass is not among them. Valid: QED"), ([], "none was asked for")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            show_distributions(comparison, properties)


def test_sets_of_equal_values_can_be_drawn():
    picture = show_distributions(compare_sets(["C", "C"], ["C", "C"]))
    assert "MW: generated 16" in picture.alt


def test_a_search_shows_where_it_began_and_what_it_found():
    found = Optimisation("CCO", 0.4, [Generation(("CCN", ""), (0.5, math.nan)), Generation(("", ""), (math.nan,) * 2)])
    picture = show_search(found, name="QED")
    assert picture.alt == "2 different molecules scored in 2 generations: QED from 0.400 to 0.500; the best is CCN"
    assert show_search(Optimisation("CCO", 0.4)).alt.startswith("1 different molecules scored in 0 generations")
