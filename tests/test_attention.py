"""Attention weights are the model's own; contributions are differences of a score, atom by atom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from biokit.config import ModelConfig
from biokit.errors import ConfigError, DataError
from biokit.generate.attention import attention_of, attention_of_batch, contributions
from biokit.generate.inputs import Hiddens, encode_smiles
from biokit.generate.latent import mean_of
from biokit.models.molbart import MOLBART, MolBART
from biokit.tokenizers import SmilesTokenizer

TOKENIZER = SmilesTokenizer.packaged()
SMILES = ["CC(C)Cc1ccc(cc1)C(C)C(=O)O", "ClCCO", "C"]
HEAD_SIZE = 8


@pytest.fixture(scope="module")
def model() -> MolBART:
    built = MOLBART.build(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), TOKENIZER.vocab_size, 64, 3)
    with torch.no_grad():
        for layer in [*built.encoder, *built.decoder]:
            for part in ("attention.qkv", "cross_attention.q", "cross_attention.kv"):
                if hasattr(layer, part.split(".")[0]):
                    layer.get_submodule(part).weight.mul_(3)  # sharp weights: a mistake in them is seen
    return built.eval()


def test_weights_times_values_are_what_the_layers_computed(model: MolBART) -> None:
    src = encode_smiles(TOKENIZER, SMILES)
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        outputs.append((arguments[2], output))

    cores = [layer.attention.core for layer in model.encoder] + [layer.cross_attention.core for layer in model.decoder]
    hooks = [core.register_forward_hook(keep) for core in cores]
    encoder, cross = attention_of_batch(model, src, src[:, :-1])
    for hook in hooks:
        hook.remove()
    weights = [*encoder.unbind(1), *cross.unbind(1)]
    assert len(weights) == len(outputs) == 4
    for one, (values, output) in zip(weights, outputs, strict=True):
        expected = output.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        # both are sums of at most 28 products of fp32, in another order: some units in the last place of the largest
        tolerance = 64 * torch.finfo(torch.float32).eps * float(values.abs().max())
        torch.testing.assert_close(one @ values, expected, rtol=0, atol=tolerance)
    assert not any(core._forward_pre_hooks for core in cores)


def test_rows_sum_to_one_and_padding_gets_nothing(model: MolBART) -> None:
    src = encode_smiles(TOKENIZER, SMILES)
    for weights in attention_of_batch(model, src, src[:, :-1]):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
        padding = (src == TOKENIZER.pad_id)[:, None, None, None].expand_as(weights)
        assert padding.any() and (weights[padding] == 0).all() and (weights[~padding] > 0).all()


def test_a_molecule_alone_has_the_weights_that_it_has_in_a_batch(model: MolBART) -> None:
    found = attention_of(model, TOKENIZER, "ClCCO", target="CCO")
    assert found.tokens == ("^", "Cl", "C", "C", "O", "&") and found.target_tokens == ("^", "C", "C", "O")
    assert found.encoder_LHSS.shape == (2, 4, 6, 6) and found.cross_LHTS.shape == (2, 4, 4, 6)
    src, tgt = encode_smiles(TOKENIZER, SMILES), encode_smiles(TOKENIZER, ["CCO"] * 3)
    encoder, cross = attention_of_batch(model, src, tgt)
    np.testing.assert_allclose(encoder[1, :, :, :6, :6], found.encoder_LHSS, atol=1e-5)
    np.testing.assert_allclose(cross[1, :, :, :4, :6], found.cross_LHTS, atol=1e-5)


def test_what_is_too_long_is_refused(model: MolBART) -> None:
    with pytest.raises(DataError, match="102 tokens, begin and end included, and the model has 64"):
        attention_of(model, TOKENIZER, "C" * 100)


def test_a_contribution_is_the_difference_to_the_masked_molecule(model: MolBART) -> None:
    weight = torch.linspace(-1, 1, 32)
    smiles = "[NH3+]CC(Cl)=O"
    found = contributions(model, TOKENIZER, smiles, lambda hiddens: mean_of(hiddens) @ weight, batch_size=2)
    ids = encode_smiles(TOKENIZER, [smiles])
    positions = [1, 2, 3, 5, 8]  # of ^ [NH3+] C C ( Cl ) = O &
    masked = ids.repeat(5, 1)
    masked[range(5), positions] = TOKENIZER.mask_id
    with torch.inference_mode():
        full, without = (mean_of(Hiddens(model.encode(some), some != 0)) @ weight for some in (ids, masked))
    np.testing.assert_allclose(found, (full - without).numpy(), atol=1e-5)
    assert np.abs(found).min() > 1e-4


def test_scores_may_be_arrays_and_atoms_that_do_not_matter_get_zero(model: MolBART) -> None:
    found = contributions(model, TOKENIZER, "CCO", lambda hiddens: np.full(len(hiddens), 3.0))
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_wrong_scores_are_refused(model: MolBART) -> None:
    for score, words in (
        (lambda hiddens: hiddens.values_BSD, "one number a molecule"),
        (lambda hiddens: hiddens.values_BSD.sum(), "one number a molecule"),
        (lambda hiddens: torch.full((len(hiddens),), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(DataError, match=words):
            contributions(model, TOKENIZER, "CCO", score)
    with pytest.raises(ConfigError, match="batch_size=0"):
        contributions(model, TOKENIZER, "CCO", lambda hiddens: np.zeros(len(hiddens)), batch_size=0)
