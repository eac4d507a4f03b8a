"""Beam search against the textbook's: no cache, one molecule, plain lists."""

import math

import pytest
import torch

from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate import beam_search, encode_smiles, hiddens_of, log_likelihoods, sample_molecules
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
SMILES = ["CCO", "c1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "N"]
ATOL = 1e-4  # a score is the sum of at most 24 fp32 log-probabilities of order 5


@pytest.fixture(scope="module")
def model():
    """Random weights, sharpened, so that beams differ and end at different lengths."""
    built = MOLBART.build(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), TOKENIZER.vocab_size, 64, 3)
    with torch.no_grad():
        built.head.tokens.weight.mul_(6)
        built.head.tokens.bias[TOKENIZER.end_id] = 9.0
    return built.eval()


def next_log_probabilities(model, row, ids):
    """Of the next token after `ids`, the whole prefix computed again."""
    with torch.no_grad():
        logits = model(row, torch.tensor([ids]))[0, -1]
    logits[torch.from_numpy(TOKENIZER.non_chemical_ids())] = -math.inf
    return logits.log_softmax(-1).tolist()


def textbook_beams(model, row, num_beams, max_length, num_groups=1, diversity=0.0):
    """[(ids, score)] of one molecule, the best first."""
    size = num_beams // num_groups
    groups = [[([TOKENIZER.begin_id], 0.0)] for _ in range(num_groups)]
    for _ in range(max_length):
        chosen_before = []
        for number, beams in enumerate(groups):
            candidates = []
            for ids, score in beams:
                if ids[-1] == TOKENIZER.end_id:
                    candidates.append((score, ids, score))
                    continue
                for token, log in enumerate(next_log_probabilities(model, row, ids)):
                    if log > -math.inf:
                        judged = score + log - diversity * chosen_before.count(token)
                        candidates.append((judged, [*ids, token], score + log))
            candidates.sort(key=lambda candidate: -candidate[0])
            grown = [ids for ids, _ in beams if ids[-1] == TOKENIZER.end_id]
            groups[number] = [(ids, score) for _, ids, score in candidates[:size]]
            chosen_before += [ids[-1] for ids, _ in groups[number] if ids not in grown]
        if all(ids[-1] == TOKENIZER.end_id for beams in groups for ids, _ in beams):
            break
    return sorted((beam for beams in groups for beam in beams), key=lambda beam: -beam[1])


@pytest.mark.parametrize(("num_beams", "num_groups", "diversity"), [(1, 1, 0.0), (5, 1, 0.0), (6, 3, 0.8), (6, 2, 0.0)])
def test_beams_are_the_textbooks(model, num_beams, num_groups, diversity):
    src = encode_smiles(TOKENIZER, SMILES)
    found = beam_search(model, TOKENIZER, src, num_beams, num_groups=num_groups, diversity=diversity, max_length=24)
    lengths = set()
    for row, hypotheses in zip(src, found, strict=True):
        expected = textbook_beams(model, row[row != 0][None], num_beams, 24, num_groups, diversity)
        assert [TOKENIZER.decode(ids) for ids, _ in expected] == [h.smiles for h in hypotheses]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], abs=ATOL)
        lengths |= {len(ids) for ids, _ in expected}
    assert len(lengths) > 1 or num_beams == 1


def test_one_beam_is_greedy_and_scores_are_likelihoods(model):
    src = encode_smiles(TOKENIZER, SMILES)
    texts, scores = sample_molecules(model, TOKENIZER, src, max_length=24)
    found = beam_search(model, TOKENIZER, src, 1, max_length=24)
    assert [h.smiles for (h,) in found] == texts and [h.score for (h,) in found] == pytest.approx(scores, abs=ATOL)
    rows = [(row, h) for row, beams in enumerate(beam_search(model, TOKENIZER, src, 4)) for h in beams if h.smiles]
    likelihoods = log_likelihoods(model, TOKENIZER, src[[row for row, _ in rows]], [h.smiles for _, h in rows])
    assert likelihoods == pytest.approx([h.score for _, h in rows], abs=ATOL) and len(rows) > 8


def test_hiddens_do_as_well_as_inputs(model):
    src = encode_smiles(TOKENIZER, SMILES)
    hiddens = hiddens_of(model, src)
    assert beam_search(model, TOKENIZER, hiddens, 3, max_length=9) == beam_search(
        model, TOKENIZER, src, 3, max_length=9
    )
    assert log_likelihoods(model, TOKENIZER, hiddens, SMILES) == log_likelihoods(model, TOKENIZER, src, SMILES)


def test_diverse_beams_differ_more(model):
    src = encode_smiles(TOKENIZER, SMILES)
    plain = beam_search(model, TOKENIZER, src, 6, max_length=24)
    diverse = beam_search(model, TOKENIZER, src, 6, num_groups=6, diversity=50.0, max_length=24)

    def num_firsts(found):
        return [len({tuple(TOKENIZER.tokens(h.smiles)[:1]) for h in hypotheses}) for hypotheses in found]

    assert min(num_firsts(diverse)) == 6  # no two groups begin with the same token
    assert sum(num_firsts(diverse)) > sum(num_firsts(plain))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_beams": 0},
        {"num_groups": 3},
        {"diversity": -1.0},
        {"diversity": float("inf")},
        {"max_length": 65},
        {"banned": ["Xx"]},
    ],
)
def test_impossible_beams(model, keys):
    with pytest.raises(ConfigError):
        beam_search(model, TOKENIZER, encode_smiles(TOKENIZER, ["C"]), **({"num_beams": 4} | keys))


def test_pairs_must_pair(model):
    with pytest.raises(DataError, match="4 encoder inputs and 1 SMILES"):
        log_likelihoods(model, TOKENIZER, encode_smiles(TOKENIZER, SMILES), ["C"])
    with pytest.raises(DataError, match="65 tokens"):
        log_likelihoods(model, TOKENIZER, encode_smiles(TOKENIZER, ["C"]), ["C" * 64])
