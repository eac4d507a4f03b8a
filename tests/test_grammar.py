"""The grammar of SMILES: real molecules pass, and whatever it lets through has its brackets and rings closed."""

import pytest
import torch
from rdkit import Chem

from biokit.config import ModelConfig
from biokit.data.tables import read_table
from biokit.datasets import locate
from biokit.errors import ConfigError
from biokit.generate import beam_search, encode_smiles, sample_molecules
from biokit.generate.rules import TokenRules
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
IDS = {token: index for index, token in enumerate(TOKENIZER.vocabulary)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return MOLBART.build(
        ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2), TOKENIZER.vocab_size, 64, 5
    ).eval()


def refused_at(smiles, max_length=200):
    """The place of the first token of each string that the grammar does not let through; -1: none."""
    src = encode_smiles(TOKENIZER, smiles)[:, 1:]
    rules = TokenRules(TOKENIZER, CPU, grammar=True, max_length=max_length)
    rules.begin(len(smiles))
    places = [-1] * len(smiles)
    for position in range(src.shape[1]):
        allowed = torch.isfinite(rules.apply(torch.zeros(len(smiles), TOKENIZER.vocab_size)))
        for row, token in enumerate(src[:, position].tolist()):
            if token and places[row] < 0 and not allowed[row, token]:
                places[row] = position
        rules.advance(src[:, position])
    return places


def test_real_molecules_pass():
    rows = [row.text for row in read_table(locate("wehi_mols"))][::10]
    mols = [Chem.MolFromSmiles(text) for text in rows]
    canonical = [Chem.MolToSmiles(mol) for mol in mols]
    random = [Chem.MolToRandomSmilesVect(mol, 1, randomSeed=3)[0] for mol in mols]
    for texts in (canonical, random):
        assert [text for text, place in zip(texts, refused_at(texts), strict=True) if place >= 0] == []


@pytest.mark.parametrize(
    ("smiles", "place"),
    [
        ("C(C", 3), ("C)C", 1), ("C1CC", 4), ("CC(", 3), ("C()C", 2), ("(C)C", 0), ("C=", 2), ("C==C", 2), ("=C", 0),
        ("C11", 2), ("C1C1", 3), ("C12CC12", 6), ("C=1CCC-1", 7), ("C1CC1", -1), ("C=1CC1", -1), ("C%10CC%10", -1),
        ("C1CC(C1).C", -1), ("C(C.C)C", 3), ("C(C)1CC1", 4), ("C(=O)(N)C", -1), ("C1CC1C1CC1", -1), ("C..C", 2),
        ("C(=1)C", 3), ("C(C)=1C1", 5),
    ],
)  # fmt: skip
def test_by_hand(smiles, place):
    assert refused_at([smiles]) == [place]


def is_closed(text):
    tokens = TOKENIZER.tokens(text)
    rings = [token for token in tokens if token.isdigit() or token.startswith("%")]
    return tokens.count("(") == tokens.count(")") and all(rings.count(ring) % 2 == 0 for ring in rings)


@pytest.mark.parametrize("max_length", [1, 2, 5, 8, 13, 40])
def test_whatever_comes_is_closed(model, max_length):
    """Of a model that knows nothing, and likes rings and branches: each text parses but for valences."""
    src = encode_smiles(TOKENIZER, ["CCO"] * 150)
    with torch.no_grad():
        model.head.tokens.bias.zero_()
        model.head.tokens.bias[[IDS[token] for token in "()12="]] = 4.0
    keys = {"temperature": 2.0, "max_length": max_length, "seed": 7}
    texts, scores = sample_molecules(model, TOKENIZER, src, "sample", grammar=True, **keys)
    free, _ = sample_molecules(model, TOKENIZER, src, "sample", **keys)
    params = Chem.SmilesParserParams()
    params.sanitize = False
    if max_length > 1:  # else there is no room for the end
        unparsable = [text for text in texts if not text or Chem.MolFromSmiles(text, params) is None]
        assert unparsable == [] and all(map(is_closed, texts))
    if max_length >= 13:
        assert sum("1" in text and "(" in text for text in texts) > 10
        assert sum(map(is_closed, free)) < 50
    assert all(score > -float("inf") for score in scores)


def test_beams_keep_to_it(model):
    for hypotheses in beam_search(
        model, TOKENIZER, encode_smiles(TOKENIZER, ["CCO", "N"]), 8, grammar=True, max_length=12
    ):
        assert hypotheses and all(is_closed(h.smiles) and h.smiles for h in hypotheses)


def test_banned_tokens(model):
    src = encode_smiles(TOKENIZER, ["CCO"] * 50)
    keys = {"temperature": 3.0, "grammar": True, "max_length": 30}
    texts, _ = sample_molecules(model, TOKENIZER, src, "sample", banned=[")", "1", "2", "c"], **keys)
    assert not {"(", ")", "1", "2", "c"} & {token for text in texts for token in TOKENIZER.tokens(text)}
    with pytest.raises(ConfigError, match="no atom"):
        TokenRules(TOKENIZER, CPU, banned=TOKENIZER.vocabulary[TOKENIZER.chem_start :], grammar=True, max_length=5)
    with pytest.raises(ConfigError, match="able to end"):
        TokenRules(TOKENIZER, CPU, banned=[TOKENIZER.vocabulary[TOKENIZER.end_id]], grammar=True, max_length=5)
    with pytest.raises(ConfigError, match="one string"):
        TokenRules(TOKENIZER, CPU, banned="Cl")
