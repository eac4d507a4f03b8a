"""Scores of sets against values worked out by hand, and against RDKit's own functions."""

import math

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import QED, Crippen, Descriptors, rdFingerprintGenerator

from biokit.chem.descriptors import PROPERTIES, describe
from biokit.chem.set_scores import compare_sets, frechet_distance, scaffold_similarity, wasserstein_distance
from biokit.chem.similarity import fingerprints, mean_similarity, nearest, tanimoto
from biokit.errors import ConfigError, DataError

ASPIRIN, IBUPROFEN, CAFFEINE = "CC(=O)Oc1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C"
SMILES = [ASPIRIN, IBUPROFEN, CAFFEINE, "CCO", "c1ccc2ccccc2c1"]


def test_tanimoto_is_rdkits():
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    expected = [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in SMILES]
    matrix = tanimoto(fingerprints(SMILES), fingerprints(SMILES))
    for row, one in enumerate(expected):
        np.testing.assert_allclose(matrix[row], DataStructs.BulkTanimotoSimilarity(one, expected), rtol=1e-6)
    assert mean_similarity(fingerprints(SMILES), fingerprints(SMILES)) == pytest.approx(matrix.mean(), rel=1e-6)
    rows, values = nearest(fingerprints(SMILES[:2]), fingerprints(SMILES[2:]))
    assert rows.tolist() == matrix[:2, 2:].argmax(1).tolist()
    assert values == pytest.approx(matrix[:2, 2:].max(1))
    assert tanimoto(np.zeros((1, 8), np.uint8), np.zeros((1, 8), np.uint8)).tolist() == [[1.0]]


def test_similarity_in_blocks_is_that_of_the_whole(monkeypatch):
    bits = fingerprints(SMILES)
    assert nearest(bits, bits[:0])[0].tolist() == [-1] * len(bits)
    whole = mean_similarity(bits, bits), nearest(bits, bits[::-1])
    monkeypatch.setattr("biokit.chem.similarity.BLOCK_ROWS", 2)
    assert mean_similarity(bits, bits) == pytest.approx(whole[0])
    assert [part.tolist() for part in nearest(bits, bits[::-1])] == [part.tolist() for part in whole[1]]


def test_properties_are_rdkits():
    values = dict(zip(PROPERTIES, describe([ASPIRIN])[0], strict=True))
    mol = Chem.MolFromSmiles(ASPIRIN)
    assert values["QED"] == QED.qed(mol) and values["logP"] == Crippen.MolLogP(mol)
    assert values["MW"] == Descriptors.MolWt(mol) == pytest.approx(180.159)
    assert values["SA"] == pytest.approx(1.58, abs=0.005)  # as published with the score's own examples
    assert (values["donors"], values["acceptors"], values["rings"], values["rotatable"]) == (1, 3, 1, 2)
    assert describe([], ["QED"]).shape == (0, 1)
    with pytest.raises(ConfigError, match="Valid: QED"):
        describe([ASPIRIN], ["taste"])


def test_distances_by_hand():
    one, other = np.array([0.0, 1.0, 3.0]), np.array([5.0, 6.0, 8.0])
    assert wasserstein_distance(one, other) == pytest.approx(5.0)  # all mass moves by 5
    assert wasserstein_distance(np.array([0.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])) == 0.0
    assert wasserstein_distance(np.array([0.0]), np.array([0.0, 4.0])) == pytest.approx(2.0)
    generator = np.random.default_rng(0)
    values = generator.normal(size=(5000, 3))
    assert frechet_distance(values, values) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(values, values + np.array([3.0, 0.0, 0.0])) == pytest.approx(9.0, rel=1e-9)
    # commuting covariances: the sum of (s1 - s2)^2 over the axes
    assert frechet_distance(values, values * 2.0) == pytest.approx(
        np.trace(np.cov(values, rowvar=False)) + ((values.mean(0)) ** 2).sum(), rel=1e-6
    )


def test_scaffolds_of_two_rings_are_counted():
    naphthalene, biphenyl = "c1ccc2ccccc2c1", "c1ccc(cc1)-c1ccccc1"
    first = [f"C{naphthalene}", f"CC{naphthalene}", f"C{biphenyl}", ASPIRIN, "CCO"]  # one ring, none: not counted
    second = [naphthalene]
    assert scaffold_similarity(first, second) == pytest.approx(2 / math.sqrt(5))
    assert scaffold_similarity(first, first) == pytest.approx(1.0)
    assert math.isnan(scaffold_similarity(first, ["CCO", "C"]))


def test_a_set_against_itself_and_another():
    same = compare_sets(SMILES, SMILES)
    assert same.scores["SNN"] == 1.0 and same.scores["scaffold similarity"] == pytest.approx(1.0)
    assert same.scores["Fréchet distance"] == pytest.approx(0.0, abs=1e-6)
    assert all(same.scores[f"{name} apart"] == 0.0 for name in PROPERTIES)
    bits = fingerprints(SMILES)
    assert same.scores["internal diversity"] == pytest.approx(1 - tanimoto(bits, bits).mean(), abs=1e-6)
    other = compare_sets(["CCO", "CCCO"], SMILES, {"size": lambda new, known: len(new) / len(known)})
    assert other.scores["size"] == 0.4 and other.scores["MW apart"] > 50 and "size" in str(other)
    assert other.generated["MW"].shape == (2,) and other.reference["MW"].shape == (5,)


def test_sets_that_cannot_be_compared():
    with pytest.raises(DataError, match="the generated one: 1 molecules"):
        compare_sets(["C"], SMILES)
    with pytest.raises(DataError, match="cannot be parsed"):
        compare_sets(["C", "C1"], SMILES)
