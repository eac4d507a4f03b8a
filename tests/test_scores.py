"""Scores on sets whose values are counted by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biokit.chem.scores import Sample, exact_match_and_invalid, score_samples, write_samples
from biokit.errors import DataError

SAMPLES = ["OCC", "CCO", "C1CC(", "", "c1ccccc1", "CC(=O)O", "CCO name", "O=C(O)C"]
TRAINING = ["C1=CC=CC=C1", "CCC", "not a molecule"]


def test_the_three_shares_on_a_set_counted_by_hand() -> None:
    scores = score_samples(SAMPLES, TRAINING)
    assert (scores.num_samples, scores.num_valid, scores.num_unique, scores.num_novel) == (8, 5, 3, 2)
    assert scores.validity == 5 / 8  # not C1CC( , not the empty string, not "CCO name"
    assert scores.uniqueness == 3 / 5  # ethanol twice, acetic acid twice, benzene
    assert scores.novelty == 2 / 3  # benzene is in the training set, written another way
    assert "62.5%  (5 of 8 samples" in str(scores)


def test_rows_keep_the_order_and_the_text_of_invalid_ones() -> None:
    rows = score_samples(SAMPLES, TRAINING).samples
    assert rows[0] == rows[1] == Sample("CCO", valid=True, novel=True)
    assert rows[2] == Sample("C1CC(", valid=False, novel=False)
    assert rows[3] == Sample("", valid=False, novel=False)
    assert rows[4] == Sample("c1ccccc1", valid=True, novel=False)


def test_a_canonical_training_set_is_taken_as_it_is() -> None:
    assert score_samples(["OCC"], ["CCO"], known_is_canonical=True).num_novel == 0
    assert score_samples(["OCC"], ["OCC"], known_is_canonical=True).num_novel == 1
    assert score_samples(["OCC"], ["OCC"]).num_novel == 0


def test_shares_of_nothing_have_no_value() -> None:
    none, invalid = score_samples([], []), score_samples(["C("], ["CCO"])
    assert math.isnan(none.validity) and invalid.validity == 0.0
    assert math.isnan(invalid.uniqueness) and math.isnan(invalid.novelty)
    assert "–" in str(invalid)


def test_molecules_csv_reads_back(tmp_path: Path) -> None:
    samples = [*SAMPLES, 'a "quoted", text', "two\nlines", "\ud800"]
    path = write_samples(score_samples(samples, TRAINING), tmp_path / "deep" / "molecules.csv")
    assert path.read_text().splitlines()[:4] == [
        "smiles,valid,novel",
        "CCO,True,True",
        "CCO,True,True",
        "C1CC(,False,False",
    ]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["smiles"] for row in rows[8:]] == ['a "quoted", text', "two\nlines", "\\ud800"]
    assert len(rows) == len(samples)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"molecules\.csv: it cannot be written"):
        write_samples(score_samples(["CCO"], []), tmp_path / "file" / "molecules.csv")


def test_exact_match_compares_molecules_not_text() -> None:
    assert exact_match_and_invalid(["OCC", "CCC", "C(", "C("], ["CCO", "CCO", "CCO", "C("]) == (0.25, 0.5)
    assert all(math.isnan(share) for share in exact_match_and_invalid([], []))
    with pytest.raises(DataError, match="1 predictions for 2 targets"):
        exact_match_and_invalid(["C"], ["C", "C"])


@given(
    st.lists(st.one_of(st.sampled_from(["CCO", "OCC", "C", "c1ccccc1", "C(", ""]), st.text(max_size=8)), max_size=20)
)
def test_counts_are_consistent_for_any_strings(samples: list[str]) -> None:
    scores = score_samples(samples, ["C"])
    assert 0 <= scores.num_novel <= scores.num_unique <= scores.num_valid <= scores.num_samples == len(samples)
    assert scores.num_valid == sum(row.valid for row in scores.samples)
    assert len({row.smiles for row in scores.samples if row.novel}) == scores.num_novel
    assert score_samples([row.smiles for row in scores.samples], ["C"]) == scores
