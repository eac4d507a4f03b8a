"""Single: accumulation, recompute, clipping, precision and dropout streams give what the arithmetic says."""

import pytest
import torch
from torch import nn

from biokit.config import ModelConfig, TrainConfig
from biokit.errors import ConfigError, RunError
from biokit.models.molbart import MOLBART
from biokit.parallel.folding import fold_layers
from biokit.parallel.grid import resolve_strategy
from biokit.parallel.single import Single

CPU = torch.device("cpu")


def make(dropout=0.0, **keys):
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, dropout=dropout)
    return Single(MOLBART.build(config, 60, 40, 1), TrainConfig(**{"lr": 1e-3, **keys}), 0, CPU)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = {key: torch.randint(6, 60, (8, 9), generator=generator) for key in ("encoder_ids", "decoder_ids", "labels")}
    ids["labels"][2:, 6:] = 0
    return ids


def gradients(strategy):
    return {name: p.grad.clone() for name, p in strategy.model.named_parameters()}


def gap(first, second):
    return max(float((first[name].detach() - second[name].detach()).abs().max()) for name in first)


def test_accumulation_equals_the_whole_batch(batch):
    num_valid = int((batch["labels"] != 0).sum())
    whole, parts = make(), make()
    total = whole.backward(batch, 1 / num_valid, 0)
    pieces = [parts.backward({k: v[i : i + 2] for k, v in batch.items()}, 1 / num_valid, i) for i in range(0, 8, 2)]
    assert sum(p.num_valid for p in pieces) == total.num_valid == num_valid
    assert sum(p.loss for p in pieces) == pytest.approx(total.loss, rel=1e-6)
    assert gap(gradients(whole), gradients(parts)) < 1e-6  # gradients of order 0.1, fp32


def test_recompute_gives_the_same_gradients_under_dropout(batch):
    plain, recomputed = make(dropout=0.3), make(dropout=0.3, checkpoint_activations=True)
    for strategy in (plain, recomputed):
        strategy.backward(batch, 0.01, 77)
    assert gap(gradients(plain), gradients(recomputed)) == 0.0


def test_dropout_depends_on_the_seed_alone(batch):
    strategy = make(dropout=0.3)
    losses = []
    for seed in (1, 2, 1):
        torch.rand(seed)  # whatever the global stream did before
        losses.append(strategy.backward(batch, 1.0, seed).loss)
    assert losses[0] == losses[2] != losses[1]


def test_clipping_clips(batch):
    free, clipped = make(clip_grad=0.0), make(clip_grad=0.01)
    norms = []
    for strategy in (free, clipped):
        strategy.backward(batch, 0.01, 0)
        for group in strategy.optimizer.param_groups:
            group["weight_decay"] = 0.0
        norms.append(strategy.step(1e-3)[0])
    assert norms[0] == norms[1] > 0.01
    moments = [s.optimizer_state()["exp_avg.head.tokens.weight"].norm() for s in (free, clipped)]
    assert float(moments[1] / moments[0]) == pytest.approx(0.01 / norms[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_near_fp32(batch, precision):
    exact = make().evaluate([batch])
    low = make(precision=precision).evaluate([batch])
    # logits of order 1 carry a relative error of about 2^-8 (bf16); summed over tokens the loss is far closer
    assert low.loss / exact.loss == pytest.approx(1.0, abs=2**-8)
    assert low.loss != exact.loss


def test_fp16_overflow_skips_the_step_and_halves_the_scale(batch):
    strategy = make(precision="fp16", initial_loss_scale=2.0**40)
    before = {name: p.clone() for name, p in strategy.model.named_parameters()}
    strategy.backward(batch, 1.0, 0)
    _, skipped = strategy.step(1e-3)
    assert skipped
    assert strategy.scaler_state()["scale"] == 2.0**39
    assert gap(before, dict(strategy.model.named_parameters())) == 0.0


def test_fp16_scale_grows_after_its_window(batch):
    strategy = make(precision="fp16", initial_loss_scale=1.0, loss_scale_window=2)
    for _ in range(2):
        strategy.backward(batch, 1e-3, 0)
        assert not strategy.step(1e-4)[1]
    assert strategy.scaler_state()["scale"] == 2.0


def test_states_round_trip(batch):
    first, second = make(), make()
    for strategy in (first, second):
        strategy.backward(batch, 0.01, 0)
    first.step(1e-3)
    state = {name: t.clone() for name, t in first.optimizer_state().items()}
    second.optimizer.zero_grad()
    second.load({n: t.clone() for n, t in first.model_state().items()}, state, first.scaler_state())
    for strategy in (first, second):
        strategy.backward(batch, 0.01, 1)
        strategy.step(1e-3)
    assert gap(first.model_state(), second.model_state()) == 0.0
    assert gap(first.optimizer_state(), second.optimizer_state()) == 0.0


def test_the_loss_scale_goes_on_where_it_was(batch):
    first = make(precision="fp16", initial_loss_scale=4.0, loss_scale_window=3)
    for _ in range(2):
        first.backward(batch, 1e-3, 0)
        first.step(1e-4)
    second = make(precision="fp16", initial_loss_scale=64.0, loss_scale_window=3)
    second.load(first.model_state(), first.optimizer_state(), first.scaler_state())
    for strategy in (first, second):
        strategy.backward(batch, 1e-3, 0)
        strategy.step(1e-4)
        assert strategy.scaler_state()["scale"] == 8.0  # the third good step of three doubles 4


def test_every_micro_batch_has_masks_of_its_own(batch):
    strategy = make(dropout=0.3)
    micros = [batch, batch]
    seen = []
    strategy._backward = lambda *micro: seen.append(Single._backward(strategy, *micro)) or seen[-1]
    strategy.train_batch(micros, 100, [1, 2], 1e-3)
    (first, _, num_first), (second, _, num_second) = (figures.tolist() for figures in seen)
    assert first != second
    assert num_first == num_second


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_weights(batch, precision):
    strategy = make(precision=precision, initial_loss_scale=1.0)
    before = {name: tensor.clone() for name, tensor in strategy.model_state().items()}
    strategy.backward(batch, 0.01, 0)
    next(strategy.model.parameters()).grad[0, 0] = float("inf")
    with pytest.raises(RunError, match="gradient norm is"):
        strategy.step(1e-3)
    assert gap(before, strategy.model_state()) == 0.0


def test_a_stage_draws_the_masks_of_its_place():
    layers = [nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.5)]
    ones = torch.ones(1000)
    parts = fold_layers(layers[:1], ones, 7, False)
    assert torch.equal(fold_layers(layers[1:], parts, 7, False, first_position=1), fold_layers(layers, ones, 7, False))
    assert not torch.equal(fold_layers(layers[1:], parts, 7, False), fold_layers(layers, ones, 7, False))


def test_optimizer_template_is_what_a_step_leaves(batch):
    strategy = make()
    strategy.backward(batch, 0.01, 0)
    strategy.step(1e-3)
    template, state = strategy.optimizer_template(), strategy.optimizer_state()
    assert {k: v.shape for k, v in template.items()} == {k: v.shape for k, v in state.items()}


def test_weight_decay_spares_vectors():
    strategy = make(weight_decay=0.1)
    decays = {id(p): g["weight_decay"] for g in strategy.optimizer.param_groups for p in g["params"]}
    for parameter in strategy.model.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() >= 2 else 0.0)


def test_unknown_strategy():
    with pytest.raises(ConfigError, match="Single"):
        resolve_strategy("Double")
