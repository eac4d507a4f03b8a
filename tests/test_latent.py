"""The latent space: noise of the size it says, ends of a line that are the molecules, means without padding."""

import numpy as np
import pytest
import torch

from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate import (
    SAMPLING_METHODS,
    Hiddens,
    beam_search,
    embed,
    encode_smiles,
    hiddens_of,
    interpolate,
    perturb,
    sample_around,
    sample_molecules,
)
from biokit.generate.latent import points_between
from biokit.models.molbart import MOLBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
SMILES = ["CCO", "CC(C)Cc1ccc(cc1)C(C)C(=O)O"]


@pytest.fixture(scope="module")
def model():
    built = MOLBART.build(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), TOKENIZER.vocab_size, 64, 3)
    with torch.no_grad():
        built.head.tokens.weight.mul_(6)
        for layer in built.decoder:
            layer.cross_attention.out.weight.mul_(6)  # what it writes depends on what it reads
    return built.eval()


def test_an_embedding_is_the_mean_over_the_molecules_own_tokens(model):
    together = embed(model, TOKENIZER, SMILES)
    assert together.shape == (2, 32) and together.dtype == np.float32
    for text, vector in zip(SMILES, together, strict=True):
        alone = model.encode(encode_smiles(TOKENIZER, [text]))[0].mean(0).detach().numpy()
        np.testing.assert_allclose(vector, alone, atol=1e-5)  # means of fp32 values of order 1, other order of sums
        np.testing.assert_allclose(embed(model, TOKENIZER, [text])[0], alone, atol=1e-5)


def test_noise_has_the_size_that_is_asked_for():
    values = torch.randn(3, 50, 200) * torch.tensor([0.1, 1.0, 7.0])[:, None, None] + 3
    mask = torch.arange(50)[None] < torch.tensor([50, 30, 10])[:, None]
    hiddens = Hiddens(values.masked_fill(~mask[..., None], 1e6), mask)
    for radius in (0.0, 0.5, 2.0):
        noisy = perturb(hiddens, radius, seed=4)
        for row, length in enumerate((50, 30, 10)):
            noise = (noisy.values_BSD - hiddens.values_BSD)[row, :length]
            expected = radius * float(hiddens.values_BSD[row, :length].std())
            assert float(noise.std()) == pytest.approx(expected, rel=0.05)  # 2,000 draws: 1.6 % at one sigma
        assert torch.equal(noisy.values_BSD, perturb(hiddens, radius, seed=4).values_BSD)
    assert not torch.equal(perturb(hiddens, 1.0, 4).values_BSD, perturb(hiddens, 1.0, 5).values_BSD)


@pytest.mark.parametrize("method", SAMPLING_METHODS)
def test_every_method_samples_around_each_molecule(model, method):
    src = encode_smiles(TOKENIZER, SMILES)
    keys = {"radius": 1.0, "max_length": 16, "seed": 5}
    found = sample_around(model, TOKENIZER, src, 4, method, **keys)
    assert [len(texts) for texts in found] == [4, 4]
    assert found == sample_around(model, TOKENIZER, hiddens_of(model, src), 4, method, **keys)
    again = sample_around(model, TOKENIZER, src, 4, method, **(keys | {"seed": 6}))
    assert (found == again) == (method == "beam-search-single-sample")


def test_without_a_radius_it_is_the_molecule_itself(model):
    src = encode_smiles(TOKENIZER, SMILES)
    greedy, _ = sample_molecules(model, TOKENIZER, src, max_length=16)
    found = sample_around(model, TOKENIZER, src, 3, radius=0.0, max_length=16)
    assert found == [[text] * 3 for text in greedy]
    beams = [[h.smiles for h in hypotheses] for hypotheses in beam_search(model, TOKENIZER, src, 3, max_length=16)]
    keys = {"radius": 0.0, "max_length": 16}
    assert sample_around(model, TOKENIZER, src, 3, "beam-search-perturbate-sample", **keys) == beams
    best = sample_around(model, TOKENIZER, src, 2, "beam-search-perturbate", num_beams=3, **keys)
    assert best == [[texts[0]] * 2 for texts in beams]


def test_a_line_begins_and_ends_with_its_molecules(model):
    src = encode_smiles(TOKENIZER, SMILES)
    greedy, _ = sample_molecules(model, TOKENIZER, src)
    points = interpolate(model, TOKENIZER, *SMILES)
    assert len(points) == 11 and [points[0], points[-1]] == greedy
    assert interpolate(model, TOKENIZER, *SMILES, num_points=2) == greedy
    line = points_between(hiddens_of(model, src), 3)
    assert line.mask_BS.sum(1).tolist() == [5, 16, 28]
    first, middle, last = line.values_BSD
    torch.testing.assert_close(middle, (first + last) / 2)
    assert torch.equal(first[5], first[4])


def test_half_precision_goes_all_the_way():
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    half = MOLBART.build(config, TOKENIZER.vocab_size, 64, 3).eval().to(torch.bfloat16)
    src = encode_smiles(TOKENIZER, SMILES)
    assert len(interpolate(half, TOKENIZER, *SMILES, num_points=3)) == 3
    assert embed(half, TOKENIZER, SMILES).dtype == np.float32
    for method in SAMPLING_METHODS:
        assert len(sample_around(half, TOKENIZER, src, 2, method, max_length=5)) == 2


def test_what_cannot_be(model):
    src = encode_smiles(TOKENIZER, SMILES)
    for keys in (
        {"radius": -1.0},
        {"radius": float("nan")},
        {"radius": 1e39},
        {"num_samples": 0},
        {"sampling_method": "topk"},
    ):
        with pytest.raises(ConfigError):
            sample_around(model, TOKENIZER, src, **keys)
    with pytest.raises(ConfigError, match="two ends"):
        interpolate(model, TOKENIZER, "C", "CC", 1)
    with pytest.raises(DataError, match="not in the vocabulary"):
        interpolate(model, TOKENIZER, "C", "[Xx]")
    with pytest.raises(DataError, match="empty"):
        embed(model, TOKENIZER, [])
    with pytest.raises(DataError, match="one string"):
        embed(model, TOKENIZER, "CCO")
