"""Generation: the cache, the filters and the bans do what their definitions say."""

import numpy as np
import pytest
import torch

from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate import encode_smiles, filter_logits, sample_like, sample_molecules
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
SMILES = ["CCO", "c1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "N"]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    return MOLBART.build(config, TOKENIZER.vocab_size, 64, 3).eval()


def greedy_without_cache(model, src, max_length):
    """The textbook loop: the whole prefix again for every token, one molecule at a time."""
    banned = torch.from_numpy(TOKENIZER.non_chemical_ids().astype(np.int64))
    texts, scores = [], []
    for row in src:
        row = row[row != 0][None]
        ids, score = [TOKENIZER.begin_id], 0.0
        while len(ids) <= max_length and ids[-1] != TOKENIZER.end_id:
            with torch.no_grad():
                logits = model(row, torch.tensor([ids]))[0, -1]
            logits[banned] = float("-inf")
            ids.append(int(logits.argmax()))
            score += float(logits.log_softmax(-1)[ids[-1]])
        texts.append(TOKENIZER.decode(ids))
        scores.append(score)
    return texts, scores


def test_greedy_equals_the_uncached_loop(model):
    src = encode_smiles(TOKENIZER, SMILES)
    texts, scores = sample_molecules(model, TOKENIZER, src, max_length=20)
    expected_texts, expected_scores = greedy_without_cache(model, src, 20)
    assert texts == expected_texts
    assert np.allclose(scores, expected_scores, atol=1e-4)  # 20 fp32 log-probabilities of order 5


def test_sampling_depends_on_the_seed(model):
    src = encode_smiles(TOKENIZER, SMILES * 4)
    draws = [sample_molecules(model, TOKENIZER, src, "sample", max_length=10, seed=seed)[0] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_k_1_is_greedy(model):
    src = encode_smiles(TOKENIZER, SMILES)
    greedy = sample_molecules(model, TOKENIZER, src, max_length=12)
    assert sample_molecules(model, TOKENIZER, src, "sample", top_k=1, max_length=12) == greedy


def test_the_coldest_sample_is_greedy(model):
    src = encode_smiles(TOKENIZER, SMILES)
    greedy = sample_molecules(model, TOKENIZER, src, max_length=12)
    assert sample_molecules(model, TOKENIZER, src, "sample", temperature=1e-38, max_length=12) == greedy


def test_banned_tokens_never_come(model):
    src = encode_smiles(TOKENIZER, SMILES * 16)
    texts, _ = sample_molecules(model, TOKENIZER, src, "sample", temperature=50.0, max_length=30)
    chemistry = set(TOKENIZER.vocabulary[TOKENIZER.chem_start :])
    assert all(token in chemistry for text in texts for token in TOKENIZER.tokens(text))
    assert sum(len(text) for text in texts) > 500


def test_filters_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))

    def kept(**keys):
        return torch.isfinite(filter_logits(logits.clone(), **keys)).tolist()

    assert kept(top_k=2, top_p=1.0) == [[True, True, False, False], [False, False, True, True]]
    assert kept(top_k=0, top_p=0.79) == [[True, True, False, False], [False, False, True, True]]
    assert kept(top_k=0, top_p=0.81)[0] == [True, True, True, False]
    assert kept(top_k=0, top_p=1e-9)[0] == [True, False, False, False]
    assert kept(top_k=9, top_p=1.0) == [[True] * 4] * 2


@pytest.mark.parametrize(
    "keys",
    [
        {"sampling_alg": "best"},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"max_length": 65},
    ],
)
def test_impossible_sampling(model, keys):
    with pytest.raises(ConfigError):
        sample_molecules(model, TOKENIZER, encode_smiles(TOKENIZER, ["C"]), **keys)


@pytest.mark.parametrize(
    ("smiles", "words"), [([], "empty"), (["CC", ""], "it is empty"), (["C[Xx]"], "not in the voc")]
)
def test_impossible_input(smiles, words):
    with pytest.raises(DataError, match=words):
        encode_smiles(TOKENIZER, smiles)


def test_too_long_an_input_and_no_samples(model):
    with pytest.raises(DataError, match="66 tokens"):
        sample_molecules(model, TOKENIZER, encode_smiles(TOKENIZER, ["C" * 64]), max_length=9)
    with pytest.raises(ConfigError, match="num_samples=0"):
        sample_like(model, TOKENIZER, [1], 0)


def test_encoded_rows():
    ids = encode_smiles(TOKENIZER, ["CC", "CCCC"])
    carbon = TOKENIZER.vocabulary.index("C")
    assert ids.tolist() == [[2, carbon, carbon, 3, 0, 0], [2, carbon, carbon, carbon, carbon, 3]]


def test_sample_like_goes_round_the_loader(model, tmp_path):
    from biokit.data.molecules import MoleculeLoader, open_part
    from biokit.train import prepare_data
    from tests.small_run import small_config

    config = small_config(tmp_path)
    store, molecules = open_part(prepare_data(config), "train", config.data)
    loader = MoleculeLoader(store, molecules, TOKENIZER, config.data, 1, batch_size=5)
    samples = sample_like(model, TOKENIZER, loader, 2 * len(store) + 1, seed=1)
    assert len(samples) == 2 * len(store) + 1
    assert samples == sample_like(model, TOKENIZER, loader, 2 * len(store) + 1, seed=1)
