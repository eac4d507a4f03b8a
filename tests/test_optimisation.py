"""Guided optimisation: it finds better molecules, and goes on as if nothing had happened."""

import copy
import math

import numpy as np
import pytest
import torch

from biokit.chem.descriptors import PROPERTIES
from biokit.chem.molecules import canonicalize, parse_smiles
from biokit.chem.objectives import constrained, property_objective, similarity_objective, total
from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate.kept import hold_folder
from biokit.generate.optimisation import optimise
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
IDS = {token: index for index, token in enumerate(TOKENIZER.vocabulary)}
KEYS = {"num_generations": 6, "population": 8, "progress": False}


@pytest.fixture(scope="module")
def model():
    """Random weights: carbon, nitrogen, oxygen and ends are likely, and which of them depends on the memory."""
    built = MOLBART.build(ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 16, 3)
    with torch.no_grad():
        built.head.tokens.weight.mul_(3)
        built.head.tokens.bias[[IDS[token] for token in ("C", "N", "O", "S")] + [TOKENIZER.end_id]] = 9.0
        built.decoder[0].cross_attention.out.weight.mul_(8)
    return built.eval()


def weight(smiles):
    return PROPERTIES["MW"](parse_smiles(smiles))


def test_it_finds_better_ones_and_says_all_that_it_tried(model):
    found = optimise(model, TOKENIZER, "OCC", weight, num_generations=15, population=8, progress=False)
    assert found.start == "CCO" and found.ended == "finished" and len(found.generations) == 15
    best, score = found.best
    assert score == weight(best) > 1.5 * found.start_score
    curve = found.best_by_generation
    assert len(curve) == 16 and curve == sorted(curve) and curve[-1] == score
    assert list(found.found.values()) == sorted(found.found.values(), reverse=True)
    for generation in found.generations:
        for smiles, value in zip(generation.smiles, generation.scores, strict=True):
            assert math.isnan(value) if not smiles else canonicalize(smiles) == smiles and value == weight(smiles)


def test_it_goes_on_exactly_where_it_ended(model, tmp_path):
    whole = optimise(model, TOKENIZER, "CCO", weight, **KEYS)
    state = np.random.get_state()[1].tolist()
    first = optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path / "run", **(KEYS | {"num_generations": 2}))
    assert len(first.generations) == 2 and np.random.get_state()[1].tolist() == state
    with (tmp_path / "run" / "history.jsonl").open("a") as file:
        file.write('{"smiles": ["C')  # killed in the middle of a line
    calls = []

    def counted(smiles):
        calls.append(smiles)
        return weight(smiles)

    again = optimise(model, TOKENIZER, "CCO", counted, folder=tmp_path / "run", **KEYS)
    assert repr(again.generations) == repr(whole.generations) and again.best == whole.best
    known = {smiles for generation in first.generations for smiles in generation.smiles}
    assert not known & set(calls[1:])  # what was scored before is not scored again
    done = optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path / "run", **KEYS)
    assert repr(done) == repr(again)


def test_a_stop_file_ends_it(model, tmp_path):
    def stops(smiles):
        if len(seen := seen_smiles) == 3:
            (tmp_path / "run" / "STOP").touch()
        seen.add(smiles)
        return weight(smiles)

    seen_smiles = set()
    found = optimise(model, TOKENIZER, "CCO", stops, folder=tmp_path / "run", **(KEYS | {"num_generations": 50}))
    assert found.ended == "stopped" and 1 <= len(found.generations) < 50
    (tmp_path / "run" / "STOP").unlink()
    assert optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path / "run", **KEYS).ended == "finished"


def test_molecules_without_a_score_do_not_win(model):
    def picky(smiles):
        return weight(smiles) if "N" not in smiles else math.nan

    found = optimise(model, TOKENIZER, "CCO", picky, **KEYS)
    assert "N" not in found.best[0] and not any("N" in smiles for smiles in found.found)
    assert any("N" in smiles for generation in found.generations for smiles in generation.smiles)


def test_what_cannot_be(model, tmp_path):
    for keys in ({"num_generations": 0}, {"population": 3}, {"sigma": 0.0}):
        with pytest.raises(ConfigError):
            optimise(model, TOKENIZER, "CCO", weight, **(KEYS | keys))
    with pytest.raises(DataError, match="cannot be parsed"):
        optimise(model, TOKENIZER, "C1", weight, **KEYS)
    with pytest.raises(DataError, match=r"it fails on CCO: ZeroDivisionError"):
        optimise(model, TOKENIZER, "CCO", lambda smiles: 1 / 0, **KEYS)
    with pytest.raises(DataError, match="Start elsewhere"):
        optimise(model, TOKENIZER, "CCO", lambda smiles: math.nan, **KEYS)
    optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path, **(KEYS | {"num_generations": 1}))
    with pytest.raises(DataError, match="another start"):
        optimise(model, TOKENIZER, "CCN", weight, folder=tmp_path, **KEYS)
    with pytest.raises(DataError, match="another start_score"):
        optimise(model, TOKENIZER, "CCO", lambda smiles: weight(smiles) + 1, folder=tmp_path, **KEYS)
    with pytest.raises(DataError, match="another model"):
        optimise(copy_with_another_head(model), TOKENIZER, "CCO", weight, folder=tmp_path, **KEYS)
    with hold_folder(tmp_path, "a test"), pytest.raises(DataError, match="another process is at work"):
        optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path, **KEYS)
    (tmp_path / "history.jsonl").write_text('{"smiles": ["C"], "scores": [1.0]}\n')
    with pytest.raises(DataError, match="not 8 molecules"):
        optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path, **KEYS)
    (tmp_path / "history.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="Give a new folder"):
        optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path, **KEYS)
    (tmp_path / "optimisation.json").write_text("[]")
    with pytest.raises(DataError, match="it is no object"):
        optimise(model, TOKENIZER, "CCO", weight, folder=tmp_path, **KEYS)


def copy_with_another_head(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.tokens.bias += 1
    return other


def test_objectives_by_hand():
    assert property_objective("MW", -1.0)("CCO") == pytest.approx(-46.069)
    assert similarity_objective("CCO")("OCC") == 1.0
    far = constrained(property_objective("MW"), "CCO", at_least=0.4, weight=100.0)
    assert far("CCO") == pytest.approx(46.069)
    similarity = similarity_objective("CCO")("c1ccccc1")
    assert far("c1ccccc1") == pytest.approx(78.114 - 100 * (0.4 - similarity)) and similarity < 0.4
    assert total(property_objective("MW"), similarity_objective("CCO"))("CCO") == pytest.approx(47.069)
    with pytest.raises(ConfigError, match="Valid: QED"):
        property_objective("taste")
    with pytest.raises(ConfigError, match="no similarity"):
        constrained(property_objective("QED"), "CCO", 1.5)
