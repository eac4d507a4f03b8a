"""Methods compared over splits, and a fitted predictor that is kept: what it says, and what it refuses to load."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch

from biokit.chem.descriptors import describe
from biokit.chem.molecules import canonicalize, parse_smiles
from biokit.chem.similarity import fingerprints, tanimoto
from biokit.config import ModelConfig
from biokit.errors import CheckpointError, ConfigError, DataError
from biokit.generate import encode_smiles, hiddens_of, mean_of
from biokit.models.molbart import MOLBART
from biokit.tasks.property import Outcome, PropertyReport, TestPart, compare_predictors
from biokit.tasks.property_baselines import Prediction
from biokit.tasks.property_data import PropertyData
from biokit.tasks.property_head import HeadOptions
from biokit.tasks.property_metrics import CALIBRATION, score
from biokit.tasks.property_predictor import PropertyPredictor, encoder_tensors, fit_property
from biokit.tasks.property_splits import scaffold_keys
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
FAST = HeadOptions(width=16, max_epochs=8, patience=4, batch_size=16)
KEYS = {"num_members": 2, "num_trees": 50, "options": FAST, "progress": False}
ENDS = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCNC1", "O", "N", "S", "Cl", "c1ccoc1", "c1ccsc1", "C1CC1", "C(C)C"]
SMILES = tuple(dict.fromkeys(canonicalize("C" * length + end) for length in range(1, 11) for end in ENDS))


def build(seed):
    return MOLBART.build(
        ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 40, seed
    )


@pytest.fixture(scope="module")
def model():
    return build(3).eval()


@pytest.fixture(scope="module")
def data():
    """RDKit's logP, which both fingerprints and tokens say something about."""
    return PropertyData(
        "made", "logP", "regression", SMILES, describe(SMILES, ["logP"])[:, 0].astype(np.float32), len(SMILES)
    )


@pytest.fixture(scope="module")
def classes(data):
    labels = (data.targets > np.median(data.targets)).astype(np.float32)
    return dataclasses.replace(data, kind="classification", targets=labels)


@pytest.fixture(scope="module")
def report(data, model):
    return compare_predictors(data, model, TOKENIZER, **KEYS)


def test_all_methods_are_tested_on_the_same_unseen_scaffolds(report, data):
    keys = np.array(scaffold_keys(data.smiles))
    assert report.methods == ["mean", "forest", "frozen head"] and list(report.parts) == [0, 1, 2]
    assert len({tuple(part.rows) for part in report.parts.values()}) == 3
    for part in report.parts.values():
        assert len(part.rows) + len(part.train_rows) == len(data)
        assert not set(keys[part.rows]) & set(keys[part.train_rows])
        bits = fingerprints(data.smiles, 2, 2048)
        expected = tanimoto(bits[part.rows], bits[part.train_rows])
        assert part.similarities == pytest.approx(expected.max(1))
        assert set(part.nearest_rows) <= set(part.train_rows)
        assert part.nearest_rows[0] == part.train_rows[expected[0].argmax()]
    for outcome in report.outcomes:
        measured = data.targets[report.parts[outcome.seed].rows]
        found = outcome.prediction
        assert outcome.scores == score("regression", measured, found.mean, found.std)
        assert (found.std > 0).all()


def test_learning_beats_the_mean_and_is_repeatable(report, data, model):
    assert report.rank()[-1] == "mean"
    again = compare_predictors(data, model, TOKENIZER, seeds=(2, 1), **KEYS)
    for outcome in again.outcomes:
        (same,) = (one for one in report.outcomes if (one.method, one.seed) == (outcome.method, outcome.seed))
        assert np.array_equal(same.prediction.mean, outcome.prediction.mean) and same.scores == outcome.scores


def test_classification_and_a_tuned_encoder(classes, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = dataclasses.replace(FAST, max_epochs=2)
    report = compare_predictors(
        classes, model, TOKENIZER, split="random", seeds=(5,), tune=True, **(KEYS | {"options": options})
    )
    assert report.methods[-1] == "tuned head" and report.metrics == ("ROC-AUC", "PR-AUC", CALIBRATION)
    assert report.values("mean", "ROC-AUC") == [0.5] and report.values("forest", "ROC-AUC")[0] > 0.8
    assert "±" not in report.describe("forest", "ROC-AUC") and "1 random split)" in report.verdict
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    head, tuned = (one.prediction.mean for one in report.outcomes[-2:])
    assert not np.array_equal(head, tuned) and ((tuned >= 0) & (tuned <= 1)).all()


def fake(values, kind="regression"):
    """A report with these primary metrics: method -> one a seed."""
    none = np.zeros(0, dtype=np.float32)
    metric = "RMSE" if kind == "regression" else "ROC-AUC"
    outcomes = [
        Outcome(method, seed, Prediction(none, none, none), {metric: value})
        for method, row in values.items()
        for seed, value in enumerate(row)
    ]
    part = TestPart(none.astype(int), none.astype(int), none.astype(int), none)
    data = PropertyData("x", "y", kind, (), none, 0)
    return PropertyReport(data, "scaffold", dict.fromkeys(range(len(outcomes) // len(values)), part), tuple(outcomes))


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (
            {"mean": [2.0, 2.0], "forest": [1.0, 1.2], "frozen head": [1.1, 1.3]}, "regression",
            "The forest wins (best in 2 of 2 scaffold splits): "
            "RMSE 1.100 ± 0.141; frozen head 1.200 ± 0.141, mean 2.000 ± 0.000.",
        ),
        (
            {"forest": [0.9, 0.7], "frozen head": [0.8, 0.9]}, "classification",
            "No clear winner, the frozen head is the best on average (best in 1 of 2 scaffold splits): "
            "ROC-AUC 0.850 ± 0.071; forest",
        ),
        ({"mean": [1.0], "forest": [1.5]}, "regression", "Nothing beats the mean of the training targets ("),
        ({"forest": [1.0], "frozen head": [1.0]}, "regression", "No clear winner"),
    ],
)  # fmt: skip
def test_the_verdict_is_honest(values, kind, words):
    assert fake(values, kind).verdict.startswith(words)


def test_spread_by_hand():
    report = fake({"forest": [1.0, 2.0, 4.0]})
    mean, deviation = report.spread("forest", "RMSE")
    assert mean == pytest.approx(7 / 3) and deviation == pytest.approx(math.sqrt(7 / 3))
    with pytest.raises(ConfigError, match="Valid: forest; RMSE"):
        report.spread("tree", "RMSE")


@pytest.mark.parametrize(
    "keys",
    [
        {"seeds": ()}, {"seeds": (1, 1)}, {"num_members": 0}, {"num_trees": 0}, {"fractions": (0.8, 0.2)},
        {"fractions": (0.9, 0.2, 0.1)},
        {"fractions": (0.9, 0.1, 0.0)}, {"split": "time"}, {"options": HeadOptions(width=0)},
    ],
)  # fmt: skip
def test_values_out_of_range(data, model, keys):
    with pytest.raises(ConfigError):
        compare_predictors(data, model, TOKENIZER, **(KEYS | keys))


def test_molecules_that_cannot_be_learnt(data, model):
    few = dataclasses.replace(data, smiles=data.smiles[:20], targets=data.targets[:20])
    same = dataclasses.replace(data, kind="classification", targets=np.ones(len(data), dtype=np.float32))
    long = dataclasses.replace(data, smiles=("C" * 50, *data.smiles[1:]))
    strange = dataclasses.replace(data, smiles=("[Og]", *data.smiles[1:]))
    for bad, words in ((few, "20 usable"), (same, "one class only"), (long, "52 tokens"), (strange, "vocabulary")):
        for fit in (compare_predictors, fit_property):
            with pytest.raises(DataError, match=words):
                fit(bad, model, TOKENIZER)


@pytest.fixture(scope="module", params=[False, True], ids=["frozen", "tuned"])
def predictor(request, data, model):
    return fit_property(data, model, TOKENIZER, num_members=2, tune=request.param, options=FAST)


def test_a_prediction_says_how_sure_it_is_and_who_is_near(predictor):
    found = predictor.predict(["C(c1ccccc1)", "BrCCBr", SMILES[5]])
    assert found.smiles == ("Cc1ccccc1", "BrCCBr", SMILES[5])
    np.testing.assert_allclose(found.std**2, found.aleatoric**2 + found.epistemic**2, rtol=1e-5)
    assert (
        found.nearest[0] == "Cc1ccccc1" and found.similarity[[0, 2]].tolist() == [1.0, 1.0] and found.similarity[1] < 1
    )
    for bad, words in (("CCO", "one string"), ([], "empty"), (["C1CC"], "unclosed ring"), (["C" * 60], "60 tokens")):
        with pytest.raises(DataError, match=words):
            predictor.predict(bad)


def test_the_contribution_of_an_atom_is_what_masking_it_takes_away(predictor):
    smiles = predictor.known[0]
    values = predictor.explain(smiles)
    source = encode_smiles(predictor.tokenizer, [smiles, smiles])
    source[1, 1] = predictor.tokenizer.mask_id  # the first token is an atom
    whole, masked = predictor.head.predict(mean_of(hiddens_of(predictor.model, source))).mean
    assert values.shape == (parse_smiles(smiles).GetNumAtoms(),)
    assert values[0] == pytest.approx(whole - masked, abs=1e-5)  # fp32, other rows beside it


def test_what_is_loaded_predicts_the_same_bits(predictor, model, tmp_path):
    folder = predictor.save(tmp_path / "kept")
    names = {"property.json", "head.safetensors", "molecules.smi"} | (
        {"encoder.safetensors"} if predictor.tuned else set()
    )
    assert {path.name for path in folder.iterdir()} == names and list(tmp_path.iterdir()) == [folder]
    loaded = PropertyPredictor.load(folder, build(3), TOKENIZER)
    ours, again = predictor.predict(list(SMILES)), loaded.predict(list(SMILES))
    for field in dataclasses.fields(ours):
        assert np.array_equal(getattr(ours, field.name), getattr(again, field.name)), field.name
    assert (loaded.target, loaded.kind, loaded.known, loaded.tuned) == ("logP", "regression", SMILES, predictor.tuned)
    for name, value in encoder_tensors(loaded.model).items():
        assert torch.equal(value, encoder_tensors(predictor.model)[name])
    loaded.save(tmp_path / "twice")
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    with pytest.raises(DataError, match="there is a folder already"):
        predictor.save(folder)
    with pytest.raises(CheckpointError, match="another model"):
        PropertyPredictor.load(folder, build(4), TOKENIZER)


@pytest.fixture
def saved(data, model, tmp_path):
    return fit_property(data, model, TOKENIZER, num_members=2, options=FAST).save(tmp_path / "kept")


def test_what_is_altered_is_not_loaded(saved, model, tmp_path):
    def change(**values):
        def act(folder):
            about = json.loads((folder / "property.json").read_text()) | values
            (folder / "property.json").write_text(json.dumps(about))

        return act

    def cut(name):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    faults = [
        (lambda folder: (folder / "head.safetensors").unlink(), "head.safetensors missing or altered"),
        (cut("head.safetensors"), "head.safetensors missing or altered"),
        (cut("molecules.smi"), "molecules.smi missing or altered"),
        (lambda folder: (folder / "property.json").unlink(), "property.json cannot be read"),
        (lambda folder: (folder / "property.json").write_text("[1]"), "property.json cannot be read"),
        (lambda folder: (folder / "code.pkl").write_text("x"), "it holds other files"),
        (change(format="other"), "not of format"),
        (change(kind="ranking"), "not of format"),
        (change(kind="classification"), "tensors do not fit"),
        (change(tuned=True), "does not name"),
        (change(files={}), "does not name"),
        (change(model="0" * 64), "another model"),
    ]
    for number, (act, words) in enumerate(faults):
        folder = tmp_path / f"broken{number}"
        shutil.copytree(saved, folder)
        act(folder)
        with pytest.raises(CheckpointError, match=words):
            PropertyPredictor.load(folder, model, TOKENIZER)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PropertyPredictor.load(tmp_path / "none", model, TOKENIZER)


def test_nothing_half_written_is_left(data, model, tmp_path, monkeypatch):
    predictor = fit_property(data, model, TOKENIZER, num_members=2, options=FAST)

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("biokit.tasks.property_predictor.describe_file", full)
        with pytest.raises(DataError, match="disk or quota is full"):
            predictor.save(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []
    assert predictor.save(tmp_path / "kept").is_dir()


def test_val_fractions_out_of_range(data, model):
    for keys in ({"val_fraction": 0.0}, {"val_fraction": 1.0}, {"num_members": 0}, {"options": HeadOptions(lr=-1.0)}):
        with pytest.raises(ConfigError):
            fit_property(data, model, TOKENIZER, **keys)
