"""The ensemble's head: it learns what is known, says how sure it is, and is a function of its seed."""

import copy
import math

import numpy as np
import pytest
import torch

from biokit.config import ModelConfig
from biokit.errors import ConfigError
from biokit.generate import embed, encode_smiles
from biokit.models.molbart import MOLBART
from biokit.tasks.property_head import EnsembleHead, HeadOptions, Part, PooledEncoder, train_frozen, train_tuned
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
FAST = HeadOptions(width=32, dropout=0.0, lr=3e-3, max_epochs=60, patience=10)  # dropout would count as noise
NOISE = 0.5


@pytest.fixture(scope="module")
def linear():
    """Targets = weights of 8 coordinates + noise of a known size, in units far from 1."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(900, 8, generator=generator) * torch.tensor([5.0] + [1.0] * 7) + 3
    clean = 100 + 2 * x_ND @ torch.tensor([0.4, -1.0, 0.5, 0, 0, 0, 0, 0])
    y_N = clean + NOISE * torch.randn(900, generator=generator)
    return Part(x_ND[:500], y_N[:500]), Part(x_ND[500:600], y_N[500:600]), Part(x_ND[600:], y_N[600:])


@pytest.fixture(scope="module")
def fitted(linear):
    return train_frozen(linear[0], linear[1], "regression", 3, 1, FAST)


def test_it_learns_a_linear_target_and_its_noise(linear, fitted):
    test = linear[2]
    found = fitted.predict(test.inputs)
    rmse = float(np.sqrt(np.mean((found.mean - test.targets.numpy()) ** 2)))
    assert NOISE * 0.9 < rmse < NOISE * 1.3 and test.targets.std() > 5 * NOISE
    assert found.aleatoric.mean() == pytest.approx(NOISE, rel=0.3)
    assert 0 < found.epistemic.mean() < found.aleatoric.mean()
    far = fitted.predict(test.inputs * 30)
    assert far.epistemic.mean() > 10 * found.epistemic.mean()  # it knows where it has seen nothing


def test_it_learns_a_line_between_two_classes():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(600, 4, generator=generator)
    y_N = (x_ND[:, 0] > 0.3).float()
    train, val = Part(x_ND[:400], y_N[:400]), Part(x_ND[400:500], y_N[400:500])
    found = train_frozen(train, val, "classification", 2, 0, FAST).predict(x_ND[500:])
    assert ((found.mean > 0.5) == (y_N[500:].numpy() > 0.5)).mean() > 0.93
    np.testing.assert_allclose(found.std, np.sqrt(found.mean * (1 - found.mean)), atol=1e-4)  # the whole of a Bernoulli


def test_it_is_a_function_of_the_seed(linear, fitted):
    before = torch.random.get_rng_state()
    again, other = (train_frozen(linear[0], linear[1], "regression", 3, seed, FAST) for seed in (1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(fitted.up_MDW, other.up_MDW)
    members = fitted.up_MDW.detach()
    assert not torch.allclose(members[0], members[1])


def test_the_best_epoch_of_each_member_is_kept(linear):
    """Training that goes on far past it does no harm: the validation loss is no worse than after few epochs."""
    train = Part(linear[0].inputs[:25], linear[0].targets[:25])

    def val_loss(max_epochs):
        options = HeadOptions(width=64, dropout=0.0, lr=1e-2, max_epochs=max_epochs, patience=1000)
        head = train_frozen(train, linear[1], "regression", 2, 0, options)
        with torch.no_grad():
            return head.loss(head(linear[1].inputs.expand(2, -1, -1)), linear[1].targets.expand(2, -1))

    short, longer = val_loss(8), val_loss(80)
    assert (longer <= short).all() and (longer < short + 3).all()


def test_the_losses_are_the_likelihoods():
    head = EnsembleHead(1, 2, "regression", 4)
    head.standardise(torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([10.0, 14.0]))
    assert head.target_center.item() == 12 and head.target_scale.item() == pytest.approx(math.sqrt(8))
    raw = math.log(math.expm1(1.0 - 1e-4))  # a variance of 1
    outputs = torch.tensor([[[0.5, raw]]])
    wanted = (17.0 - 12) / math.sqrt(8)
    loss = head.loss(outputs, torch.tensor([[17.0]]))
    assert loss.item() == pytest.approx(0.5 * (wanted - 0.5) ** 2, rel=1e-4)
    head = EnsembleHead(1, 2, "classification", 4)
    assert head.loss(torch.tensor([[[0.0]]]), torch.tensor([[1.0]])).item() == pytest.approx(math.log(2))


def test_tuning_changes_a_copy_of_the_encoder_and_helps():
    """A model of random weights knows no chlorine from bromine in its mean hiddens as well as a tuned one does."""
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = MOLBART.build(config, TOKENIZER.vocab_size, 40, 3).eval()
    smiles = ["C" * a + end + "C" * b for a in range(1, 9) for b in range(1, 6) for end in ("O", "S", "N")]
    targets = torch.tensor([float("O" in text) - float("S" in text) + 0.1 * len(text) for text in smiles])
    ids = encode_smiles(TOKENIZER, smiles)
    np.testing.assert_allclose(PooledEncoder(model).vectors(ids).numpy(), embed(model, TOKENIZER, smiles), atol=1e-6)
    is_val = torch.arange(len(smiles)) % 4 == 0
    train, val = (Part(ids[mask], targets[mask]) for mask in (~is_val, is_val))
    options = HeadOptions(width=16, dropout=0.0, batch_size=16, max_epochs=6, encoder_lr=3e-3)

    def tune():
        encoder = copy.deepcopy(model)
        head = train_tuned(encoder, train, val, "regression", 2, 0, options)
        return encoder, head, head.predict(PooledEncoder(encoder).vectors(val.inputs)).mean

    encoder, head, predicted = tune()
    _, head_again, again = tune()
    assert np.array_equal(predicted, again) and torch.equal(head.up_MDW, head_again.up_MDW)
    assert not torch.equal(encoder.encoder[0].ffn.up.weight, model.encoder[0].ffn.up.weight)
    assert torch.equal(encoder.decoder[0].ffn.up.weight, model.decoder[0].ffn.up.weight)
    vectors = PooledEncoder(model).vectors
    frozen = train_frozen(
        Part(vectors(train.inputs), train.targets), Part(vectors(val.inputs), val.targets), "regression", 2, 0, options
    )
    errors = [
        float(np.mean((found - val.targets.numpy()) ** 2))
        for found in (predicted, frozen.predict(vectors(val.inputs)).mean)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    "options",
    [{"width": 0}, {"lr": 0.0}, {"encoder_lr": 2.0}, {"dropout": 1.0}, {"weight_decay": -1.0}, {"patience": 0}],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="out of range"):
        HeadOptions(**options).check()
